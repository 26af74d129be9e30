"""Convolutions whose kernel is as large as their stride: one matrix per patch, and no patch meets another.

Without padding, dilation and groups, the convolution is *gathering* (C_in k^2 elements of a patch become C_out) and
its transpose *scattering*. A gathering one is solved by scattering with the pseudo-inverse, and the other way round.
Its input gradient is the opposite kind. Other convolutions are refused here: even a square 3x3 one has singular values
of 1e-4, too few digits to solve with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..graph import Ref
from .linear import left_inverse, right_inverse
from .rule import Call, Recipe, Rule

Solver = Callable[[Tensor, Tensor], Tensor]


def _apply(x: Tensor, weight: Tensor, stride: list[int], transposed: bool) -> Tensor:
    """The convolution by `weight`, or its transpose, without padding and bias."""
    zero = [0] * len(stride)
    return torch.ops.aten.convolution(x, weight, None, stride, zero, [1] * len(stride), transposed, zero, 1)


def solve_gathering(y: Tensor, weight: Tensor) -> Tensor:
    """x from y = W patch(x): `weight` (C_out, C_in, k..) has full column rank as a C_out x C_in k^2 matrix."""
    solved = left_inverse(weight.flatten(1)).mT  # C_out x C_in k^2, the layout of a transposed convolution
    return _apply(y, solved.reshape(weight.shape), list(weight.shape[2:]), transposed=True)


def solve_scattering(y: Tensor, weight: Tensor, stride: list[int]) -> Tensor:
    """x from y = unpatch(W^T x): `weight` (C, C', k..) has full row rank as a C x C' k^2 matrix."""
    solved = right_inverse(weight.flatten(1)).mT
    return _apply(y, solved.reshape(weight.shape), stride, transposed=False)


def _solver(patches: Tensor, weight: Tensor, stride: list[int], scattering: bool) -> Solver | None:
    """The way to solve for a convolution's argument, if shapes allow; `patches` is the tensor on the larger side.

    Gathering from a stride larger than the kernel, or from an image that is no multiple of it, skips elements.
    """
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    kernel = list(weight.shape[2:])
    if scattering:
        return (lambda y, w: solve_scattering(y, w, stride)) if 0 < rows <= columns else None
    whole = stride == kernel and all(size % k == 0 for size, k in zip(patches.shape[2:], kernel, strict=True))
    return solve_gathering if 0 < columns <= rows and whole else None


def _is_patchwise(call: Call, weight: Tensor, first: int) -> bool:
    """Whether no two patches meet; the geometry (stride, padding, ...) stands from `args[first]` on."""
    stride, padding, dilation, _, output_padding, groups = call.args[first : first + 6]
    kernel = list(weight.shape[2:])
    if len(stride) != len(kernel) or any(padding) or any(output_padding) or groups != 1:
        return False
    return all(s >= k and (d == 1 or k == 1) for s, k, d in zip(stride, kernel, dilation, strict=True))


def convolution(call: Call) -> Iterator[Recipe]:
    """y = conv(x, weight) + bias: x from y."""
    x, weight, bias, stride, *_ = call.args
    source, kernel = call.tensors[x.slot], call.tensors[weight.slot]
    if source.dim() != kernel.dim() or not _is_patchwise(call, kernel, 3):
        return
    solver = _solver(source, kernel, list(stride), scattering=call.args[6])
    if solver is None:
        return
    if isinstance(bias, Ref):
        column = [-1] + [1] * (kernel.dim() - 2)
        yield Recipe((x.slot,), lambda y, w, b: solver(y - b.view(column), w), (weight.slot, bias.slot))
    else:
        yield Recipe((x.slot,), solver, (weight.slot,))


def convolution_backward(call: Call) -> Iterator[Recipe]:
    """The output's cotangent from the input gradient, result 0."""
    h, _, weight, _, stride, *_ = call.args
    cotangent, kernel = call.tensors[h.slot], call.tensors[weight.slot]
    if cotangent.dim() != kernel.dim() or not call.args[10][0] or not _is_patchwise(call, kernel, 4):
        return
    solver = _solver(cotangent, kernel, list(stride), scattering=not call.args[7])
    if solver is not None:
        yield Recipe((h.slot,), solver, (weight.slot,), (0,))


RULES: dict[str, Rule] = {"convolution": convolution, "convolution_backward": convolution_backward}
