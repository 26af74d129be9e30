"""Where the forward pass is cut, and which block each backward edge belongs to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moonwalk_compile.passes.blocks import Block, find_blocks
from moonwalk_compile.passes.graph import Graph
from moonwalk_compile.testing import capture_joint

from .hand import Hand, Layer, chain


def forward_labels(blocks: tuple[Block, ...]) -> list[list[str]]:
    return [[edge.label for edge in block.forward] for block in blocks]


def assert_a_partition(graph: Graph, blocks: tuple[Block, ...]) -> None:
    """Every edge of the step is in exactly one block, and borders meet."""
    for stage in ("forward", "late", "backward"):
        placed = [edge.gives for block in blocks for edge in getattr(block, stage)]
        assert sorted(placed) == sorted(edge.gives for edge in graph.stage_edges(stage))
    assert all(a.live_out == b.live_in for a, b in pairwise(blocks))


def test_a_single_stream_is_cut_at_every_layer():
    analysis = chain([Layer()] * 4)
    assert_a_partition(analysis.graph, analysis.blocks)
    assert forward_labels(analysis.blocks) == [["mm", "act"]] * 4
    assert [len(block.live_out) for block in analysis.blocks] == [1, 1, 1, 1]
    assert analysis.blocks[0].live_in == ()  # the step's inputs are available everywhere


def test_cotangents_and_gradients_of_a_chain():
    blocks = chain([Layer()] * 3).blocks
    assert [len(block.gradients) for block in blocks] == [2, 1, 1]  # the first also gives the input's
    assert blocks[2].cotangents_in == (4,)  # the tangent
    for before, after in pairwise(blocks):
        assert before.cotangents_in == after.cotangents_out
    assert blocks[0].cotangents_out == ()


def test_demanded_values_leave_parameters_out():
    analysis = chain([Layer()] * 2)
    names = [[analysis.graph.values[value].name for value in block.demanded] for block in analysis.blocks]
    assert names == [["mm_4"], ["act_5", "mm_6"]]


def test_the_cut_falls_where_fewest_bytes_are_alive():
    """Between two expensive operations 40, 6 and 30 bytes: the one cut is behind the 6."""
    hand = Hand()
    x, w = hand.input("x", 1), hand.input("w", 1, "parameter")
    hand.input("h", 1, "tangent")
    a = hand.call("mm", [x, w], 40, expensive=True)
    b = hand.call("shrink", [a], 6)
    c = hand.call("grow", [b], 30)
    d = hand.call("mm", [c, w], 9, expensive=True)
    blocks = find_blocks(hand.graph([d], []))
    assert forward_labels(blocks) == [["mm", "shrink"], ["grow", "mm"]]
    assert (blocks[0].live_out, blocks[1].live_out) == ((b,), (d,))


def two_streams(depth: int) -> tuple[Graph, list[tuple[int, int]]]:
    """x1 = x1 + F(x2), then x2 = x2 + F(x1); the pairs are what is alive behind each update."""
    hand = Hand()
    one, two, w = hand.input("a", 4), hand.input("b", 4), hand.input("w", 1, "parameter")
    hand.input("h", 4, "tangent")
    pairs = []
    for _ in range(depth):
        one, two = two, hand.call("add", [one, hand.call("mm", [two, w], 4, expensive=True)], 4)
        pairs.append((one, two))
    return hand.graph([one, two], []), pairs


def test_two_streams_are_cut_behind_each_update():
    graph, pairs = two_streams(4)
    blocks = find_blocks(graph)
    assert_a_partition(graph, blocks)
    assert forward_labels(blocks) == [["mm", "add"]] * 4
    assert [set(block.live_out) for block in blocks[1:]] == [set(pair) for pair in pairs[1:]]


def test_no_cut_where_a_skip_makes_it_wide():
    """Inside a residual branch both the skip and the branch are alive: 8 bytes between the two mm, 4 around."""
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    hand.input("h", 4, "tangent")
    value = hand.call("mm", [x, w], 4, expensive=True)
    streams = [value]
    for _ in range(3):
        inner = hand.call("relu", [hand.call("mm", [value, w], 4, expensive=True)], 4)
        value = hand.call("add", [value, hand.call("mm", [inner, w], 4, expensive=True)], 4)
        streams.append(value)
    blocks = find_blocks(hand.graph([value], []))
    assert forward_labels(blocks) == [["mm"]] + [["mm", "relu", "mm", "add"]] * 3
    assert [block.live_out for block in blocks] == [(value,) for value in streams]


def test_a_long_skip_is_alive_at_every_border_it_crosses():
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    hand.input("h", 4, "tangent")
    skip = value = hand.call("mm", [x, w], 4, expensive=True)
    for _ in range(5):
        value = hand.call("relu", [hand.call("mm", [value, w], 4, expensive=True)], 4)
    joined = hand.call("add", [skip, value], 4)
    last = hand.call("mm", [joined, w], 4, expensive=True)
    graph = hand.graph([last], [])
    blocks = find_blocks(graph)
    assert_a_partition(graph, blocks)
    producer = next(block.index for block in blocks if any(skip in edge.gives for edge in block.forward))
    reader = next(block.index for block in blocks if any(joined in edge.gives for edge in block.forward))
    assert (producer, reader, len(blocks)) == (0, 3, 5)  # cuts under the skip, but not next to its narrow ends
    assert [skip in block.live_in for block in blocks] == [producer < block.index <= reader for block in blocks]


def test_a_lost_sequence_is_that_of_the_operation_behind_it() -> None:
    """The gradient of an activation in place: its own number is no forward operation's."""
    hand = Hand()
    value, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    cotangent = hand.input("h", 4, "tangent")
    for sequence in (0, 3, 6):
        value = hand.call("mm", [value, w], 4, expensive=True, sequence=sequence)
        value = hand.call("act", [value], 4, sequence=sequence + 2)
    gradients = []
    for sequence in (6, 3, 0):
        cotangent = hand.call("act", [cotangent, value], 4, stage="backward", sequence=sequence + 1)
        cotangent = hand.call("mm", [cotangent, w], 4, stage="backward", expensive=True, sequence=sequence)
        gradients.append(cotangent)
    blocks = find_blocks(hand.graph([value], gradients))
    assert [[edge.label for edge in block.backward] for block in blocks] == [["act", "mm"]] * 3


