"""Ordinary models under a budget: gradients bitwise those of `aot_eager`, and measured peaks that hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from examples.ordinary import MODELS, build, loss
from moonwalk_compile import BudgetError, moonwalk_compile
from moonwalk_compile.api import fake_session
from moonwalk_compile.measure import compare_steps, measure_step
from moonwalk_compile.options import Options


def compiled(model: nn.Module, budget: int | str, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
    """Under `budget`, or under the smallest that can be met where that is more."""
    try:
        return moonwalk_compile(copy.deepcopy(model), budget=budget, lowering="eager", example_inputs=inputs)
    except BudgetError as error:
        smallest = error.smallest_peak_bytes
        return moonwalk_compile(copy.deepcopy(model), budget=smallest, lowering="eager", example_inputs=inputs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("part", ["100%", "60%", "1%"])
@pytest.mark.parametrize("name", MODELS)
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
def test_steps_of_an_unrolled_cell_are_one_kind_of_block() -> None:
    """Though the outputs of all earlier steps pass through each of them."""
    planner = fake_session(lambda: build("lstm", "small"), Options(), "cpu").planner
    assert len(planner.maker.keys) >= 16 and len(set(planner.maker.keys)) <= 8
