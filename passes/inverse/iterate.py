"""Convolutions solved by conjugate gradients (CGLS), where nothing cheaper applies and nothing may be kept.

Each iteration is one convolution and one transposed convolution, so this costs as much as dozens of forward passes.
The number of iterations depends on shapes alone: whether it was enough is what the certificate measures. One operator
holds the loop, as 40 iterations would be hundreds of operations in the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils.flop_counter import register_flop_formula

from .geometry import Geometry

_library = Library("moonwalk_compile", "FRAGMENT")
_library.define(
    "solve_convolution(Tensor result, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
    "int[] size, bool scattered, int iterations) -> Tensor"
)

Map = Callable[[Tensor], Tensor]


def _solve(
    result: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
    scattered: bool,
    iterations: int,
) -> Tensor:
    """The argument, of `size`, of a convolution or (`scattered`) of its transpose, from the `result`."""
    image, features = (result.shape, size) if scattered else (size, result.shape)
    geometry = Geometry(
        tuple(weight.shape[2:]),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        tuple(image[2:]),
        tuple(features[2:]),
        image[1],
        features[1],
        groups,
    )
    apply, adjoint = (geometry.scatter, geometry.gather) if scattered else (geometry.gather, geometry.scatter)
    return least_squares(lambda x: apply(x, weight), lambda y: adjoint(y, weight), result, iterations)


def least_squares(apply: Map, adjoint: Map, result: Tensor, iterations: int) -> Tensor:
    """The x of least |apply(x) - result|, for each sample of the batch on its own.

    A sample whose gradient has shrunk to rounding error is left as it is: further steps would walk at random.
    """
    rest, slope = result, adjoint(result)
    x, direction, size = torch.zeros_like(slope), slope, _squares(slope)
    enough = size * (torch.finfo(size.dtype).eps / 16) ** 2
    for _ in range(iterations):
        step, going = apply(direction), size > enough
        length = torch.where(going, size / _squares(step), 0)
        x, rest = x + length * direction, rest - length * step
        slope = adjoint(rest)
        size, before = _squares(slope), size
        direction = slope + torch.where(going, size / before, 0) * direction
    return x


def _squares(tensor: Tensor) -> Tensor:
    return tensor.square().sum(tuple(range(1, tensor.dim())), keepdim=True)


_library.impl("solve_convolution", _solve, "CompositeExplicitAutograd")


@register_fake("moonwalk_compile::solve_convolution")
def _fake(result: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, size: Sequence[int],
          scattered: bool, iterations: int) -> Tensor:  # fmt: skip
    return result.new_empty(list(size))


@register_flop_formula(torch.ops.moonwalk_compile.solve_convolution, get_raw=True)
def _flops(result: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, size: Sequence[int],
           scattered: bool, iterations: int, **_: Any) -> int:  # fmt: skip
    features = size if scattered else result.shape
    return 4 * iterations * features[0] * math.prod(features[2:]) * weight.numel()


def iterated(
    geometry: Geometry, batch: int, scattered: bool, dtype: torch.dtype
) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """`function(result, weight)` if a matching of unknowns and equations shows that shapes allow a solution.

    With padding on one side alone the matching says little: a corner may hang on one tap.
    """
    crowding = _scattered_crowding(geometry) if scattered else _gathered_crowding(geometry)
    fewest = [count for most, count in _ITERATIONS if crowding <= most][:1]
    if not fewest or dtype not in _DIGITS or (scattered and geometry.beyond is None) or any(geometry.spoilt):
        return
    iterations = fewest[0] * _DIGITS[dtype]
    channels = geometry.feature_channels if scattered else geometry.image_channels
    size = [batch, channels, *(geometry.features if scattered else geometry.image)]
    place = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups)
    solve = torch.ops.moonwalk_compile.solve_convolution

    def function(result: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = solve(result, weight, *place, size, scattered, iterations)
        return found

    yield function


_ITERATIONS = ((0.55, 40), (0.8, 80))  # by unknowns per equation
_DIGITS = {torch.float32: 1, torch.float64: 2}  # twice as many digits take twice as many iterations


def _scattered_crowding(geometry: Geometry) -> float:
    """Feature elements per image element that can be set aside for them."""
    sides = zip(geometry.features, geometry.image, geometry.kernel, geometry.stride, geometry.padding,
                geometry.dilation, strict=True)  # fmt: skip
    apiece = math.prod(_apiece(*side) for side in sides)
    return geometry.rows / (geometry.columns * apiece) if apiece else math.inf


def _apiece(outputs: int, size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many elements of the image each output can have for itself, of those that it reaches."""
    return next((count for count in range(kernel, 0, -1) if _matched(count, outputs, size, kernel, stride, padding,
                                                                     dilation)), 0)  # fmt: skip


def _matched(count: int, outputs: int, size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    taken: set[int] = set()
    for output in range(outputs):
        reached = (output * stride - padding + tap * dilation for tap in range(kernel))
        free = [place for place in reached if 0 <= place < size and place not in taken][:count]
        if len(free) < count:
            return False
        taken.update(free)
    return True


def _gathered_crowding(geometry: Geometry) -> float:
    """Image channels per feature channel, if every image element is the same tap of an output of its own."""
    sides = zip(geometry.image, geometry.features, geometry.kernel, geometry.stride, geometry.padding,
                geometry.dilation, strict=True)  # fmt: skip
    matched = all(
        s == 1 and any(p >= t * d and n + p - t * d <= outputs for t in range(k)) for n, outputs, k, s, p, d in sides
    )
    return geometry.columns / geometry.rows if matched else math.inf
