"""What long checkpoints cost is told from shorter ones: the same as when each is simulated, and fewer are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile.api import fake_session
from moonwalk_compile.options import Options
from moonwalk_compile.passes.costs import segment_cost, with_passing
from moonwalk_compile.passes.moves import MoveMaker, are_close


class Uneven(nn.Module):
    """Layers of different widths (no two blocks are alike), half of them with skips to the other half."""

    def __init__(self, layers: int, skips: bool) -> None:
        super().__init__()
        widths = [16 + 4 * (min(i, layers - i) if skips else i) for i in range(layers + 1)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        left, half = [], len(self.layers) // 2
        for place, layer in enumerate(self.layers):
            left += [x] if place < half else []
            x = torch.tanh(layer(x))
            if self.skips and place >= half and left:
                x = x + left.pop()
        return x.square().mean()


def maker_of(skips: bool) -> MoveMaker:
    def build() -> object:
        return Uneven(24, skips), (torch.randn(64, 16),)

    options = Options(lowering="eager", strategies=("keep", "checkpoint"))
    planner = fake_session(build, options, "cpu").planner
    assert planner is not None
    return planner.maker


@pytest.mark.parametrize("skips", [False, True], ids=["chain", "skips"])
def test_told_costs_are_those_simulated(fresh_compiler: None, skips: bool) -> None:
    maker = maker_of(skips)
    spans = [
        (first, last) for last in range(len(maker.keys)) for first in range(max(0, last - maker.longest + 1), last)
    ]
    for first, last in spans:
        segment = maker.checkpoint(first, last)
        simulated = segment_cost(maker.facts, segment)
        move = maker._checkpoint_move(first, last)
        assert simulated is not None and move is not None
        assert are_close(move.cost, with_passing(maker.facts, segment, simulated)), (first, last)
    assert len(maker.foretold) > len(spans) / 4


def test_few_checkpoints_of_a_chain_are_simulated(fresh_compiler: None) -> None:
    maker = maker_of(skips=False)
    assert len(set(maker.keys)) > 20  # the blocks are not alike
    for last in range(len(maker.keys)):
        maker._checkpoint_moves(last)
    simulated = sum(name == "checkpoint" for name, _ in maker.costs)
    assert simulated < len(maker.checkpoints) / 2
