"""Residual blocks whose branch contracts, end to end: recovered where it does, left alone where it does not."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile import backend, moonwalk_compile
from moonwalk_compile.measure import gradient_error, gradients
from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.inverse import inverse_edges
from moonwalk_compile.testing import capture_joint

pytestmark = pytest.mark.usefixtures("fresh_compiler")

WIDTH = 32


class Residual(nn.Module):
    """x + F(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Folding(nn.Module):
    """x - 2 tanh(3 W x) takes some values three times, and the iteration converges to one that may be the wrong one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(3 * nn.init.orthogonal_(torch.empty(WIDTH, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return x - 2 * torch.tanh(x @ self.weight) @ self.weight.t() / 3


def dense(lipschitz: float) -> nn.Module:
    first, second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
    for layer in (first, second):
        nn.init.orthogonal_(layer.weight)
    second.weight.data *= lipschitz
    return Residual(first, nn.LeakyReLU(0.2), second)


def imaged(lipschitz: float) -> nn.Module:
    """A convolution's norm is at most the sum of those of its taps: here one orthogonal matrix at each of nine."""
    first, second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
    for layer in (first, second):
        layer.weight.data = torch.stack([nn.init.orthogonal_(torch.empty(4, 4)) for _ in range(9)], -1).view(4, 4, 3, 3)
        layer.weight.data /= 9
    second.weight.data *= lipschitz
    return Residual(first, nn.LeakyReLU(0.2), second)


def normalized(lipschitz: float) -> nn.Module:
    """Its power iteration writes to buffers in every forward pass."""
    parametrize = torch.nn.utils.parametrizations.spectral_norm
    first, second = parametrize(nn.Linear(WIDTH, WIDTH)), parametrize(nn.Linear(WIDTH, WIDTH))
    return Residual(first, nn.LeakyReLU(0.2), second, Scaled(lipschitz))


class Scaled(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x


NETS: dict[str, tuple[Callable[[float], nn.Module], tuple[int, ...]]] = {
    "dense": (dense, (256, WIDTH)),
    "images": (imaged, (64, 4, 16, 16)),
    "spectral norm": (normalized, (256, WIDTH)),
}


def trained(block: Callable[[], nn.Module], shape: tuple[int, ...], strategy: str) -> tuple[float, set[str]]:
    """The gradients' error over two steps, and what the plan does."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(block() for _ in range(12))), torch.randn(shape)
    ours = moonwalk_compile(copy.deepcopy(model), strategies=(strategy, "keep"), lowering="eager", max_slowdown=1000)
    errors = []
    for _ in range(2):
        for net in (model, ours):
            net.zero_grad()
            (net(x) - 1).square().sum().backward()
        errors.append(gradient_error(gradients(ours), gradients(model)))
    assert ours.plan is not None
    return max(errors), {segment.strategy for segment in ours.plan.segments}


QUICK = {("images", 0.6, "invert"), ("spectral norm", 0.6, "moonwalk")}


def cases() -> Iterator[Any]:
    """Every net under both strategies; of the larger ones two are quick tests."""
    for case in itertools.product(NETS, (0.3, 0.6), ("invert", "moonwalk")):
        yield pytest.param(*case, marks=() if case[0] == "dense" or case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("name", "lipschitz", "strategy"), list(cases()))
def test_contractions_are_recovered(name: str, lipschitz: float, strategy: str) -> None:
    make, shape = NETS[name]
    error, used = trained(lambda: make(lipschitz), shape, strategy)
    assert strategy in used and error < 3e-5, (used, error)


@pytest.mark.parametrize("bandwidth", [7e9, pytest.param(3e10, marks=pytest.mark.slow)])
def test_the_branch_of_a_contraction_is_not_solved_for(bandwidth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster: the way through its weights' inverses is badly conditioned, and no border shows it."""
    device = replace(DEVICES["cpu"], bandwidth=bandwidth)
    monkeypatch.setattr(backend, "find_device", lambda name: device)
    error, used = trained(lambda: normalized(0.3), (256, WIDTH), "moonwalk")
    assert "moonwalk" in used and error < 3e-5, (used, error)


@pytest.mark.parametrize("strategy", ["invert", "moonwalk"])
def test_what_expands_is_left_alone(strategy: str) -> None:
    error, used = trained(lambda: dense(1.5), (256, WIDTH), strategy)
    assert used == {"keep"} and error < 1e-6, (used, error)


def test_another_argument_of_the_same_value_is_noticed() -> None:
    error, used = trained(Folding, (256, WIDTH), "invert")
    assert used == {"keep"} and error < 1e-6, (used, error)


@pytest.mark.parametrize(
    "branch",
    [
        lambda x, w: torch.nn.functional.layer_norm(x @ w, w.shape[:1]),
        lambda x, w: torch.softmax(x @ w, -1),
        lambda x, w: (x @ w) * (x * x).mean(-1, keepdim=True).add(1).rsqrt(),
        lambda x, w: torch.nn.functional.dropout(x @ w, 0.5),
    ],
)
def test_branches_that_are_not_asked(branch: Callable[[Tensor, Tensor], Tensor]) -> None:
    capture = capture_joint(lambda x, w: x + branch(x, w), [torch.randn(4, 8), torch.randn(8, 8)])
    edges = inverse_edges(capture, DEVICES["cpu"])
    assert not any(edge.label == "inverse of a contraction" and edge.stage == "forward" for edge in edges)
