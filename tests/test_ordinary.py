"""Ordinary models under a budget: gradients bitwise those of `aot_eager`, and measured peaks that hold."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from examples.ordinary import MODELS, build, loss
from moonwalk_compile import BudgetError, backend, moonwalk_compile, peers
from moonwalk_compile.api import fake_session
from moonwalk_compile.measure import compare_steps, measure_step
from moonwalk_compile.options import Options
from moonwalk_compile.passes.cost import DEVICES


def compiled(model: nn.Module, budget: int | str, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    """Under `budget`, or under the smallest that can be met where that is more."""
    try:
        return moonwalk_compile(copy.deepcopy(model), budget=budget, lowering="eager", example_inputs=inputs)
    except BudgetError as error:
        smallest = error.smallest_peak_bytes
        return moonwalk_compile(copy.deepcopy(model), budget=smallest, lowering="eager", example_inputs=inputs)


QUICK = {("gpt2", "60%"), ("vit", "1%"), ("resnet50", "1%"), ("convnext", "60%"), ("unet", "60%"), ("llama", "60%")}


def cases() -> Iterator[Any]:
    """Every model under three budgets; one of each but the LSTM is a quick test."""
    for name, part in itertools.product(MODELS, ("100%", "60%", "1%")):
        yield pytest.param(name, part, marks=() if (name, part) in QUICK else pytest.mark.slow)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "part"), list(cases()))
def test_gradients_are_exact_and_the_budget_holds(name: str, part: str) -> None:
    model, inputs = build(name, "small")
    reference = copy.deepcopy(model)
    reference.compile(backend="aot_eager")
    ours = compiled(model, part, inputs)
    comparison = compare_steps(ours, reference, loss, inputs)
    assert comparison.exact, comparison.gradient_error

    def step() -> None:
        loss(ours, *inputs).backward()

    step()
    ours.zero_grad(set_to_none=True)
    measured = measure_step(step).peak_bytes
    assert measured <= ours.plan.peak_bytes
    assert ours.plan.peak_bytes <= ours.plan.budget_bytes


@pytest.mark.usefixtures("fresh_compiler")
def test_a_plan_uses_its_budget() -> None:
    """Where skips are long, a plan needs more than the dynamic program thinks: the budget is closed in upon."""
    planner = fake_session(lambda: build("unet", "full"), Options(lowering="inductor"), "cpu").planner
    slowest = 0.0
    for part in (0.9, 0.8, 0.7, 0.6, 0.55, 0.545, 0.5):
        budget = part * planner.plain.peak
        planned = planner.within(budget)
        assert planned is not None and 0.85 * budget < planned.peak <= budget
        slowest = max(slowest, planned.seconds)
        assert planned.seconds > 0.97 * slowest


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_reaches_what_eager_reaches() -> None:
    """Compiled whole it would need 40% more: it moves operations around, and fuses what was planned apart."""
    model, inputs = build("convnext", "small")
    planner = fake_session(lambda: build("convnext", "small"), Options(lowering="inductor"), "cpu").planner
    with pytest.raises(BudgetError) as caught:
        loss(moonwalk_compile(copy.deepcopy(model), budget=1), *inputs)
    smallest = caught.value.smallest_peak_bytes
    assert smallest <= 1.05 * planner.smallest().peak
    ours = moonwalk_compile(copy.deepcopy(model), budget=int(1.02 * smallest))
    assert compare_steps(ours, model, loss, inputs).gradient_error < 1e-5
    measured = measure_step(lambda: loss(ours, *inputs).backward()).peak_bytes
    assert measured <= ours.plan.peak_bytes <= ours.plan.budget_bytes


class Dropped(nn.Module):
    """A ninth of what plain keeps are masks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.1)
        return x.square().mean()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_loose_budget_keeps_masks_as_plain_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is worth computing again, and few bits are cheap, on whatever machine this runs.
    slow = replace(DEVICES["cpu"], flops=1e9, bandwidth=1e9, bits=0.0, datasheet=False)
    monkeypatch.setattr(backend, "find_device", lambda name: slow)
    model, inputs = Dropped(), (torch.randn(512, 64),)
    plain = peers.plain(model, "eager")
    loose, tight = (compiled(model, budget, inputs) for budget in ("100%", "94%"))
    peaks = []
    for trained in (plain, loose, tight):
        trained(*inputs).backward()
        trained.zero_grad(set_to_none=True)
        peaks.append(measure_step(lambda trained=trained: trained(*inputs).backward()).peak_bytes)
    assert loose.plan.plain_peak_bytes == peaks[0]
    assert peaks[0] >= peaks[1] > 1.05 * peaks[2]
    assert loose.plan.time_s <= loose.plan.plain_time_s < tight.plan.time_s
    assert {segment.reason for segment in (*loose.plan.segments, *tight.plan.segments)} == {"fits"}
    kept = [sum(segment.kept_bytes for segment in model.plan.segments) for model in (loose, tight)]
    assert kept[0] > kept[1]


@pytest.mark.usefixtures("fresh_compiler")
def test_steps_of_an_unrolled_cell_are_one_kind_of_block() -> None:
    """Though the outputs of all earlier steps pass through each of them."""
    planner = fake_session(lambda: build("lstm", "small"), Options(), "cpu").planner
    assert len(planner.maker.kinds.keys) >= 16 and len(set(planner.maker.kinds.keys)) <= 8


def dropout_stack() -> tuple[nn.Module, tuple[torch.Tensor]]:
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1)) for _ in range(8)]
    return nn.Sequential(*layers), (torch.randn(512, 64),)


@pytest.mark.usefixtures("fresh_compiler")
def test_only_as_many_masks_are_packed_as_the_budget_asks_for() -> None:
    model, inputs = dropout_stack()
    planner = fake_session(lambda: (model, inputs), Options(lowering="eager"), "cpu").planner
    packed = planner.arranged(replace(s, whole=frozenset()) for s in planner.loose.segments)
    assert packed.peak < 0.9 * planner.loose.peak
    for part in (0.9, 0.7):
        planned = planner.within(packed.peak + part * (planner.loose.peak - packed.peak))
        assert planned is not None and planner.loose.seconds < planned.seconds < packed.seconds
        whole = [bool(segment.whole) for segment in planned.segments]
        assert any(whole) and not all(whole)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_plan_with_some_masks_packed_is_right(lowering: str) -> None:
    model, inputs = dropout_stack()
    with peers.same_random_numbers(lowering):
        reference = peers.plain(model, lowering)
        ours = moonwalk_compile(copy.deepcopy(model), budget="93%", lowering=lowering, example_inputs=inputs)
        assert len({segment.kept_bytes for segment in ours.plan.segments}) > 1
        comparison = compare_steps(ours, reference, lambda net, x: net(x).square().mean(), inputs)
    assert comparison.exact or (lowering == "inductor" and comparison.gradient_error < 1e-6)