@pytest.mark.parametrize("wrong", [0, 5])
def test_the_sum_of_a_fan_out_goes_where_its_last_summand_is(wrong: int) -> None:
    """The first block's result is also added at the end; the sum of its two cotangents carries a wrong sequence."""
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    first = value = hand.call("mm", [x, w], 4, expensive=True, sequence=0)
    for sequence in range(1, 5):
        value = hand.call("mm", [value, w], 4, expensive=True, sequence=sequence)
    last = hand.call("add", [value, first], 4, sequence=5)
    skip = hand.call("mul", [tangent, w], 4, stage="backward", sequence=5)
    cotangents = [tangent]
    for sequence in (4, 3, 2, 1):
        cotangents.append(hand.call("mm", [cotangents[-1], w], 4, stage="backward", expensive=True, sequence=sequence))
    total = hand.call("add", [cotangents[-1], skip], 4, stage="backward", sequence=wrong)
    entry = hand.call("mm", [total, w], 4, stage="backward", expensive=True, sequence=0)
    graph = hand.graph([last], [entry])
    blocks = find_blocks(graph)
    assert_a_partition(graph, blocks)
    home = {edge.gives[0]: block.index for block in blocks for edge in block.backward}
    assert forward_labels(blocks) == [["mm"], ["mm", "mm"], ["mm"], ["mm", "add"]]
    assert [home[value] for value in cotangents[1:]] == [3, 2, 1, 1]
    assert (home[skip], home[total], home[entry]) == (3, 1, 0)  # not 0 or 3, where the sequence of the sum points
    assert skip in blocks[2].cotangents_in and total in blocks[1].cotangents_out


def test_a_backward_edge_is_never_in_a_later_block_than_its_cotangents():
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    first = hand.call("mm", [x, w], 4, expensive=True, sequence=0)
    second = hand.call("mm", [first, w], 4, expensive=True, sequence=1)
    g1 = hand.call("mm", [tangent, w], 4, stage="backward", expensive=True, sequence=1)
    g0 = hand.call("mm", [g1, w], 4, stage="backward", expensive=True, sequence=0)
    strayed = hand.call("mul", [g0, w], 4, stage="backward", sequence=1)
    blocks = find_blocks(hand.graph([second], [strayed]))
    assert [edge.gives[0] for edge in blocks[0].backward] == [g0, strayed]


def test_what_is_made_from_a_shape_says_nothing_of_the_backward_pass():
    """It carries the sequence of the operation before it, which is in another block."""
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    first = hand.call("mm", [x, w], 4, expensive=True, sequence=0)
    blank = hand.call("new_empty", [first], 8, sequence=0)
    padded = hand.call("slice_scatter", [blank, first], 8, sequence=1)
    second = hand.call("mm", [padded, w], 4, expensive=True, sequence=2)
    g1 = hand.call("mm", [tangent, w], 4, stage="backward", expensive=True, sequence=2)
    g0 = hand.call("mm", [g1, w], 4, stage="backward", expensive=True, sequence=0)
    blocks = find_blocks(hand.graph([second], [g0]))
    assert forward_labels(blocks) == [["mm"], ["new_empty", "slice_scatter", "mm"]]
    assert [[edge.gives[0] for edge in block.backward] for block in blocks] == [[g0], [g1]]


