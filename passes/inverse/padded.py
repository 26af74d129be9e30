"""Convolutions of padded images: the image, not its padding, from the features, and the features from the image.

The gradient of a padding crops, or folds back onto the image what was read twice (`moved` tells which). So it is solved
together with the convolution, as one whose padding may differ from side to side and some of whose image is spoilt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from ..capture import Capture
from ..graph import Edge
from .convolution import Way, undo_gathering, undo_scattering, without_bias
from .geometry import Geometry, geometry_of
from .moved import Moved, Side, sources, targets, transposed, whole
from .regions import Reader
from .rule import Region, result_places

Problem = tuple[Geometry, int, torch.dtype, bool, bool]  # with the batch; whether scattered; whether a cotangent


def find_padded(capture: Capture) -> Iterator[Region]:
    """Every convolution whose image was padded, or cropped, by something else."""
    reader = Reader(capture)
    for edge in reader.edges("convolution", "convolution_backward"):
        argument, weight = reader.value(edge, 0), reader.value(edge, 1 if edge.label == "convolution" else 2)
        if argument is not None and weight is not None and 0 in result_places(edge):
            yield from _of_convolution(reader, edge, argument, weight)


def _of_convolution(reader: Reader, edge: Edge, argument: int, weight: int) -> Iterator[Region]:
    """`moved` tells what each element of the image takes from the padded one (scattered), or the other way round."""
    result = edge.gives[result_places(edge).index(0)]
    backward = edge.label == "convolution_backward"
    scattered = backward != reader.args(edge)[7 if backward else 6]
    bias = None if backward else reader.value(edge, 2)
    for value, moved in targets(reader, result) if scattered else sources(reader, argument):
        solved, known = (argument, value) if scattered else (value, result)
        if moved == whole(reader.shape(result if scattered else argument)):
            continue
        if not scattered:
            moved = Moved(tuple(map(transposed, moved.sides, reader.shape(value))))
        given = (known, weight) if bias is None else (known, weight, bias)
        geometry = _geometry(reader, edge, value, moved, weight, argument if scattered else result)
        if geometry is None or len({solved, *given}) <= len(given) or (bias is not None and any(geometry.spoilt)):
            continue
        fake = reader.capture.fake(solved)
        yield from _solved((geometry, len(fake), fake.dtype, scattered, backward), solved, given)


def _geometry(reader: Reader, edge: Edge, image: int, moved: Moved, weight: int, features: int) -> Geometry | None:
    """Of a convolution of the image as it is before it is padded."""
    first = 4 if edge.label == "convolution_backward" else 3
    fakes = (reader.capture.fake(value) for value in (weight, image, features))
    geometry = geometry_of(reader.args(edge)[first : first + 6], *fakes)
    if geometry is None or moved.sides[:2] != whole(reader.shape(image)[:2]).sides:
        return None
    shifts = [_shift(side) for side in moved.sides[2:]]
    spoilt = tuple(_spoilt(geometry, axis, side, shifts[axis]) for axis, side in enumerate(moved.sides[2:]))
    padding = tuple(p + shift for p, shift in zip(geometry.padding, shifts, strict=True))
    return replace(geometry, padding=padding, spoilt=spoilt if any(spoilt) else ())


def _shift(side: Side) -> int:
    """Where the image begins in the padded one."""
    counts = Counter(there - here for here, place in enumerate(side) for there in place or ())
    return counts.most_common(1)[0][0] if counts else 0


def _spoilt(geometry: Geometry, axis: int, side: Side, shift: int) -> frozenset[int]:
    """Where the image does not hold just its own element of the padded one, as far as a tap reaches that."""
    g = geometry
    read = {
        o * g.stride[axis] - g.padding[axis] + t * g.dilation[axis]
        for o in range(g.features[axis])
        for t in range(g.kernel[axis])
    }
    return frozenset(
        here
        for here, place in enumerate(side)
        if [there for there in place or () if there in read] != [here + shift] * (here + shift in read)
    )


def _solved(problem: Problem, solved: int, given: tuple[int, ...]) -> Iterator[Region]:
    for number, way in enumerate(_ways(problem)):
        fragment = partial(_take, problem, number) if way.take else None
        yield Region(
            (solved,), given, partial(_solve, problem, number), "inverse of padded convolution", fragment=fragment
        )


@cache
def _ways(problem: Problem) -> tuple[Way, ...]:
    geometry, batch, dtype, scattered, fragments = problem
    if scattered:
        return tuple(undo_scattering(geometry, batch, dtype, fragments))
    return () if geometry.spoilt else tuple(undo_gathering(geometry, batch, dtype))


def _solve(problem: Problem, number: int, result: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    """The others are fragments, or a bias."""
    function = _ways(problem)[number].function
    is_forward = not problem[-1]
    return (without_bias(function) if is_forward and others else function)(result, weight, *others)


def _take(problem: Problem, number: int, h: Tensor) -> tuple[Tensor, ...]:
    take = _ways(problem)[number].take
    assert take is not None
    return take(h)
