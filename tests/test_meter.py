"""What the first steps hold is measured, and a budget that they broke is met by a second plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile import BudgetError, meter, moonwalk_compile
from moonwalk_compile.measure import measure_step
from moonwalk_compile.passes import sizes
from moonwalk_compile.passes.workspace import watched

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MIB = 2**20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Eight blocks behind an operation of the user's own; returns its loss."""

    def __init__(self, secret: bool) -> None:
        super().__init__()
        self.blocks, self.secret = nn.ModuleList(Block(64) for _ in range(8)), secret

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return (torch.ops.moonwalk_tests.secretive(x) if self.secret else x).square().mean()


class Secret:
    """An operation that comes to hold `bytes` within its call only after the planner has tried it.

    Trials are remembered by shape: each test has sizes of its own.
    """

    bytes, tries = 0, 2


@pytest.fixture(scope="module", autouse=True)
def operation() -> Iterator[None]:
    library = torch.library.Library("moonwalk_tests", "DEF")
    library.define("secretive(Tensor x) -> Tensor")

    def run(x: Tensor) -> Tensor:
        Secret.tries -= 1
        held = torch.empty(Secret.bytes if Secret.tries < 0 else 0, dtype=torch.uint8)
        return x.clone() if len(held) >= 0 else x

    library.impl("secretive", run, "CompositeExplicitAutograd")
    torch.library.register_fake("moonwalk_tests::secretive", torch.empty_like, lib=library)
    torch.library.register_autograd("moonwalk_tests::secretive", lambda context, h: h, lib=library)
    yield
    library._destroy()


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(x).backward()


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_the_plan_knows_its_measured_peak(lowering: str) -> None:
    torch.manual_seed(0)
    model, x = moonwalk_compile(Net(False), budget="60%", lowering=lowering), torch.randn(1024, 64)
    step(model, x)
    assert model.plan.measured_peak_bytes is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, x)
    assert model.plan.measured_peak_bytes == pytest.approx(model.plan.peak_bytes, rel=0.01)
    model.zero_grad(set_to_none=True)
    assert model.plan.measured_peak_bytes == pytest.approx(measure_step(lambda: step(model, x)).peak_bytes, rel=0.01)
    assert "in the first steps" in str(model.plan) and '"measured_peak_bytes"' in model.plan.to_json()


class Normalised(nn.Module):
    """Its loss is outside; its input dies with the step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Tanh())))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return y, y[:5] * 2


@pytest.mark.parametrize("expanded", [False, True])
def test_a_loss_outside_the_model_and_inputs_that_die(expanded: bool, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = moonwalk_compile(Normalised(), strategies=("keep", "checkpoint"), lowering="eager")
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        y, part = model(torch.randn(128, 32))
        loss = y.sum() + part.sum() if expanded else y.square().mean() + part.square().mean()
        loss.backward()
        del y, part, loss
    assert model.plan.measured_peak_bytes == pytest.approx(model.plan.peak_bytes, rel=0.02)
    assert "CPUAllocator" not in capfd.readouterr().err


def over_budget(secret: int, budget: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A model whose first two steps have held more than its budget."""
    torch.manual_seed(0)
    Secret.bytes, Secret.tries = secret, 2
    model, x = moonwalk_compile(Net(True), budget=budget, lowering="eager"), torch.randn(batch, 64)
    step(model, x)
    step(model, x)
    return model, x


def test_a_broken_budget_is_planned_for_again_once() -> None:
    model, x = over_budget(2 * MIB, "75%", 1024)
    first = model.plan
    assert first.measured_peak_bytes > first.budget_bytes >= first.peak_bytes
    with pytest.warns(UserWarning, match="planning again"):
        step(model, x)
    assert model.plan.peak_bytes < first.peak_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, x)
    assert model.plan.measured_peak_bytes <= model.plan.budget_bytes == first.budget_bytes
    model.zero_grad(set_to_none=True)
    assert measure_step(lambda: step(model, x)).peak_bytes <= first.budget_bytes


def test_a_retained_graph_is_not_held_against_the_budget() -> None:
    """The user asked for its values to stay; the first steps that free them are measured."""
    model, x = moonwalk_compile(Net(False), budget="60%", lowering="eager"), torch.randn(256, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(x).backward(retain_graph=True)
        assert model.plan.measured_peak_bytes is None
        for _ in range(3):
            step(model, x)
    assert model.plan.measured_peak_bytes <= model.plan.budget_bytes


def test_a_budget_that_turns_out_to_be_out_of_reach() -> None:
    model, x = over_budget(64 * MIB, "60%", 512)
    with pytest.warns(UserWarning, match="planning again"), pytest.raises(BudgetError) as found:
        step(model, x)
    assert found.value.smallest_peak_bytes > 64 * MIB


def test_what_an_allocator_may_waste_is_left_free_where_a_plan_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; here it is a tenth."""
    monkeypatch.setattr(sizes, "_leaves", lambda places: True)
    monkeypatch.setattr(sizes, "LEFT", 1 / 9)
    torch.manual_seed(0)
    x = torch.randn(1024, 64)
    with pytest.raises(BudgetError) as refused:
        moonwalk_compile(Net(False), budget=1, lowering="eager")(x)
    promised = refused.value.smallest_peak_bytes
    for budget, part in ((2 * promised, 0.9), (promised, 0.901), (int(0.95 * promised), 1.0)):
        model = moonwalk_compile(Net(False), budget=budget, lowering="eager")
        model(x)
        assert model.plan.peak_bytes <= part * budget


def test_a_budget_missed_by_a_hair_at_the_smallest_peak_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocators may leave a little more than what is asked for, as CUDA's does."""
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    with pytest.raises(BudgetError) as refused:
        moonwalk_compile(Net(False), budget=1, lowering="eager")(x)
    smallest = refused.value.smallest_peak_bytes

    def rounded(run: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
        result, peak, left = watched(run, device)
        return result, peak + smallest // 200, left

    monkeypatch.setattr(meter, "watched", rounded)
    model = moonwalk_compile(Net(False), budget=smallest, lowering="eager")
    step(model, x)
    step(model, x)
    with pytest.warns(UserWarning) as caught:
        step(model, x)
    assert ["planning again" in str(warning.message) for warning in caught] == [True, False]
    assert "goes on, slightly above the budget" in str(caught[1].message)
    step(model, x)
    assert smallest < model.plan.measured_peak_bytes < 1.01 * smallest


def test_where_the_users_profiler_runs_nothing_is_measured() -> None:
    model, x = moonwalk_compile(Net(False), lowering="eager"), torch.randn(64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        for _ in range(3):
            step(model, x)
    assert model.plan.measured_peak_bytes is None
