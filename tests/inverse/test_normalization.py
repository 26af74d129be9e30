"""Normalizations: the operations that only other devices run, what half precision costs, and whole models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
