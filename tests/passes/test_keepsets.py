"""Minimum cuts: which values of a block are kept at which price of time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moonwalk_compile.api import fake_session
from moonwalk_compile.options import Options
from moonwalk_compile.passes.analysis import Analysis
from moonwalk_compile.passes.moves.keepsets import keep_sets, kept_as_one, min_cut_keep, not_packed

from .hand import Hand, Layer, analysis_of, chain

HIGH = 1e6  # bytes per second


def one_block(*sizes: int, demanded: tuple[int, ...], seconds: float = 1.0) -> tuple[Analysis, list[int]]:
    """An mm, then a chain of cheap operations of these sizes; the backward pass reads those at `demanded`."""
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    made = [hand.call("mm", [x, w], sizes[0], seconds=5, expensive=True)]
    for size in sizes[1:]:
        made.append(hand.call("op", [made[-1]], size, seconds=seconds))
    gradient = hand.call("backward", [tangent, *(made[i] for i in demanded)], 4, stage="backward")
    analysis = analysis_of(hand.graph([made[-1]], [gradient]))
    assert len(analysis.blocks) == 1
    return analysis, made


def kept(analysis: Analysis, price: float) -> frozenset[int]:
    return min_cut_keep(analysis, analysis.blocks[0], price)


def test_a_high_price_keeps_everything_that_is_read():
    analysis, made = one_block(8, 8, 8, demanded=(0, 1, 2))
    assert kept(analysis, HIGH) == set(made)


def test_price_zero_keeps_nothing_of_what_the_inputs_give():
    analysis, _ = one_block(8, 8, 8, demanded=(0, 1, 2))
    assert kept(analysis, 0) == set()


def test_the_price_at_which_a_value_is_kept_is_its_bytes_over_its_seconds():
    """8 bytes, 5 seconds: 1.6 bytes per second."""
    analysis, made = one_block(8, 4, demanded=(0,))
    assert kept(analysis, 1.59) == set()
    assert kept(analysis, 1.61) == {made[0]}


def test_a_narrow_value_is_kept_in_place_of_what_follows_from_it():
    """100 bytes follow from 2 in one second, but the 2 from the inputs only in five."""
    analysis, made = one_block(2, 100, demanded=(1,))
    assert kept(analysis, 10) == {made[0]}
    assert kept(analysis, 0) == set()
    assert kept(analysis, HIGH) == {made[1]}


def test_what_crosses_the_border_is_kept_when_it_cannot_be_had_otherwise():
    analysis = chain([Layer(inner=8, outer=4)] * 2)
    block = analysis.blocks[1]
    entry, inner = block.demanded
    assert min_cut_keep(analysis, block, 0) == {entry}
    assert min_cut_keep(analysis, block, HIGH) == {entry, inner}


def test_views_are_kept_as_their_base():
    hand = Hand()
    x, w = hand.input("x", 4), hand.input("w", 1, "parameter")
    tangent = hand.input("h", 4, "tangent")
    base = hand.call("mm", [x, w], 8, expensive=True)
    view = hand.call("view", [base], 8, view=True)
    y = hand.call("op", [view], 4)
    gradient = hand.call("backward", [tangent, view], 4, stage="backward")
    analysis = analysis_of(hand.graph([y], [gradient]))
    assert kept(analysis, HIGH) == {base}


def test_random_values_are_kept_at_any_price():
    hand = Hand()
    x, tangent = hand.input("x", 4), hand.input("h", 4, "tangent")
    mask = hand.call("bernoulli", [x], 4, random=True)
    y = hand.call("mul", [x, mask], 4, expensive=True)
    gradient = hand.call("mul", [tangent, mask], 4, stage="backward")
    assert kept(analysis_of(hand.graph([y], [gradient])), 0) == {mask}


def test_parameters_are_never_kept():
    analysis = chain([Layer()] * 2)
    for block in analysis.blocks:
        assert not min_cut_keep(analysis, block, HIGH) & analysis.graph.static


def test_a_block_whose_backward_reads_nothing_keeps_nothing():
    analysis, _ = one_block(8, 8, demanded=())
    assert kept(analysis, HIGH) == set()
    assert keep_sets(analysis, analysis.blocks[0], [1.0]) == [(frozenset(), float("inf"))]


def test_keep_sets_are_distinct_and_go_from_most_to_least():
    analysis, made = one_block(2, 100, 100, demanded=(1, 2))
    found = [values for values, _ in keep_sets(analysis, analysis.blocks[0], [0.0, 10.0, HIGH, HIGH])]
    sizes = [analysis.graph.storage_bytes(values) for values in found]
    assert found[0] == {made[1], made[2]} and found[-1] == set()
    assert len(found) == len(set(found)) and sizes == sorted(sizes, reverse=True)
    assert {made[0]} in found


def test_what_follows_cheaply_between_two_blocks_need_not_be_kept():
    """The 4 bytes between them follow in one second from the 8 that the first block keeps; the input does not."""
    analysis = chain([Layer(inner=8, outer=4)] * 2)
    first, second = analysis.blocks
    border = second.live_in[0]
    alone = frozenset({*first.demanded, *second.demanded})
    assert border in alone
    assert kept_as_one(analysis, [first, second], alone, 3.9) == alone - {border}
    assert kept_as_one(analysis, [first, second], alone, 4.1) == alone


def test_what_only_an_expensive_operation_gives_stays_kept():
    analysis = chain([Layer(inner=8, outer=4)] * 2)
    alone = frozenset({analysis.blocks[1].live_in[0]})  # without the 8 bytes in front of it
    assert kept_as_one(analysis, analysis.blocks, alone, 0) == alone


class Masked(nn.Module):
    """Two products with dropouts behind them, whose masks are all that can be kept as bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.nn.functional.dropout(layer(x), 0.5)
        return x.sum()


def test_bits_have_to_be_worth_their_time(fresh_compiler: None):
    """A mask of 4096 bytes: 3584 are saved for packing and unpacking it."""
    planner = fake_session(lambda: (Masked(), (torch.randn(512, 8),)), Options(lowering="eager"), "cpu").planner
    assert planner is not None
    analysis = planner.analysis
    mask = next(iter(analysis.packs))
    pack = analysis.packs[mask]
    worth = 3584 / (pack.encode.seconds + pack.decode.seconds)
    assert not_packed(analysis, [mask], 0.99 * worth) == frozenset()
    assert not_packed(analysis, [mask], 1.01 * worth) == {mask}
