"""Circular convolutions that keep the size of the image: one small matrix per frequency, inverted in double precision.

How well that can be done only values say: near some frequency a random kernel nearly vanishes (of C -> C, the largest
singular value is some 150 times the smallest), an orthogonal one does not. One operator holds it, as neither planner
nor generated code need see complex numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils.flop_counter import register_flop_formula

from .geometry import Geometry

_library = Library("moonwalk_compile", "FRAGMENT")
_library.define(
    "solve_circular(Tensor result, Tensor weight, int[] padding, int[] dilation, int groups, bool scattered) -> Tensor"
)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def _solve(
    result: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int], groups: int, scattered: bool
) -> Tensor:
    """The argument of a circular convolution or (`scattered`) of its transpose, from the `result`."""
    sizes, axes = result.shape[2:], tuple(range(2, result.dim()))
    maps = _transform(weight, sizes, padding, dilation, scattered).unflatten(-2, (groups, -1))  # frequencies.., g, r, c
    inverses = _left_inverse(maps.mH if scattered else maps).to(_COMPLEX[result.dtype])
    waves = torch.fft.rfftn(result, dim=axes).unflatten(1, (groups, -1))  # batch, g, rows, frequencies..
    solved = torch.einsum("fgcr,bgrf->bgcf", inverses.flatten(0, -4), waves.flatten(3)).flatten(1, 2)
    return torch.fft.irfftn(solved.unflatten(2, waves.shape[3:]), s=list(sizes), dim=axes)


def _transform(
    weight: Tensor, sizes: Sequence[int], padding: Sequence[int], dilation: Sequence[int], scattered: bool
) -> Tensor:
    """The matrix, features by image channels of a group, of each frequency; the last axis has those of real numbers."""
    found = weight.to(torch.complex128)
    for axis, (size, before, step) in enumerate(zip(sizes, padding, dilation, strict=True)):
        count = size if axis < len(sizes) - 1 else size // 2 + 1
        shifts = torch.arange(weight.shape[2 + axis], device=weight.device) * step - before
        turns = shifts[:, None] * torch.arange(count, device=weight.device) % size
        angles = turns.double() * (2 * math.pi / size)
        found = torch.tensordot(found, torch.polar(torch.ones_like(angles), angles), dims=([2], [0]))
    return found.movedim((0, 1), (-2, -1))


def _left_inverse(maps: Tensor) -> Tensor:
    if maps.shape[-2] == maps.shape[-1]:
        return torch.linalg.inv_ex(maps, check_errors=False).inverse
    return torch.linalg.inv_ex(maps.mH @ maps, check_errors=False).inverse @ maps.mH


_library.impl("solve_circular", _solve, "CompositeExplicitAutograd")


def _channels(weight: Tensor, groups: int, scattered: bool) -> int:
    return weight.shape[0] if scattered else weight.shape[1] * groups


@register_fake("moonwalk_compile::solve_circular")
def _fake(result: Tensor, weight: Tensor, padding: Any, dilation: Any, groups: int, scattered: bool) -> Tensor:
    return result.new_empty([len(result), _channels(weight, groups, scattered), *result.shape[2:]])


@register_flop_formula(torch.ops.moonwalk_compile.solve_circular, get_raw=True)
def _flops(result: Tensor, weight: Tensor, padding: Any, dilation: Any, groups: int, scattered: bool, **_: Any) -> int:
    """Of complex numbers: the inverses, of half the frequencies, and the products."""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    frequencies = math.prod(result.shape[2:]) // 2 + 1
    return 8 * groups * frequencies * (2 * rows * columns * min(rows, columns) + len(result) * rows * columns)


def is_solvable(geometry: Geometry, dtype: torch.dtype, scattered: bool) -> bool:
    """Whether shapes allow it: no more unknowns than equations, at each frequency."""
    unknowns, equations = (geometry.rows, geometry.columns)[:: 1 if scattered else -1]
    return dtype in _COMPLEX and unknowns <= equations


def undo_circular(geometry: Geometry, scattered: bool, result: Tensor, weight: Tensor) -> Tensor:
    """h from A^T h (scattered), or x from A x."""
    place = (list(geometry.padding), list(geometry.dilation), geometry.groups)
    found: Tensor = torch.ops.moonwalk_compile.solve_circular(result, weight, *place, scattered)
    return found
