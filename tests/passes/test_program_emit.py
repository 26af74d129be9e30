"""Builders, programs, and the schedules of the four strategies on a chain written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moonwalk_compile.passes.analysis import Analysis
from moonwalk_compile.passes.emit import Schedule, Segment, Unreachable, emit
from moonwalk_compile.passes.graph import Ref
from moonwalk_compile.passes.program import Builder, Program
from moonwalk_compile.passes.solutions import Facts, block_inversion, block_spine, residue
from moonwalk_compile.passes.verify import verify

from .hand import Hand, Layer, analysis_of, chain, edge


def labels(program: Program) -> list[str]:
    return [str(instruction.operation.target) for instruction in program.instructions]


def builder() -> Builder:
    return Builder(Hand().graph([], []))


def test_last_use_is_the_position_of_the_last_reader():
    build = builder()
    x = build.input(0)
    build.emit(edge([1], [0], [4]))
    build.emit(edge([2], [0, 1], [4]))
    build.emit(edge([3], [2], [4]))
    program = build.finish([Ref(build.environment[3]), 5, None])
    slots = build.environment
    assert program.last_use == {x: 1, slots[1]: 1, slots[2]: 2, slots[3]: 3}
    assert program.outputs[1:] == (5, None)


def test_an_output_that_is_read_as_well_lives_to_the_end():
    build = builder()
    build.input(0)
    build.emit(edge([1], [0], [4]))
    build.emit(edge([2], [1], [4]))
    program = build.finish([Ref(build.environment[1])])
    assert program.last_use[build.environment[1]] == 2
    assert build.environment[2] not in program.last_use  # nobody reads it


def test_a_tuple_and_its_items_have_slots_of_their_own():
    build = builder()
    build.input(0)
    build.emit(edge([1, 2], [0], [4, 8], "split"))
    program = build.finish([Ref(build.environment[1]), Ref(build.environment[2])])
    assert labels(program) == ["split", "item", "item"]
    whole, first, second = program.instructions
    assert (whole.value, first.value, second.value) == (None, 1, 2)
    assert (first.holds, second.holds) == ([(whole.slot, 0)], [(whole.slot, 1)])
    assert program.last_use == {0: 0, whole.slot: 2, first.slot: 3, second.slot: 3}


def test_a_forgotten_value_gets_a_second_slot():
    build = builder()
    build.input(0)
    build.emit(edge([1], [0], [4]))
    before = build.environment[1]
    build.forget([1])
    assert 1 not in build.environment
    build.emit(edge([1], [0], [4]))
    assert build.environment[1] != before


def test_inputs_come_in_the_given_order_and_are_declared_even_when_unread():
    build = builder()
    build.input(7)
    build.input(3)
    build.input(5)
    program = build.finish([Ref(build.environment[7])], order=[9, 3])
    assert [value for _, value in program.inputs] == [9, 3, 7], "5 is neither named nor read"
    assert len({slot for slot, _ in program.inputs}) == 3


def test_an_input_is_declared_once():
    build = builder()
    assert build.input(4) == build.input(4)


def test_arguments_are_mapped_to_the_programs_slots():
    build = builder()
    build.input(0)
    build.input(1)
    build.emit(edge([2], [1, 0], [4]))
    args, kwargs = build.instructions[0].arguments(lambda slot: f"slot {slot}")
    assert (args, kwargs) == (("slot 1", "slot 0"), {})
    assert build.instructions[0].reads == [1, 0]


# -- the four strategies ---------------------------------------------------------------------------------------------


def test_keep_runs_nothing_again():
    analysis = chain([Layer()] * 2)
    keeps = [Segment(i, i, "keep", frozenset(analysis.blocks[i].demanded)) for i in range(2)]
    schedule = emit(Facts(analysis), keeps)
    verify(analysis, schedule)
    assert labels(schedule.forward) == ["mm", "act"] * 2
    assert labels(schedule.backward) == ["act_backward", "mm", "mm"] * 2
    assert set(schedule.kept) == {0, 1, 2} | {v for block in analysis.blocks for v in block.demanded}


def test_checkpoint_runs_the_segment_again_just_before_use():
    analysis = chain([Layer()] * 2)
    schedule = emit(Facts(analysis), [Segment(0, 1, "checkpoint", frozenset())])
    verify(analysis, schedule)
    assert labels(schedule.backward) == ["mm", "act", "mm", "act_backward", "mm", "mm", "act_backward", "mm", "mm"]
    assert set(schedule.kept) == {0, 1, 2}  # the step's own inputs


def test_invert_solves_each_block_just_before_its_backward():
    analysis = chain([Layer(inverse=True)] * 2)
    keep = Segment(0, 0, "keep", frozenset(analysis.blocks[0].demanded))
    schedule = emit(Facts(analysis), [keep, Segment(1, 1, "invert", frozenset())])
    verify(analysis, schedule)
    assert labels(schedule.backward)[:3] == ["inverse of act", "inverse of mm", "act_backward"]
    border = analysis.blocks[0].live_out[0]
    assert border not in schedule.kept and analysis.graph.output_values[0] in schedule.kept


def test_moonwalk_walks_the_spine_down_and_the_sweep_up():
    """The parameter gradients come in forward order; the cotangent of the border is solved a second time."""
    analysis = chain([Layer(), Layer(vijp=True), Layer()])
    facts = Facts(analysis)
    spine = facts.spine(1)
    middle = analysis.blocks[1]
    kept = frozenset(middle.live_in) | frozenset(spine.residuals)
    keeps = {i: Segment(i, i, "keep", frozenset(analysis.blocks[i].demanded)) for i in (0, 2)}
    schedule = emit(facts, [keeps[0], Segment(1, 1, "moonwalk", kept), keeps[2]])
    verify(analysis, schedule)
    made = [instruction.value for instruction in schedule.backward.instructions if instruction.block == 1]
    down, up = middle.cotangents_out[0], middle.cotangents_in[0]
    assert "inverse" in labels(schedule.backward)
    assert made.index(down) < made.index(up) < made.index(middle.gradients[0])


def test_a_sweep_may_wait_for_all_that_lies_before_its_segment():
    """The cotangent that the sweep begins with then dies in its first block, not behind the last."""
    analysis = chain([Layer(), Layer(vijp=True), Layer(vijp=True), Layer(vijp=True)])
    facts = Facts(analysis)
    blocks = analysis.blocks
    residuals = {v for i in (1, 2, 3) for v in facts.spine(i).residuals}
    kept = frozenset(blocks[1].live_in) | frozenset(residuals)
    segments = [Segment(0, 0, "keep", frozenset(blocks[0].demanded)), Segment(1, 3, "moonwalk", kept)]
    at_once, waiting = (emit(facts, segments, sweeps_last) for sweeps_last in (False, True))
    for schedule in (at_once, waiting):
        verify(analysis, schedule)
    gradients = [block.gradients[0] for block in blocks]
    order = [i.value for i in waiting.backward.instructions if i.value in gradients]
    assert order == gradients
    assert [i.value for i in at_once.backward.instructions if i.value in gradients] == gradients[1:] + gradients[:1]

    def held_to_the_end(schedule: Schedule) -> bool:
        program = schedule.backward
        down = next(i.slot for i in program.instructions if i.value == blocks[1].cotangents_out[0])
        last = max(p for p, i in enumerate(program.instructions) if i.value == gradients[3])
        return program.last_use[down] > last

    assert held_to_the_end(at_once) and not held_to_the_end(waiting)


def drawn_chain() -> tuple[Analysis, int]:
    """A dropout written out; the value is the mask."""
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    mask = hand.call("bernoulli", [x], 4, random=True)
    inner = hand.call("mm", [x, w], 4, expensive=True)
    y = hand.call("mul", [inner, mask], 4)
    hand.call("mul", [tangent, mask], 4, stage="backward")
    gradient = hand.call("mm", [len(hand.values) - 1, x], 4, stage="backward", expensive=True)
    return analysis_of(hand.graph([y], [gradient])), mask


def test_what_was_drawn_cannot_be_had_again():
    analysis, mask = drawn_chain()
    assert len(analysis.blocks) == 1
    with pytest.raises(Unreachable, match=analysis.graph.values[mask].name):
        emit(Facts(analysis), [Segment(0, 0, "checkpoint", frozenset())])


def test_what_was_drawn_is_kept():
    analysis, mask = drawn_chain()
    schedule = emit(Facts(analysis), [Segment(0, 0, "checkpoint", frozenset([mask]))])
    verify(analysis, schedule)
    assert mask in schedule.kept
    assert "bernoulli" not in labels(schedule.backward)
    assert residue(analysis, analysis.blocks[0]) == {mask}


def test_an_overwritten_input_is_part_of_the_residue():
    """Its value is gone when the backward pass runs."""
    hand = Hand()
    x, buffer, tangent = hand.input("x", 4), hand.input("b", 4, "buffer"), hand.input("h", 4, "tangent")
    y = hand.call("mul", [x, buffer], 4, expensive=True)
    gradient = hand.call("mul", [tangent, x], 4, stage="backward")
    analysis = analysis_of(hand.graph([y], [gradient], mutated=[buffer]))
    assert residue(analysis, analysis.blocks[0]) == {buffer}
    assert buffer not in analysis.graph.static and x in analysis.graph.static


def normalized(statistic: int) -> Analysis:
    """Two layers y = norm(mm(x, w), mean) of 64 bytes, whose inverse needs the mean, of `statistic` bytes."""
    hand = Hand()
    x, w, h = hand.input("x", 64), hand.input("w", 2, "parameter"), hand.input("h", 64, "tangent")
    layers, value = [], x
    for i in range(2):
        inner = hand.call("mm", [value, w], 64, expensive=True, sequence=2 * i)
        mean = hand.call("mean", [inner], statistic, sequence=2 * i + 1)
        layers.append((value, inner, mean))
        value = hand.call("norm", [inner, mean], 64, sequence=2 * i + 1)
    outer, cotangent = {0: layers[1][0], 1: value}, h
    for i, (_, inner, mean) in reversed(list(enumerate(layers))):
        middle = hand.call("norm_backward", [cotangent, inner, mean], 64, stage="backward", sequence=2 * i + 1)
        cotangent = hand.call("mm", [middle, w], 64, stage="backward", expensive=True, sequence=2 * i)
    inverse = {
        i: [
            edge([inner], [outer[i], mean], [64], "inverse of norm", kind="inverse"),
            edge([before], [inner, w], [64], "inverse of mm", kind="inverse"),
        ]
        for i, (before, inner, mean) in enumerate(layers)
    }
    return analysis_of(hand.graph([value], [cotangent]), inverse)


def test_an_inversion_keeps_small_values_that_it_needs():
    analysis = normalized(statistic=4)
    first, second = analysis.blocks
    (mean,) = block_inversion(analysis, second).residuals
    assert analysis.graph.values[mean].name.startswith("mean")
    segments = [Segment(0, 0, "keep", frozenset(first.demanded)), Segment(1, 1, "invert", frozenset([mean]))]
    schedule = emit(Facts(analysis), segments)
    assert "inverse of norm" not in labels(schedule.forward)
    assert labels(schedule.backward)[:2] == ["inverse of norm", "inverse of mm"]
    assert mean in schedule.kept


def test_what_a_chain_recovers_is_not_read_in_front_of_it():
    """Noise around the zeros of a ReLU would turn half of its mask."""
    hand = Hand()
    x, w, h = hand.input("x", 64), hand.input("w", 8, "parameter"), hand.input("h", 64, "tangent")
    a = hand.call("mm", [x, w], 64, expensive=True, sequence=0)
    y = hand.call("relu", [a], 64, sequence=1)
    z = hand.call("mm", [y, w], 64, expensive=True, sequence=2)
    weight = hand.call("mm", [h, y], 8, stage="backward", expensive=True, sequence=2)
    lower = hand.call("mm", [h, w], 64, stage="backward", expensive=True, sequence=2)
    masked = hand.call("threshold_backward", [lower, y], 64, stage="backward", sequence=1)
    gradient = hand.call("mm", [masked, x], 8, stage="backward", expensive=True, sequence=0)
    inverse = {1: [edge([y], [z, w], [64], "inverse of mm", kind="inverse")]}
    analysis = analysis_of(hand.graph([z], [weight, gradient]), inverse)
    first, _ = analysis.blocks
    assert y in first.live_out and y in first.demanded
    schedule = emit(Facts(analysis), [Segment(0, 0, "keep", frozenset([a])), Segment(1, 1, "invert", frozenset())])
    order = labels(schedule.backward)
    assert order.index("inverse of mm") < order.index("relu") < order.index("threshold_backward")


def test_only_what_leads_to_a_border_is_solved_for():
    """The branch of x + F(x) could be had from the sum too, cheaply: but noise grows on that way, unseen."""
    hand = Hand()
    x, w, h = hand.input("x", 64), hand.input("w", 8, "parameter"), hand.input("h", 64, "tangent")
    y = hand.call("mm", [x, w], 64, expensive=True, sequence=0)
    inner = hand.call("mm", [y, w], 64, expensive=True, seconds=5.0, sequence=1)
    branch = hand.call("mm", [inner, w], 64, expensive=True, sequence=1)
    z = hand.call("add", [y, branch], 64, sequence=1)
    weight = hand.call("mm", [h, inner], 8, stage="backward", expensive=True, sequence=1)
    first = hand.call("mm", [h, x], 8, stage="backward", expensive=True, sequence=0)
    inverse = [
        edge([y], [z, w], [64], "inverse of a contraction", kind="inverse", seconds=100.0),
        edge([branch], [z, y], [64], "inverse of add", kind="inverse", seconds=0.1),
        edge([inner], [branch, w], [64], "inverse of mm", kind="inverse", seconds=0.1),
    ]
    analysis = analysis_of(hand.graph([z], [weight, first]), {1: inverse})
    block = analysis.blocks[1]
    assert block.live_in == (y,) and inner in block.demanded
    found = block_inversion(analysis, block)
    assert not found.missing
    assert [e.label for e in found.solution.program((y, inner))] == ["inverse of a contraction", "mm"]


def test_an_inversion_does_not_keep_large_values():
    analysis = normalized(statistic=5)  # more than a sixteenth of 64
    assert block_inversion(analysis, analysis.blocks[1]).missing


def test_a_spine_prefers_one_large_residual_to_two():
    hand = Hand()
    large = 10**10  # ten seconds
    x, w, h = hand.input("x", large), hand.input("w", 2, "parameter"), hand.input("h", 8, "tangent")
    a = hand.call("mm", [x, w], large, expensive=True, sequence=0)
    b = hand.call("mm", [a, w], large, expensive=True, sequence=1)
    double = hand.call("double", [b], large, sequence=2)
    y = hand.call("norm", [b, double], 8, sequence=2)
    left = hand.call("by", [h, b], 8, stage="backward", sequence=2)
    right = hand.call("by", [h, double], 8, stage="backward", sequence=2)
    total = hand.call("add", [left, right], 8, stage="backward", sequence=2)
    lower = hand.call("mm", [total, w], 8, stage="backward", sequence=1, expensive=True)
    gradient = hand.call("mm", [lower, w], 8, stage="backward", sequence=0, expensive=True)
    analysis = analysis_of(hand.graph([y], [gradient]))
    block = analysis.blocks[1]
    assert block_spine(analysis, block).residuals == (b, double)
    shortcut = edge([total], [h, b], [8], "shortcut", seconds=5.0, stage="backward")
    nothing: tuple[()] = ()
    shorter = replace(analysis, shortcuts=(nothing, (shortcut,)))
    assert block_spine(shorter, block).residuals == (b,)
