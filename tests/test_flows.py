"""The flows of `benchmarks/flows.py`, small: the same gradients, and their steps can be inverted."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.measure import compare_steps

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from flows_cases import CASES

INVERTIBLE = [name for name in CASES if "spline" not in name]


class Permuted(nn.Module):
    """A coupling behind a permutation that is a buffer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("permutation", torch.randperm(features))
        half = features // 2
        self.net = nn.Sequential(nn.Linear(half, 8 * features), nn.GELU(), nn.Linear(8 * features, half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x[:, self.permutation].chunk(2, 1)
        return torch.cat([a, b + self.net(a)], 1)


def loss(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return model(*inputs).square().mean()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_permutation_that_changes_is_noticed() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(*(Permuted(8) for _ in range(8))), torch.randn(2048, 8)
    options = {"lowering": "eager", "strategies": ("invert", "checkpoint"), "max_slowdown": 3}
    model, reference = moonwalk_compile(copy.deepcopy(base), **options), base
    assert compare_steps(model, reference, loss, [x]).gradient_error < 1e-5
    before = [(segment.strategy, segment.first, segment.last) for segment in model.plan.segments]
    assert [strategy for strategy, _, _ in before].count("invert") == 1
    for values in (torch.arange(7, -1, -1), torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])):  # the last is no permutation
        for net in (model, reference):
            net[3].permutation.copy_(values)
        assert compare_steps(model, reference, loss, [x]).gradient_error < 1e-5
    assert [(segment.strategy, segment.first, segment.last) for segment in model.plan.segments] != before


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("name", INVERTIBLE)
def test_steps_of_a_flow_are_inverted(name: str) -> None:
    case = CASES[name]
    if case.missing:
        pytest.skip(f"{case.module} is not installed")
    base, inputs = case.made("small")
    model = moonwalk_compile(copy.deepcopy(base), lowering="eager", strategies=("invert", "checkpoint"), max_slowdown=3)
    comparison = compare_steps(model, base, lambda net, x: net(x), inputs)
    assert comparison.gradient_error < 1e-4
    assert any(segment.strategy == "invert" for segment in model.plan.segments)
