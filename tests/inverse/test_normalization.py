"""Normalizations: the operations that only other devices run, what half precision costs, and whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.passes.graph import Ref
from moonwalk_compile.passes.inverse import RULES, Call, Recipe

aten = torch.ops.aten


def only_recipe(name: str, args: tuple[object, ...], tensors: list[Tensor], outputs: tuple[Tensor, ...]) -> Recipe:
    (recipe,) = RULES[name](Call(name, args, {}, tuple(tensors), outputs))
    return recipe


def solved(recipe: Recipe, tensors: list[Tensor], outputs: tuple[Tensor, ...]) -> Tensor:
    """What the recipe gives back, its fragment taken of the true value."""
    fragments: tuple[Tensor, ...] = ()
    if recipe.fragment is not None:
        taken = [tensors[position] for position in (*recipe.solves, *recipe.fragment_reads)]
        fragments = recipe.fragment(*taken)
    given = [*(outputs[position] for position in recipe.outputs), *(tensors[position] for position in recipe.reads)]
    return recipe.function(*given, *fragments)


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_in_one_operation(affine: bool) -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64) + 0.5 if affine else None
    rstd = (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    y = x * rstd if weight is None else x * rstd * weight
    h = torch.randn_like(y)
    (g,) = torch.autograd.grad(y, x, h)
    x, y, rstd = x.detach(), y.detach(), rstd.detach()

    backward = [h, x, rstd, *([] if weight is None else [weight])]
    args = (Ref(0), Ref(1), [5], Ref(2), None if weight is None else Ref(3), [True, affine])
    recipe = only_recipe("_fused_rms_norm_backward", args, backward, (g,))
    torch.testing.assert_close(solved(recipe, backward, (g,)), h)

    forward = [x, *([] if weight is None else [weight])]
    args = (Ref(0), [5], None if weight is None else Ref(1), 1e-3)
    recipe = only_recipe("_fused_rms_norm", args, forward, (y, rstd))
    torch.testing.assert_close(solved(recipe, forward, (y, rstd)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_its_rounding(dtype: torch.dtype) -> None:
    x, weight = 3 + torch.randn(64, 257), torch.rand(257) + 0.5
    tensors = [torch.randn(64, 257), x, x.mean(1, True), x.var(1, keepdim=True, correction=0).rsqrt(), weight]
    tensors = [tensor.to(dtype) for tensor in tensors]
    args = (Ref(0), Ref(1), [257], Ref(2), Ref(3), Ref(4), None, [True, True, False])
    h, x, mean, rstd, weight = (tensor.double() for tensor in tensors)
    u, z = h * weight, (x - mean) * rstd
    g = (rstd * (u - u.mean(1, True) - z * (u * z).mean(1, True))).to(dtype)
    recipe = only_recipe("native_layer_norm_backward", args, tensors, (g,))
    found = solved(recipe, tensors, (g,))
    assert found.dtype == dtype
    assert (found - h).norm() / h.norm() < 2 * torch.finfo(dtype).eps


# -- whole models ----------------------------------------------------------------------------------------------------

WIDTH = 32


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SpelledOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.9, 1.1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "group_norm": lambda: nn.GroupNorm(2, WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "spelled out": SpelledOut,
    "normalize": lambda: Apply(lambda x: F.normalize(x, dim=-1)),
}


def linear() -> nn.Module:
    module = nn.Linear(WIDTH, WIDTH)
    nn.init.orthogonal_(module.weight)
    return module


def chain(norm: Callable[[], nn.Module], between: Callable[[], nn.Module], blocks: int = 3) -> nn.Sequential:
    """Two layers to a norm: of one alone, its input is all that plain backpropagation has to keep."""
    layers = [(linear(), between(), linear(), between(), norm()) for _ in range(blocks)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def convolutions() -> nn.Sequential:
    def convolution() -> nn.Module:
        module = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        nn.init.orthogonal_(module.weight)
        return module

    blocks = [(convolution(), nn.BatchNorm2d(WIDTH), nn.LeakyReLU(0.5)) for _ in range(3)]
    return nn.Sequential(*(module for block in blocks for module in block))


def three_steps(model: nn.Module, x: Tensor, strategies: tuple[str, ...], lowering: str = "eager") -> nn.Module:
    """Train the compiled model and the model side by side: same gradients, same buffers."""
    ours = moonwalk_compile(copy.deepcopy(model), strategies=strategies, lowering=lowering, max_slowdown=3)
    target = torch.randn_like(x)  # without one, the gradient in front of a norm would be nothing but rounding
    for step in range(3):
        for module in (ours, model):
            module.zero_grad(set_to_none=True)
            (module(x + 0.1 * step) - target).square().mean().backward()
        for mine, true in zip(ours.parameters(), model.parameters(), strict=True):
            assert (mine.grad - true.grad).norm() <= 1e-4 * true.grad.norm()
    for mine, true in zip(ours.buffers(), model.buffers(), strict=True):
        exact = lowering == "eager"  # Inductor sums in another order; a second update would change the second digit
        torch.testing.assert_close(mine, true, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    return ours


def strategies_of(model: nn.Module) -> set[str]:
    return {segment.strategy for segment in model.plan.segments}


@pytest.mark.parametrize("name", NORMS)
def test_moonwalk_through_a_norm(name: str) -> None:
    torch.manual_seed(0)
    model = chain(NORMS[name], lambda: Apply(torch.abs), blocks=8)
    ours = three_steps(model, torch.randn(256, WIDTH), ("moonwalk", "keep"))
    assert "moonwalk" in strategies_of(ours)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "group_norm", "rms_norm"])
def test_a_norm_is_inverted_with_its_statistics_kept(name: str) -> None:
    torch.manual_seed(0)
    model = chain(NORMS[name], lambda: nn.LeakyReLU(0.5))
    ours = three_steps(model, torch.randn(256, WIDTH), ("invert", "keep"))
    assert "invert" in strategies_of(ours)


def test_convolutions_with_batch_norm_keep_next_to_nothing() -> None:
    torch.manual_seed(0)
    model, x = convolutions(), torch.randn(8, WIDTH, 8, 8)
    kept = three_steps(copy.deepcopy(model), x, ("keep",))
    inverted = three_steps(model, x, ("keep", "invert", "moonwalk"))
    assert "invert" in strategies_of(inverted)
    assert inverted.plan.peak_bytes < kept.plan.peak_bytes


def test_a_weight_of_zero_is_not_inverted() -> None:
    torch.manual_seed(0)
    model = convolutions()
    for module in model[1::3]:
        nn.init.zeros_(module.weight)
    ours = three_steps(model, torch.randn(8, WIDTH, 8, 8), ("keep", "invert", "moonwalk"))
    assert strategies_of(ours) == {"keep"}


@pytest.mark.slow
def test_norms_under_inductor() -> None:
    torch.manual_seed(0)
    model = chain(NORMS["layer_norm"], lambda: Apply(torch.abs), blocks=8)
    assert "moonwalk" in strategies_of(three_steps(model, torch.randn(256, WIDTH), ("moonwalk", "keep"), "inductor"))
    torch.manual_seed(0)
    model, x = convolutions(), torch.randn(8, WIDTH, 8, 8)
    assert "invert" in strategies_of(three_steps(model, x, ("invert", "keep"), "inductor"))
