"""Plans of fewer segments, where they are hardly slower."""

from __future__ import annotations

import math

import pytest
import torch

from examples import reversible
from moonwalk_compile.api import fake_session
from moonwalk_compile.options import Options
from moonwalk_compile.passes.plan import HARDLY, Planner
from moonwalk_compile.passes.planned import Planned


@pytest.fixture
def planner(fresh_compiler: None) -> Planner:
    def build() -> object:
        torch.manual_seed(0)
        return reversible.build(blocks=8, half=64, batch=8, tokens=128)

    found = fake_session(build, Options(lowering="eager"), "cpu").planner
    assert found is not None
    return found


def ragged(planner: Planner) -> Planned:
    """A chain that stops before the end, with a checkpoint for each block behind it."""
    blocks = len(planner.analysis.blocks)
    chain = planner.maker.chains.longest("invert", blocks - 3)
    assert chain is not None
    front = [planner.maker.checkpoints.segment(0, chain.first - 1)]
    return planner.arranged(
        [*front, chain, *(planner.maker.checkpoints.segment(i, i) for i in (blocks - 2, blocks - 1))]
    )


def test_a_chain_is_grown_over_the_odd_segments_at_its_ends(planner: Planner) -> None:
    planned = ragged(planner)
    tidy = planner.tidied(planned, planned.peak, math.inf)
    assert len(tidy.segments) < len(planned.segments) == 4
    assert tidy.peak <= planned.peak and tidy.seconds <= (1 + HARDLY) * planned.seconds
    spans = [index for segment in tidy.segments for index in segment.span]
    assert spans == list(range(len(planner.analysis.blocks)))


@pytest.mark.parametrize("bound", ["peak", "seconds"])
def test_no_bound_is_broken_for_it(planner: Planner, bound: str) -> None:
    planned = ragged(planner)
    limits = {"peak": planned.peak, "seconds": planned.seconds} | {bound: 0}
    assert planner.tidied(planned, **limits) is planned


def test_a_plan_without_chains_stays(planner: Planner) -> None:
    assert planner.tidied(planner.plain, math.inf, math.inf) is planner.plain


def test_no_strategy_is_used_that_is_not_allowed(planner: Planner) -> None:
    planned = ragged(planner)
    planner.maker.strategies = ("invert", "keep")  # all that could be grown here has a checkpoint beside the chain
    assert planner.tidied(planned, math.inf, math.inf) is planned
