"""The garbage collector waits while a step is planned, and goes on afterwards as it was."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile.api import fake_session
from moonwalk_compile.errors import BudgetError
from moonwalk_compile.options import Budget, Options
from moonwalk_compile.passes.plan import Planner
from moonwalk_compile.pause import collector_back, collector_paused


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def plan(budget: int) -> None:
    fake_session(lambda: (Net(), (torch.randn(4, 8),)), Options(budget=Budget(bytes=budget), lowering="eager"), "cpu")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_waits_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    seen: list[bool] = []
    smallest = Planner.smallest

    def asked(planner: Planner) -> object:
        seen.append(gc.isenabled())
        return smallest(planner)

    monkeypatch.setattr(Planner, "smallest", asked)
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(BudgetError):
            plan(1)
        assert seen == [False]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_code_is_generated_with_the_collector_where_the_user_has_it(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with collector_paused():
            with collector_back():
                assert gc.isenabled() is enabled
            assert not gc.isenabled()
        with collector_back():
            assert gc.isenabled() is enabled
    finally:
        gc.enable()
