"""Convolutions, forward and backward, transposed or not, in any number of dimensions and groups.

A convolution is a linear map A from an image to features (`geometry`). Two questions cover all:

- h from A^T h (the vijp of a convolution, the input of a transposed one): each output, or each cluster of outputs, from
  taps that it shares with no other (`lattice`, `clusters`); where there are too few, some outputs are kept as a
  fragment (`scattered` chooses). Or by iteration.
- x from A x (the input of a convolution, the vijp of a transposed one): one matrix per patch where patches tile the
  image; or by iteration where there are clearly more features than image elements.

Images that another operation pads or crops are solved together with that (`padded`).

Refused: the input of a square overlapping convolution (singular values of 1e-4). Of these, triangular ones (causal, or
known to be masked) are solved by substitution (`triangular`), circular ones by Fourier transform (`circular`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Ref
from .geometry import Geometry, geometry_of, left_kernel
from .iterate import iterated
from .rule import Call, Recipe, Rule
from .scattered import direct_solver, solver_with_fragment


@dataclass(frozen=True)
class Way:
    """`function(result, weight, *fragments)` solves for the argument; `take(argument)` gives the fragments."""

    function: Callable[..., Tensor]
    take: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    fragile: bool = False


def undo_scattering(geometry: Geometry, batch: int, dtype: torch.dtype, fragments: bool) -> Iterator[Way]:
    """h from A^T h."""
    solver = solver_with_fragment(geometry, batch) if fragments else direct_solver(geometry)
    if solver is not None:
        take = solver.take
        yield Way(solver.solve, (lambda h: take(h)) if solver.kept else None)
    if solver is None or solver.kept:
        yield from map(Way, iterated(geometry, batch, True, dtype))


def undo_gathering(geometry: Geometry, batch: int, dtype: torch.dtype) -> Iterator[Way]:
    """x from A x."""
    if not _tiles(geometry):
        yield from map(Way, iterated(geometry, batch, False, dtype))
    elif geometry.columns * math.prod(geometry.kernel) <= geometry.rows:
        yield Way(lambda y, weight: geometry.scatter(y, left_kernel(weight, geometry.groups)))


def _tiles(geometry: Geometry) -> bool:
    """Whether the patches tile the image with its padding, of which some may be left over at the end."""
    g = geometry
    apart = all(k == s and (d == 1 or k == 1) for k, s, d in zip(g.kernel, g.stride, g.dilation, strict=True))
    sides = zip(g.image, g.features, g.stride, g.padding, strict=True)
    return apart and all(p >= 0 and n + p <= o * s for n, o, s, p in sides)


def convolution(call: Call) -> Iterator[Recipe]:
    """y = A x + bias, or A^T x + bias: x from y."""
    x, weight, bias = call.args[:3]
    source, kernel, result = call.tensors[x.slot], call.tensors[weight.slot], call.outputs[0]
    if result is None:
        return
    transposed = call.args[6]
    image, features = (result, source) if transposed else (source, result)
    geometry = geometry_of(call.args[3:9], kernel, image, features)
    if geometry is None:
        return
    problem = (geometry, len(source), source.dtype)
    for way in undo_scattering(*problem, fragments=False) if transposed else undo_gathering(*problem):
        if isinstance(bias, Ref):
            yield Recipe((x.slot,), without_bias(way.function), (weight.slot, bias.slot))
        else:
            yield Recipe((x.slot,), way.function, (weight.slot,))


def without_bias(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def solve(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(y - bias.view([-1] + [1] * (weight.dim() - 2)), weight)

    return solve


def convolution_backward(call: Call) -> Iterator[Recipe]:
    """The output's cotangent from the input gradient, result 0."""
    h, _, weight = call.args[:3]
    cotangent, kernel, gradient = call.tensors[h.slot], call.tensors[weight.slot], call.outputs[0]
    if gradient is None:
        return
    transposed = call.args[7]
    image, features = (cotangent, gradient) if transposed else (gradient, cotangent)
    geometry = geometry_of(call.args[4:10], kernel, image, features)
    if geometry is None:
        return
    problem = (geometry, len(cotangent), cotangent.dtype)
    for way in undo_gathering(*problem) if transposed else undo_scattering(*problem, fragments=True):
        yield Recipe((h.slot,), way.function, (weight.slot,), (0,), fragment=way.take)


RULES: dict[str, Rule] = {"convolution": convolution, "convolution_backward": convolution_backward}
