"""Matrix products, solved for either factor by the pseudo-inverse of the other.

The pseudo-inverse is made in double precision and cast, and then applied as one product: a Gram matrix in single
precision would square the condition number. Nothing is read back from the device to check the rank: a deficient
matrix gives infinities, which the certificate sees. Inverting is an operator of its own: on a CPU it looks at values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.library import Library, register_fake

from .rule import Call, Recipe, Rule

NEARLY = 0.25  # of the root of the precision: how far a matrix is from orthogonal where one Newton step will do

_library = Library("moonwalk_compile", "FRAGMENT")
_library.define("inverse(Tensor matrix) -> Tensor")


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse of a square matrix (or of a batch of them), without waiting for the device.

    One Newton step from the transpose, where the excess squared, its error, is below the precision.
    """
    wide = matrix.double()
    if matrix.device.type == "cpu":
        excess = wide @ wide.mT
        excess.diagonal(dim1=-2, dim2=-1).sub_(1)
        if float(torch.linalg.vector_norm(excess)) < NEARLY * math.sqrt(torch.finfo(matrix.dtype).eps):
            return (matrix.mT @ excess.to(matrix.dtype)).neg_().add_(matrix.mT)
    return torch.linalg.inv_ex(wide, check_errors=False).inverse.to(matrix.dtype).contiguous()


_library.impl("inverse", _inverse, "CompositeExplicitAutograd")


@register_fake("moonwalk_compile::inverse")
def _inverse_fake(matrix: Tensor) -> Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


inverse = torch.ops.moonwalk_compile.inverse


def right_inverse(matrix: Tensor, orthogonal: bool = False) -> Tensor:
    """R with `matrix @ R = 1`, for a matrix of full row rank; its transpose if its rows are orthonormal."""
    if orthogonal:
        return matrix.mT
    if matrix.shape[-2] == matrix.shape[-1]:
        return inverse(matrix)
    wide = matrix.double()
    return (wide.mT @ inverse(wide @ wide.mT)).to(matrix.dtype)


def left_inverse(matrix: Tensor, orthogonal: bool = False) -> Tensor:
    """L with `L @ matrix = 1`, for a matrix of full column rank."""
    return right_inverse(matrix.mT, orthogonal).mT


def _product(call: Call, left: int, right: int, product: Callable[..., Tensor]) -> Iterator[Recipe]:
    """Recipes for `args[left]` and `args[right]`; `product(output, *reads)` recovers their product first."""
    bias = tuple(ref.slot for ref in call.args[:left])
    a, b = call.args[left].slot, call.args[right].slot
    if not all(tensor.is_floating_point() for tensor in call.tensors):
        return
    inner, columns = call.tensors[b].shape[-2:]
    rows = call.tensors[a].shape[-2]
    if 0 < inner <= columns:
        yield Recipe((a,), lambda y, b_, *rest: product(y, *rest) @ right_inverse(b_, b in call.orthogonal), (b, *bias))
    if 0 < inner <= rows:
        yield Recipe((b,), lambda y, a_, *rest: left_inverse(a_, a in call.orthogonal) @ product(y, *rest), (a, *bias))


def mm(call: Call) -> Iterator[Recipe]:
    """y = a b (also batched): a = y b^+ if b has full row rank, b = a^+ y if a has full column rank."""
    yield from _product(call, 0, 1, lambda y: y)


def addmm(call: Call) -> Iterator[Recipe]:
    """y = bias + a b."""
    if call.kwargs.get("beta", 1) == 1 and call.kwargs.get("alpha", 1) == 1:
        yield from _product(call, 1, 2, lambda y, bias: y - bias)


RULES: dict[str, Rule] = {"mm": mm, "bmm": mm, "addmm": addmm}
