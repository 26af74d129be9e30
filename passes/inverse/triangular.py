"""Convolutions that are triangular, solved by substitution: causal ones, and ones with a mask.

Where no tap that counts reads behind its output, in the order of the image's rows (or of the reversed ones), each
element follows from those before it and from the inverse of the tap at its own place. A padding on one side alone shows
that, for all kernels; a mask of zeros and ones shows it if its values are known (`Constants`). The cotangent is solved
for in the opposite order. Whether errors then grow along the image is a matter of the kernel's values, as is whether
that one tap can be inverted: certificates measure it.

One operator holds the loop. It solves for several elements at a time: by the first terms of the inverse filter, which
is causal too, and is made in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .._torch_compat import disable_current_modes
from ..graph import Edge
from .constants import Constants
from .convolution import without_bias
from .geometry import per_group
from .moved import Moved, Side, sources, targets, transposed, whole
from .reader import Reader
from .rule import Region, result_places

CHUNK = 16  # elements of a row that are solved for at once

_library = Library("moonwalk_compile", "FRAGMENT")
_library.define(
    "solve_triangular(Tensor result, Tensor weight, int[] centre, int dilation, int groups, int[] flips, "
    "bool scattered) -> Tensor"
)

Map = Callable[[Tensor], Tensor]


def _solve(
    result: Tensor,
    weight: Tensor,
    centre: Sequence[int],
    dilation: int,
    groups: int,
    flips: Sequence[int],
    scattered: bool,
) -> Tensor:
    """The argument of a convolution, or (`scattered`) of its transpose, from the `result`, which is as large.

    The tap at `centre` reads an output's own place; with the axes `flips` reversed, all others read before it.
    `dilation` is that of the first axis.
    """
    axes = range(len(centre))
    kernel = weight.flip([2 + axis for axis in flips])
    if scattered:
        kernel = (
            per_group(kernel, groups)
            .unflatten(2, (-1, math.prod(weight.shape[2:])))
            .transpose(1, 2)
            .reshape(weight.shape)
        )
    own = [weight.shape[2 + axis] - 1 - centre[axis] if axis in flips else centre[axis] for axis in axes]
    turned = [2 + axis for axis in axes if (axis in flips) != scattered]
    solve = _apart(_solver(kernel, own, groups), dilation)
    return solve(result.flip(turned)).flip(turned).contiguous()


def _apart(solve: Map, dilation: int) -> Map:
    """Each of the interleaved images that a dilation along the first axis makes of one, solved alone."""
    if dilation == 1:
        return solve

    def function(y: Tensor) -> Tensor:
        batch, rows = y.shape[0], y.shape[2]
        missing = -rows % dilation
        y = F.pad(y, [0, 0] * (y.dim() - 3) + [0, missing]).unflatten(2, (-1, dilation)).movedim(3, 1).flatten(0, 1)
        return solve(y).unflatten(0, (batch, dilation)).movedim(1, 3).flatten(2, 3)[:, :, :rows]

    return function


def _solver(kernel: Tensor, centre: Sequence[int], groups: int) -> Map:
    """Row by row: what the rows before it have added is subtracted."""
    if kernel.dim() == 3:
        return _line_solver(kernel[..., : centre[0] + 1], groups)
    reach = centre[0]
    before, inner = kernel[:, :, :reach], _solver(kernel[:, :, reach], centre[1:], groups)
    sides = [side for c, k in zip(centre[:0:-1], kernel.shape[:2:-1], strict=True) for side in (c, k - 1 - c)]
    convolve = F.conv2d if kernel.dim() == 4 else F.conv3d

    def solve(y: Tensor) -> Tensor:
        rows: list[Tensor] = []
        for row in y.unbind(2):
            known = rows[-reach:] if reach else []
            if known:
                taps = before[:, :, reach - len(known) :]
                row = row - convolve(F.pad(torch.stack(known, 2), sides), taps, groups=groups).squeeze(2)
            rows.append(inner(row))
        return torch.stack(rows, 2)

    return solve


def _line_solver(kernel: Tensor, groups: int) -> Map:
    """Along one axis, of a kernel that ends in the tap of the output's own place."""
    reach = kernel.shape[-1] - 1
    inverse = _inverse_filter(kernel, groups, CHUNK if reach else 1)

    def filtered(rest: Tensor) -> Tensor:
        return F.conv1d(F.pad(rest, (inverse.shape[-1] - 1, 0)), inverse, groups=groups)

    def solve(y: Tensor) -> Tensor:
        if not reach:
            return filtered(y)
        known = y.new_zeros(*y.shape[:2], reach)
        found = []
        for part in y.split(CHUNK, 2):
            carried = F.conv1d(F.pad(known, (0, part.shape[2] - 1)), kernel[..., :reach], groups=groups)
            found.append(filtered(part - carried))
            known = torch.cat([known, found[-1]], 2)[..., -reach:]
        return torch.cat(found, 2)

    return solve


