"""Pooling: windows that do not overlap hand each cotangent to elements of their own, from which it is gathered.

The backward operations read the pooled tensor for its shape alone, so the spine has a way around it. The indices of
max-pooling are kept; overlapping windows share maxima, and there all cotangents but the first owner's are a fragment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bits import pack_bits, put_marked, take_marked
from ..graph import Edge, Ref
from .rule import Call, Recipe, Region, Rule

aten = torch.ops.aten
SHARED = 0.4  # the part of the outputs of a 3x3 pool of stride 2 that are not the first owner of their maximum (noise)


def _pooled(call: Call) -> tuple[int, Tensor, Tensor] | None:
    """The position of the cotangent, the cotangent, and the result; both in floating point."""
    output, cotangent = call.outputs[0], call.tensor(0)
    if output is None or cotangent is None or not output.numel() or not cotangent.numel():
        return None
    plain = cotangent.is_floating_point() and cotangent.dtype == output.dtype and cotangent.dim() == output.dim()
    return (call.args[0].slot, cotangent, output) if plain else None


def _spread(values: Any, count: int) -> list[int]:
    listed = [values] if isinstance(values, int) else list(values)
    return listed * count if len(listed) == 1 else listed


# -- averages ------------------------------------------------------------------------------------------------------


def _average(forward: Any, backward: Any, dims: int) -> Rule:
    def rule(call: Call) -> Iterator[Recipe]:
        pooled = _pooled(call)
        if pooled is None:
            return
        position, cotangent, _ = pooled
        settings = list(call.args[2:])
        kernel = _spread(settings[0], dims)
        stride = _spread(settings[1], dims) if settings[1] else kernel
        if all(s >= k for s, k in zip(stride, kernel, strict=True)):
            yield Recipe((position,), _weighted(forward, backward, settings, list(cotangent.shape), dims))

    return rule


def _adaptive_average(forward: Any, backward: Any, dims: int) -> Rule:
    """Windows tile where sizes divide; otherwise they overlap."""

    def rule(call: Call) -> Iterator[Recipe]:
        pooled = _pooled(call)
        if pooled is None:
            return
        position, cotangent, output = pooled
        sizes = list(cotangent.shape[-dims:])
        if all(whole % part == 0 for whole, part in zip(output.shape[-dims:], sizes, strict=True)):
            yield Recipe((position,), partial(_pool_adaptively, forward, sizes))

    return rule


def _pool_adaptively(forward: Any, sizes: Sequence[int], g: Tensor) -> Tensor:
    window = math.prod(g.shape[-len(sizes) :]) // math.prod(sizes)
    return forward(g, list(sizes)) * window


def _weighted(
    forward: Any, backward: Any, settings: Sequence[Any], shape: Sequence[int], dims: int
) -> Callable[[Tensor], Tensor]:
    """h = pool(g) / pool(what the backward operation makes of ones), of one image for all."""
    leading = len(shape) - dims

    def function(g: Tensor) -> Tensor:
        one = g[(slice(0, 1),) * leading]
        ones = g.new_ones([1] * leading + list(shape[leading:]))
        return forward(g, *settings) / forward(backward(ones, one, *settings), *settings)

    return function


# -- maxima ----------------------------------------------------------------------------------------------------------


def _maximum(dims: int, overlap: Callable[[Call, Tensor, Tensor], bool]) -> Rule:
    def rule(call: Call) -> Iterator[Recipe]:
        pooled, indices = _pooled(call), call.args[-1]
        if pooled is None or not isinstance(indices, Ref):
            return
        position, cotangent, output = pooled
        if overlap(call, cotangent, output):
            yield _shared_maxima(position, indices.slot, dims)
        else:
            yield Recipe((position,), partial(_gather, dims), (indices.slot,))

    return rule


def _gather(dims: int, g: Tensor, indices: Tensor) -> Tensor:
    return g.flatten(-dims).gather(-1, indices.flatten(-dims)).view(indices.shape)


def _shared_maxima(position: int, indices: int, dims: int) -> Recipe:
    """The first output to own a maximum is solved for, after the others' part of it has been taken off."""

    def fragment(h: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        marks = pack_bits(~_first_owners(index.flatten(-dims)))
        return marks, take_marked(h, marks, SHARED)

    def function(g: Tensor, index: Tensor, marks: Tensor, taken: Tensor) -> Tensor:
        others = put_marked(g.new_zeros(index.shape), marks, taken)
        flat, places = g.flatten(-dims), index.flatten(-dims)
        rest = flat.scatter_add(-1, places, -others.flatten(-dims))
        return put_marked(rest.gather(-1, places).view(index.shape), marks, taken)

    return Recipe((position,), function, (indices,), fragment=fragment, fragment_reads=(indices,))


def _first_owners(places: Tensor) -> Tensor:
    """Which of equal places in a row comes first: a stable sort puts it in front of the others."""
    ordered, order = places.sort(dim=-1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first = torch.cat([first[..., :1], ordered[..., 1:] != ordered[..., :-1]], -1)
    return torch.zeros_like(first).scatter(-1, order, first)


def _strided_overlap(dims: int) -> Callable[[Call, Tensor, Tensor], bool]:
    def overlap(call: Call, cotangent: Tensor, output: Tensor) -> bool:
        kernel, stride, _, dilation = (_spread(value, dims) if value else [] for value in call.args[2:6])
        steps = zip(kernel, stride or kernel, dilation, strict=True)
        return any(d * (k - 1) >= s for k, s, d in steps)

    return overlap


def _adaptive_overlap(dims: int) -> Callable[[Call, Tensor, Tensor], bool]:
    return lambda call, cotangent, output: any(
        whole % part for whole, part in zip(output.shape[-dims:], cotangent.shape[-dims:], strict=True)
    )


def scatter(call: Call) -> Iterator[Recipe]:
    """The gradient of a maximum along a dimension: one place for each cotangent, where it is found again."""
    index, source = call.tensor(2), call.tensor(3)
    dim = call.args[1]
    if index is None or source is None or not index.dim() or call.kwargs:
        return
    if index.shape == source.shape and index.shape[dim] == 1 and source.dtype == call.tensors[0].dtype:
        yield Recipe((call.args[3].slot,), lambda y, i: y.gather(dim, i), (call.args[2].slot,))


RULES: dict[str, Rule] = {
    "scatter": scatter,
    "avg_pool2d_backward": _average(aten.avg_pool2d, aten.avg_pool2d_backward, 2),
    "avg_pool3d_backward": _average(aten.avg_pool3d, aten.avg_pool3d_backward, 3),
    "_adaptive_avg_pool2d_backward": _adaptive_average(
        aten._adaptive_avg_pool2d, aten._adaptive_avg_pool2d_backward, 2
    ),
    "_adaptive_avg_pool3d_backward": _adaptive_average(
        aten._adaptive_avg_pool3d, aten._adaptive_avg_pool3d_backward, 3
    ),
    "max_pool2d_with_indices_backward": _maximum(2, _strided_overlap(2)),
    "max_pool3d_with_indices_backward": _maximum(3, _strided_overlap(3)),
    "adaptive_max_pool2d_backward": _maximum(2, _adaptive_overlap(2)),
    "adaptive_max_pool3d_backward": _maximum(3, _adaptive_overlap(3)),
}


# -- ways around the pooled tensor -----------------------------------------------------------------------------------


def shape_only(edge: Edge, shape: tuple[int, ...]) -> Region | None:
    """The backward operation with a stand-in for the tensor that it reads for its `shape` alone."""
    operation = edge.operations[0]
    if edge.label not in RULES or len(edge.gives) != 1 or operation.args[1] == operation.args[0]:
        return None
    values = [edge.needs[arg.slot] for arg in operation.args if isinstance(arg, Ref)]
    settings = tuple(tuple(a) if isinstance(a, list) else a for a in operation.args[2:] if not isinstance(a, Ref))
    function = partial(_with_stand_in, operation.target, shape, settings)
    return Region(edge.gives, (values[0], *values[2:]), function, f"{edge.label}, by shape", inverse=False)


def _with_stand_in(target: Any, shape: Sequence[int], settings: Sequence[Any], h: Tensor, *indices: Tensor) -> Tensor:
    source = h.new_empty([1] * len(shape)).expand(shape)
    return target(h, source, *(list(s) if isinstance(s, tuple) else s for s in settings), *indices)
