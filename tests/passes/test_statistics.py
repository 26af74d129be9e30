"""Normalizations computed again with their statistics at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.measure import compare_steps
from moonwalk_compile.passes.analysis import analyse
from moonwalk_compile.passes.cost import DEVICES, base_name
from moonwalk_compile.passes.costs import backward_program
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.passes.plan import Planner
from moonwalk_compile.passes.solutions import Facts
from moonwalk_compile.testing import capture_joint, true_values

FUSING = replace(DEVICES["cpu"], fused=True)

NORMS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, [8], w, b), [(4, 6, 8), (8,), (8,)]),
    "layer_norm without weights": (lambda x: F.layer_norm(x, [6, 8]), [(4, 6, 8)]),
    "layer_norm without bias": (lambda x, w: F.layer_norm(x, [8], w), [(4, 8), (8,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(4, 8, 3, 3), (8,), (8,)]),
    "group_norm in one dimension": (lambda x: F.group_norm(x, 4), [(4, 8, 5)]),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(4, 8, 3, 3), (8,), (8,)]),
    "batch_norm of rows": (lambda x: F.batch_norm(x, None, None, training=True), [(16, 8)]),
    "batch_norm, channels last": (
        lambda x: F.batch_norm(x.to(memory_format=torch.channels_last), None, None, training=True),
        [(4, 8, 3, 3)],
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_output_follows_from_the_statistics(name: str) -> None:
    function, shapes = NORMS[name]
    torch.manual_seed(0)
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    capture = capture_joint(lambda *a: function(*a).sin(), arguments)
    truth = true_values(capture, arguments)
    assert not analyse(capture, DEVICES["cpu"]).normalized, "eager kernels compute it in another order"
    ((output, edge),) = analyse(capture, FUSING).normalized.items()
    found = run_edges([edge], {value: truth[value] for value in edge.needs})[output]
    assert found.stride() == truth[output].stride()
    assert (found - truth[output]).norm() < 1e-12 * truth[output].norm()
    assert not any("norm" in str(operation.target) for operation in edge.operations)


def test_evaluation_has_no_statistics() -> None:
    arguments = [torch.randn(4, 8), torch.zeros(8), torch.ones(8)]
    capture = capture_joint(lambda x, m, v: F.batch_norm(x, m, v).sin(), arguments, [True, False, False])
    assert not analyse(capture, FUSING).normalized


BLOCKS = {"batch_norm": lambda: nn.BatchNorm2d(8, track_running_stats=False), "group_norm": lambda: nn.GroupNorm(2, 8)}


class Residual(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        convolution = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.inner = nn.Sequential(convolution, norm(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("name", BLOCKS)
def test_checkpoints_keep_the_statistics_of_images(name: str) -> None:
    model = nn.Sequential(*(Residual(BLOCKS[name]) for _ in range(3)))
    names, weights = zip(*model.named_parameters(), strict=True)

    def step(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    analysis = analyse(capture_joint(step, [torch.randn(4, 8, 16, 16), *weights]), FUSING)
    facts = Facts(analysis)
    planner = Planner(facts, ("checkpoint", "keep"), {}, 1e-4)
    program = backward_program(facts, planner.maker.checkpoints.segment(0, len(analysis.blocks) - 1))
    again = {base_name(instruction.operation.target) for instruction in program.instructions}
    assert "convolution" in again and not {f"native_{name}", "_native_batch_norm_legit"} & again


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "batch_norm" else pytest.mark.slow) for name in BLOCKS]
)
def test_gradients_and_buffers_are_eager_pytorchs(name: str, fresh_compiler: None) -> None:
    torch.manual_seed(0)
    norms = {**BLOCKS, "batch_norm": lambda: nn.BatchNorm2d(8)}
    model, x = nn.Sequential(*(Residual(norms[name]) for _ in range(6))), torch.randn(4, 8, 16, 16)
    ours = moonwalk_compile(copy.deepcopy(model), budget="60%")
    for _ in range(2):
        comparison = compare_steps(ours, model, lambda net, x: net(x).square().mean(), [x])
        assert comparison.gradient_error < 1e-5
    for mine, true in zip(ours.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-6)
