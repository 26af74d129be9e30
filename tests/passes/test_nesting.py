"""Checkpoints within checkpoints: the recursion's figures against the simulation of what is emitted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonwalk_compile.passes.costs import segment_cost
from moonwalk_compile.passes.emit import Segment
from moonwalk_compile.passes.plan import Planner
from moonwalk_compile.passes.solutions import Facts
from moonwalk_compile.passes.verify import verify

from .hand import Layer, chain

some = settings(max_examples=20, deadline=None, derandomize=True)
exact = ("keep", "checkpoint")
layers = st.builds(Layer, st.integers(30, 60), st.integers(1, 30), st.integers(1, 20))


def planner_of(drawn: list[Layer]) -> Planner:
    return Planner(Facts(chain(drawn)), exact)


def without_nesting(planner: Planner) -> Planner:
    planner.moves = [[move for move in moves if not move.pieces] for moves in planner.moves]
    planner.tables = [planner._table(last, moves) for last, moves in enumerate(planner.moves)]
    planner.answers.clear()
    return planner


def depth(segment: Segment) -> int:
    return 1 + max((depth(inner) for inner in segment.inner), default=0)


@some
@given(st.lists(layers, min_size=2, max_size=8))
def test_nested_checkpoints_cost_what_the_recursion_says(drawn: list[Layer]) -> None:
    planner = planner_of(drawn)
    nested = [move for moves in planner.moves for move in moves if move.pieces]
    for move in nested:
        simulated = segment_cost(planner.facts, planner.maker.segment(move))
        assert simulated is not None
        assert (simulated.own, simulated.border_in) == (move.cost.own, move.cost.border_in)
        assert simulated.seconds == pytest.approx(move.cost.seconds)
        assert simulated.backward_peak <= move.cost.backward_peak * 1.001


@some
@given(st.lists(layers, min_size=4, max_size=12))
def test_nested_plans_are_complete_and_in_order(drawn: list[Layer]) -> None:
    planner = planner_of(drawn)
    planned = planner.smallest()
    verify(planner.analysis, planned.schedule)
    assert planned.peak <= without_nesting(planner).smallest().peak
    for segment in planned.segments:
        if segment.inner:
            assert [i for inner in segment.inner for i in inner.span] == list(segment.span)


def test_the_smallest_peak_of_a_deep_chain_grows_slower_than_without_nesting():
    """Borders of 30 bytes: one level of checkpoints keeps about sqrt(2n) of them, two levels about the cube root."""
    planner = planner_of([Layer(inner=40, outer=30)] * 120)
    nested = planner.smallest()
    assert max(depth(segment) for segment in nested.segments) >= 2
    assert nested.peak < 0.8 * without_nesting(planner).smallest().peak