def _inverse_filter(kernel: Tensor, groups: int, length: int) -> Tensor:
    """The last `length` taps of the causal filter that undoes `kernel`: what it makes of an impulse, turned round."""
    *others, own = kernel.double().unflatten(0, (groups, -1)).unbind(-1)  # matrices of the groups
    undo = torch.linalg.inv_ex(own, check_errors=False).inverse
    response = [undo]
    for _ in range(1, length):
        pairs = zip(reversed(others), reversed(response), strict=False)
        response.append(-undo @ sum(tap @ term for tap, term in pairs))
    return torch.stack(response[::-1], -1).flatten(0, 1).to(kernel.dtype)


_library.impl("solve_triangular", _solve, "CompositeExplicitAutograd")


@register_fake("moonwalk_compile::solve_triangular")
def _fake(
    result: Tensor, weight: Tensor, centre: Any, dilation: int, groups: int, flips: Any, scattered: bool
) -> Tensor:
    return result.new_empty(result.shape)


@register_flop_formula(torch.ops.moonwalk_compile.solve_triangular, get_raw=True)
def _flops(result: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Of the convolution itself and of the inverse filter."""
    own = weight.shape[0] * weight.shape[1]
    return 2 * result.shape[0] * math.prod(result.shape[2:]) * (weight.numel() + CHUNK * own)


# -- where a convolution is triangular -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a value, `size` large, stands in what the convolution reads or gives: in zeros, or cut out of more."""

    value: int
    size: tuple[int, ...]
    offset: tuple[int, ...]


def find_triangular(reader: Reader, constants: Constants) -> Iterator[Region]:
    """Every convolution that padding, a crop behind it, or a mask makes triangular."""
    for edge, argument, weight in reader.convolutions():
        yield from _of_convolution(reader, constants, edge, argument, weight)


def _of_convolution(reader: Reader, constants: Constants, edge: Edge, argument: int, weight: int) -> Iterator[Region]:
    backward = edge.label == "convolution_backward"
    settings = reader.args(edge)[4 if backward else 3 :]
    scattered = backward != settings[3]
    bias = None if backward else reader.value(edge, 2)
    active = _active_taps(reader, constants, weight)
    result = edge.gives[result_places(edge).index(0)]
    for solved, given in product(_placed(reader, argument, sources), _placed(reader, result, targets)):
        image, features = (given, solved) if scattered else (solved, given)
        found = _order(reader, settings, weight, active.taps, image, features)
        needs = (given.value, weight) if bias is None else (given.value, weight, bias)
        if found is None or len({solved.value, *needs}) == len(needs):
            continue
        constants.trusted.update(active.rests_on)
        function = partial(_undo, found, settings[5], scattered)
        yield Region((solved.value,), needs, function, "inverse of triangular convolution")


@dataclass(frozen=True)
class _Active:
    """The taps that may differ from zero, and the masks that say so."""

    taps: frozenset[tuple[int, ...]]
    rests_on: tuple[int, ...] = ()


def _active_taps(reader: Reader, constants: Constants, weight: int) -> _Active:
    kernel = reader.shape(weight)[2:]
    edge = reader.made_by(weight, "mul")
    for mask in edge.needs if edge is not None else ():
        if mask in constants.masks:
            with disable_current_modes():
                some = constants.masks[mask].expand(reader.shape(weight)).flatten(0, 1).any(0)
                return _Active(frozenset(map(tuple, some.nonzero().tolist())), (mask,))
    return _Active(frozenset(product(*map(range, kernel))))


def _placed(
    reader: Reader, value: int, others: Callable[[Reader, int], Iterator[tuple[int, Moved]]]
) -> Iterator[_Place]:
    """The value itself, and what is padded with zeros to be it, or cut out of it."""
    shape = reader.shape(value)
    yield _Place(value, shape[2:], (0,) * len(shape[2:]))
    same = whole(shape)
    for other, moved in others(reader, value):
        size = reader.shape(other)
        if len(size) != len(shape) or moved == same:
            continue
        sides = moved.sides
        if others is targets:  # from each element of the value, where it went
            sides = tuple(map(transposed, sides, shape))
        offsets = [_offset(side, small) for side, small in zip(sides, size, strict=True)]
        if size[:2] == shape[:2] and None not in offsets:
            yield _Place(other, size[2:], tuple(offset for offset in offsets[2:] if offset is not None))


def _offset(side: Side, size: int) -> int | None:
    """Where the source begins in what holds all of it, and zeros."""
    first = next((index for index, place in enumerate(side) if place), 0)
    inside = range(first, first + size)
    alone = side == tuple((index - first,) if index in inside else () for index in range(len(side)))
    return first if alone and inside.stop <= len(side) else None


@dataclass(frozen=True)
class _Order:
    """The tap that reads an output's own place, and the axes to reverse for all others to read before it."""

    centre: tuple[int, ...]
    flips: tuple[int, ...]
    dilation: int


def _order(
    reader: Reader,
    settings: Sequence[Any],
    weight: int,
    taps: frozenset[tuple[int, ...]],
    image: _Place,
    features: _Place,
) -> _Order | None:
    stride, padding, dilation, _, _, groups = settings[:6]
    rows, columns, *kernel = reader.shape(weight)
    if len(stride) != len(kernel) or len(image.size) != len(kernel) or set(stride) != {1} or set(kernel) == {1}:
        return None
    square = image.size == features.size and rows == columns * groups
    if not square or 0 in (rows, *image.size) or reader.graph.values[weight].dtype not in ("float32", "float64"):
        return None
    before = [p + i - f for p, i, f in zip(padding, image.offset, features.offset, strict=True)]
    centre = tuple(p // d for p, d in zip(before, dilation, strict=True))
    fits = all(c * d == p for c, d, p in zip(centre, dilation, before, strict=True))
    dilated = any(d > 1 and k > 1 for d, k in zip(dilation[1:], kernel[1:], strict=True))
    if not fits or dilated or centre not in taps:
        return None
    for signs in product((1, -1), repeat=len(kernel)):
        if all(
            tuple(s * (t - c) for s, t, c in zip(signs, tap, centre, strict=True)) <= (0,) * len(kernel) for tap in taps
        ):
            flips = tuple(axis for axis, sign in enumerate(signs) if sign < 0)
            return _Order(centre, flips, dilation[0])
    return None


def _undo(order: _Order, groups: int, scattered: bool, result: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    def function(y: Tensor, kernel: Tensor) -> Tensor:
        place = (list(order.centre), order.dilation, groups, list(order.flips))
        found: Tensor = torch.ops.moonwalk_compile.solve_triangular(y, kernel, *place, scattered)
        return found

    return (without_bias(function) if bias else function)(result, weight, *bias)
