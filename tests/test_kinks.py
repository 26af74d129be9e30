"""Inversion brings values back with a little noise: it must not decide anew what was decided in the forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.measure import gradient_error, gradients
from moonwalk_compile.passes.analysis import analyse
from moonwalk_compile.passes.blocks import demanded
from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.passes.solutions import block_inversion
from moonwalk_compile.testing import capture_joint, true_values

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NOISE = 1e-4

BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "relu6": lambda x: 6 * F.relu6(x),
    "hardswish": F.hardswish,
    "selu": F.selu,
    "softshrink": lambda x: 4 * F.softshrink(x),
    "prelu": lambda x: F.prelu(x, x.new_full((1,), 0.1)),
    "abs": torch.abs,
    "where": lambda x: torch.where(x > 0, x, -2 * x),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "max": lambda x: x.unflatten(-1, (-1, 2)).max(-1, keepdim=True).values.expand(-1, -1, 2).flatten(1),
    "max_pool": lambda x: F.max_pool1d(x, 3, 1, 1),
    "sort": lambda x: x.unflatten(-1, (-1, 4)).sort(-1).values.flatten(1),
}


def couplings(branch: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for first, second in zip(weights[::2], weights[1::2], strict=True):
            a, b = b, a + branch(b @ first) @ second
        return torch.cat([a, b], -1)

    return function


@pytest.mark.parametrize("name", BRANCHES)
def test_noise_moves_gradients_by_no_more_than_itself(name: str):
    """A noise of e that took the other side of kinks would make the gradients wrong by the root of e."""
    torch.manual_seed(0)
    arguments = [torch.randn(4096, 32, dtype=torch.float64)]
    arguments += [torch.randn(16, 16, dtype=torch.float64) / 4 for _ in range(8)]
    capture = capture_joint(couplings(BRANCHES[name]), arguments)
    values = true_values(capture, arguments)
    graph = capture.graph
    truth = run_edges(graph.edges, {v: values[v] for v in (*graph.primals, *graph.tangents)})
    analysis = analyse(capture, DEVICES["cpu"])
    tried = 0
    for block in analysis.blocks:
        inversion = block_inversion(analysis, block)
        if inversion.missing or not inversion.sides:
            continue
        packs = [*analysis.packs.values(), *analysis.signs[block.index]]
        kept = run_edges([pack.encode for pack in packs if pack.kept in inversion.residuals], truth)
        given = {*block.cotangents_in, *graph.static, *inversion.residuals}
        start = {value: kept[value] for value in given} | {v: noisy(truth[v]) for v in block.live_out}
        wanted = (*block.live_in, *demanded(analysis.graph, inversion.backward))
        found = start
        for edge in (*inversion.solution.program(wanted), *inversion.backward):
            reached = run_edges([edge], found)
            found = {v: found[v] if v in inversion.sides and v in found else reached[v] for v in reached}
        for value in (*block.cotangents_out, *block.gradients):
            tried += 1
            assert (found[value] - truth[value]).norm() < 20 * NOISE * truth[value].norm()
    assert tried


def noisy(tensor: Tensor) -> Tensor:
    return tensor + NOISE * tensor.std() * torch.randn_like(tensor)


def inverted_error(model: nn.Module, *shape: int) -> float:
    x = torch.randn(shape)
    ours = moonwalk_compile(
        copy.deepcopy(model), strategies=("invert", "checkpoint", "keep"), max_slowdown=3, lowering="eager"
    )
    for each in (model, ours):
        each(x).square().mean().backward()
    assert "invert" in {segment.strategy for segment in ours.plan.segments}
    return gradient_error(gradients(ours), gradients(model))


class Coupling(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        b = b + self.first(a)
        a = a + self.second(b)
        return torch.cat([a, b], -1)


def test_a_chain_begins_with_every_part_of_a_storage_that_its_neighbour_keeps():
    """The last block's two outputs are views of one storage, and the next block reads one of them."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), *(Coupling(32) for _ in range(12)), nn.Linear(64, 8))
    assert inverted_error(model, 512, 64) < 1e-5


class Folded(nn.Module):
    """A linear layer, orthogonal or not far from it, and a map that folds."""

    def __init__(self, width: int, fold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.fold = nn.Linear(width, width, bias=False), fold
        nn.init.orthogonal_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fold(self.linear(x))


def maxmin(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)


FOLDS = {"abs": torch.abs, "maxmin": maxmin, "sort": lambda x: x.unflatten(-1, (-1, 2)).sort(-1).values.flatten(1)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "sort" else ()) for name in FOLDS]
)
def test_folds_are_inverted_with_their_sides_kept(name: str):
    torch.manual_seed(0)
    model = nn.Sequential(*(Folded(32, FOLDS[name]) for _ in range(24)), nn.Linear(32, 8))
    assert inverted_error(model, 2048, 32) < 1e-5


def test_the_gradient_of_abs_at_exact_zeros_stays_zero():
    """Samples of zeros, of which every layer gives zeros: kept as one bit, their sign would be -1."""

    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(Folded(32, torch.abs) for _ in range(24)))
            self.shift = nn.Parameter(torch.ones(32))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x * self.shift).exp()

    torch.manual_seed(0)
    model, x = Weighed(), torch.randn(2048, 32)
    x[::2] = 0
    ours = moonwalk_compile(
        copy.deepcopy(model), strategies=("invert", "checkpoint"), max_slowdown=3, lowering="eager", example_inputs=(x,)
    )
    assert "invert" in {segment.strategy for segment in ours.plan.segments}
    found = []
    for each in (model, ours):
        y = x.clone().requires_grad_()
        each(y).sum().backward()
        found.append(y.grad)
    assert torch.count_nonzero(found[0][::2]) == 0
    assert torch.allclose(found[1], found[0], rtol=0, atol=1e-4)
