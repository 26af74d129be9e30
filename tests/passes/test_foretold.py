"""What long checkpoints cost is told from shorter ones: the same as when each is simulated, and fewer are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile.api import fake_session
from moonwalk_compile.options import Options
from moonwalk_compile.passes.costs import segment_cost, with_passing
from moonwalk_compile.passes.moves.checkpoints import Checkpoints, are_close


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


def checkpoints_of(skips: bool) -> Checkpoints:
    def build() -> object:
        return Uneven(24, skips), (torch.randn(64, 16),)

    options = Options(lowering="eager", strategies=("keep", "checkpoint"))
    planner = fake_session(build, options, "cpu").planner
    assert planner is not None
    return planner.maker.checkpoints


@pytest.mark.parametrize("skips", [False, True], ids=["chain", "skips"])
def test_told_costs_are_those_simulated(fresh_compiler: None, skips: bool) -> None:
    checkpoints = checkpoints_of(skips)
    count, longest = len(checkpoints.kinds.keys), checkpoints.longest
    spans = [(first, last) for last in range(count) for first in range(max(0, last - longest + 1), last)]
    for first, last in spans:
        segment = checkpoints.segment(first, last)
        simulated = segment_cost(checkpoints.facts, segment)
        move = checkpoints.move(first, last)
        assert simulated is not None and move is not None
        assert are_close(move.cost, with_passing(checkpoints.facts, segment, simulated)), (first, last)
    assert len(checkpoints.foretold) > len(spans) / 4


def test_few_checkpoints_of_a_chain_are_simulated(fresh_compiler: None) -> None:
    checkpoints = checkpoints_of(skips=False)
    kinds = checkpoints.kinds
    assert len(set(kinds.keys)) > 20  # the blocks are not alike
    for last in range(len(kinds.keys)):
        list(checkpoints.moves(last))
    simulated = sum(name == "checkpoint" for name, _ in kinds.costs)
    assert simulated < len(checkpoints.found) / 2