def test_late_edges_live_with_what_they_read():
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    first = hand.call("mm", [x, w], 4, expensive=True, sequence=0)
    second = hand.call("mm", [first, w], 4, expensive=True, sequence=1)
    sign = hand.call("sgn", [first], 4, stage="late")
    turned = hand.call("t", [w], stage="late", view=True)
    g1 = hand.call("mm", [tangent, turned], 4, stage="backward", expensive=True, sequence=1)
    g0 = hand.call("mul", [g1, sign], 4, stage="backward", sequence=0)
    graph = hand.graph([second], [g0])
    blocks = find_blocks(graph)
    assert [[edge.gives[0] for edge in block.late] for block in blocks] == [[sign], []]
    assert turned in graph.static  # a view of a parameter is available everywhere
    assert blocks[0].demanded == (sign,)


def test_products_with_an_untransposed_weight_are_blocks_of_their_own():
    """The gradient of `x @ w` reads `x.t()`, a late view of what the block before made."""

    def chain(x, *weights):
        for weight in weights:
            x = torch.tanh(x @ weight)
        return x

    capture = capture_joint(chain, [torch.randn(16, 8), *(torch.randn(8, 8) for _ in range(4))])
    blocks = find_blocks(capture.graph)
    assert len(blocks) == 4
    for block in blocks:
        at_hand = {*block.live_in, *capture.graph.static, *(v for e in block.forward for v in e.gives)}
        for edge in block.late:
            assert at_hand.issuperset(edge.needs)
            at_hand.update(edge.gives)
        assert at_hand.issuperset(block.demanded)


def test_a_shared_constant_crosses_no_border():
    def chain(x, *weights):
        for weight in weights:
            x = torch.tanh(x @ (weight + torch.eye(8, dtype=weight.dtype)).t())
        return x

    capture = capture_joint(chain, [torch.randn(16, 8), *(torch.randn(8, 8) for _ in range(4))])
    constants = [edge for edge in capture.graph.edges if edge.label == "eye"]
    assert len(constants) == 1
    assert all(len(block.live_out) == 1 for block in find_blocks(capture.graph))


def test_what_waits_for_the_end_does_not_hide_the_cuts():
    """Each layer leaves new running statistics, which a mutation behind the forward pass reads, and an output."""
    hand = Hand()
    value, w = hand.input("x", 8), hand.input("w", 1, "parameter")
    running = [hand.input(f"running{i}", 2, "buffer") for i in range(4)]
    hand.input("h", 8, "tangent")
    statistics, outputs = [], []
    for _ in running:
        value = hand.call("mm", [value, w], 8, expensive=True)
        statistics.append(hand.call("mean", [value], 2))
        outputs.append(hand.call("copy", [value], 3))
    for target, new in zip(running, statistics, strict=True):
        hand.call("copy_", [target, new], effect=True)
    blocks = find_blocks(hand.graph([value, *outputs], [], mutated=running))
    assert [block.forward[0].label for block in blocks] == ["mm"] * 4
    borders = {value for block in blocks for value in (*block.live_in, *block.live_out)}
    assert borders.isdisjoint(statistics)
    assert borders >= set(outputs)


def test_a_constant_does_not_pull_the_backward_pass_of_what_is_before_it_into_its_block():
    """It carries the sequence of the operation before it, in another block."""
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    first = hand.call("mm", [x, w], 4, expensive=True, sequence=0)
    scaled = hand.call("mul", [first, w], 4, sequence=1)
    constant = hand.call("prod", [hand.call("tensor", [], 2, sequence=1)], 1, sequence=1)
    second = hand.call("mm", [scaled, w, constant], 4, expensive=True, sequence=2)
    g2 = hand.call("mm", [tangent, w], 4, stage="backward", expensive=True, sequence=2)
    g1 = hand.call("mul", [g2, first], 4, stage="backward", sequence=1)
    g0 = hand.call("mm", [g1, w], 4, stage="backward", expensive=True, sequence=0)
    blocks = find_blocks(hand.graph([second], [g0, g1]))
    assert forward_labels(blocks) == [["mm", "mul"], ["prod", "mm"]]
    assert [[edge.gives[0] for edge in block.backward] for block in blocks] == [[g1, g0], [g2]]
