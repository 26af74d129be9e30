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

from ..graph import Edge
from .circular import is_solvable, undo_circular
from .convolution import Way, undo_gathering, undo_scattering, without_bias
from .geometry import Geometry, geometry_of
from .moved import Moved, Side, sources, targets, transposed, whole
from .reader import Reader
from .rule import Region, result_places
from .scattered import CROWDED

Problem = tuple[Geometry, int, torch.dtype, bool, bool]  # with the batch; whether scattered; whether a cotangent


def find_padded(reader: Reader) -> Iterator[Region]:
    """Every convolution whose image was padded, or cropped, by something else."""
    for edge, argument, weight in reader.convolutions():
        yield from _of_convolution(reader, edge, argument, weight)


def _of_convolution(reader: Reader, edge: Edge, argument: int, weight: int) -> Iterator[Region]:
    """`moved` tells what each element of the image takes from the padded one (scattered), or the other way round."""
    result = edge.gives[result_places(edge).index(0)]
    backward = edge.label == "convolution_backward"
    scattered = backward != reader.args(edge)[7 if backward else 6]
    bias = None if backward else reader.value(edge, 2)
    padded = result if scattered else argument
    same = whole(reader.shape(padded))
    for value, moved in targets(reader, result) if scattered else sources(reader, argument):
        if moved == same or (bias is not None and scattered and not _selects(moved)):
            continue
        if not scattered:
            moved = Moved(tuple(map(transposed, moved.sides, reader.shape(value))))
        if moved.sides[:2] != same.sides[:2]:
            continue  # some samples or channels alone
        solved, known, features = (argument, value, argument) if scattered else (value, result, result)
        given = (known, weight) if bias is None else (known, weight, bias)
        geometry = _geometry(reader, edge, value, moved, weight, features)
        if geometry is not None and len({solved, *given}) > len(given):
            fake = reader.capture.fake(solved)
            yield from _solved((geometry, len(fake), fake.dtype, scattered, backward), solved, given)


def _selects(moved: Moved) -> bool:
    """Whether every element is one of the source's, with its bias."""
    return all(place is not None and len(place) == 1 for side in moved.sides for place in side)


def _geometry(reader: Reader, edge: Edge, image: int, moved: Moved, weight: int, features: int) -> Geometry | None:
    """Of a convolution of the image as it is before it is padded."""
    first = 4 if edge.label == "convolution_backward" else 3
    fakes = (reader.capture.fake(value) for value in (weight, image, features))
    geometry = geometry_of(reader.args(edge)[first : first + 6], *fakes)
    if geometry is None:
        return None
    shifts = tuple(map(_shift, moved.sides[2:]))
    sides = [_side(geometry, axis, *of) for axis, of in enumerate(zip(moved.sides[2:], shifts, strict=True))]
    spoilt, circular = zip(*sides, strict=True)
    return replace(
        geometry,
        padding=tuple(map(sum, zip(geometry.padding, shifts, strict=True))),
        spoilt=spoilt if any(spoilt) else (),
        circular=all(circular),
    )


def _shift(side: Side) -> int:
    """Where the image begins in the padded one."""
    counts = Counter(there - here for here, place in enumerate(side) for there in place or ())
    return counts.most_common(1)[0][0] if counts else 0


def _side(geometry: Geometry, axis: int, side: Side, shift: int) -> tuple[frozenset[int], bool]:
    """Where the image does not hold just its own element of the padded one, and whether the rest of that is folded as
    a circular padding is; as far as a tap reaches.
    """
    g = geometry
    read = {
        o * g.stride[axis] - g.padding[axis] + t * g.dilation[axis]
        for o in range(g.features[axis])
        for t in range(g.kernel[axis])
    }
    found = [sorted(there for there in place or () if there in read) for place in side]
    own = [[here + shift] * (here + shift in read) for here in range(len(side))]
    wound = [sorted(there for there in read if (there - shift) % len(side) == here) for here in range(len(side))]
    spoilt = frozenset(here for here, (a, b) in enumerate(zip(found, own, strict=True)) if a != b)
    return spoilt, g.stride[axis] == 1 and g.features[axis] == len(side) and found == wound


def _solved(problem: Problem, solved: int, given: tuple[int, ...]) -> Iterator[Region]:
    for number, way in enumerate(_ways(problem)):
        function = partial(_solve, problem, number)
        fragment = partial(_take, problem, number) if way.take else None
        label = "inverse of circular convolution" if way in _by_frequency(problem) else "inverse of padded convolution"
        yield Region((solved,), given, function, label, fragment=fragment, fragile=way.fragile)


@cache
def _ways(problem: Problem) -> tuple[Way, ...]:
    geometry, batch, dtype, scattered, fragments = problem
    ways = _by_frequency(problem)
    if scattered:
        return (*ways, *undo_scattering(geometry, batch, dtype, fragments))
    return ways if geometry.spoilt else (*ways, *undo_gathering(geometry, batch, dtype))


@cache
def _by_frequency(problem: Problem) -> tuple[Way, ...]:
    """Where taps overlap too much, a fragment is better."""
    geometry, _, dtype, scattered, _ = problem
    if not (geometry.circular and is_solvable(geometry, dtype, scattered)):
        return ()
    fragile = scattered and geometry.rows > CROWDED * geometry.columns
    return (Way(partial(undo_circular, geometry, scattered), fragile=fragile),)


def _solve(problem: Problem, number: int, result: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    """The others are fragments, or a bias."""
    function = _ways(problem)[number].function
    is_forward = not problem[-1]
    return (without_bias(function) if is_forward and others else function)(result, weight, *others)


def _take(problem: Problem, number: int, h: Tensor) -> tuple[Tensor, ...]:
    take = _ways(problem)[number].take
    assert take is not None
    return take(h)
