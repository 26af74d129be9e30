"""Resampling, undone along one dimension at a time: linear and cubic interpolation, and their gradients.

Capture spells an interpolation out as gathers at computed indices, products with computed weights, and sums; its
gradient as the transpose of that. Whatever the spelling, all of it is one small matrix per dimension. Where that has
full column rank, its pseudo-inverse gives the image back from one that is not smaller, and the cotangent from the
gradient of one that is not larger. Only that question is put to the numbers: the inverse itself is made of the values
of the graph, at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import disable_current_modes
from ..graph import Edge, Ref
from .constants import computed, outer_indices
from .linear import left_inverse
from .reader import Reader
from .rule import Call, Recipe, Region, Rule

LARGEST_CONDITION = 1e4  # interpolations by any factor above one have 1 to 4
LARGEST = 2**20  # elements of a matrix that is looked at
FARTHEST = 100  # steps from a gradient back to the cotangent that it is made of
ZEROS = ("new_zeros", "zeros", "zeros_like")


class _Unknown(Exception):
    """Not of this kind."""


@dataclass(frozen=True)
class Map:
    """A matrix of `rows` rows, made of others and of one constant: a value of the graph, or a place among several."""

    kind: str  # "same", "pick", "put", "scale" or "sum"
    rows: int
    parts: tuple[tuple[float, Map], ...] = ()
    constant: int = -1

    def constants(self) -> Iterator[int]:
        if self.constant >= 0:
            yield self.constant
        for _, part in self.parts:
            yield from part.constants()

    def renamed(self, names: Mapping[int, int]) -> Map:
        parts = tuple((factor, part.renamed(names)) for factor, part in self.parts)
        return replace(self, parts=parts, constant=names.get(self.constant, -1))

    def matrix(self, constants: Mapping[int, Tensor] | Sequence[Tensor], like: Tensor) -> Tensor:
        """In double precision, on the device of `like`."""
        if self.kind == "same":
            return torch.eye(self.rows, dtype=torch.float64, device=like.device)
        whole, *others = (factor * part.matrix(constants, like) for factor, part in self.parts)
        for other in others:
            whole = whole + other
        if self.kind == "sum":
            return whole
        constant = constants[self.constant].reshape(-1)
        if self.kind == "scale":
            return constant.to(torch.float64)[:, None] * whole
        if self.kind == "pick":
            return torch.ops.aten.index(whole, [constant])
        blank = whole.new_zeros(self.rows, whole.shape[1])
        return torch.ops.aten.index_put(blank, [constant], whole, True)


@dataclass(frozen=True)
class Term:
    """`factor` times a tensor product of maps, one per dimension."""

    factor: float
    maps: tuple[Map, ...]

    def times(self, factor: float) -> Term:
        return replace(self, factor=self.factor * factor)

    def with_map(self, dim: int, kind: str, rows: int, constant: int) -> Term:
        made = Map(kind, rows, ((1.0, self.maps[dim]),), constant)
        return replace(self, maps=(*self.maps[:dim], made, *self.maps[dim + 1 :]))

    def plus(self, other: Term) -> Term | None:
        """The sum as one product again, if they differ along one dimension at most."""
        differing = [dim for dim, (a, b) in enumerate(zip(self.maps, other.maps, strict=True)) if a != b] or [0]
        if len(differing) > 1:
            return None
        dim = differing[0]
        added = [*_addends(self.factor, self.maps[dim]), *_addends(other.factor, other.maps[dim])]
        total = Map("sum", self.maps[dim].rows, tuple(sorted(added, key=repr)))
        return Term(1.0, (*self.maps[:dim], total, *self.maps[dim + 1 :]))


Terms = tuple[Term, ...]


def _addends(factor: float, map: Map) -> list[tuple[float, Map]]:
    return [(factor * of, part) for of, part in map.parts] if map.kind == "sum" else [(factor, map)]


def _added(terms: Sequence[Term]) -> Terms:
    """In as few terms as they join to."""
    waiting, found = list(terms), list[Term]()
    while waiting:
        term = waiting.pop(0)
        joined = ((other, total) for other in found if (total := other.plus(term)) is not None)
        other, total = next(joined, (None, None))
        if other is None or total is None:
            found.append(term)
        else:
            found.remove(other)
            waiting.insert(0, total)
    return tuple(found)


@dataclass
class _Finder:
    """What becomes of one value: `known` holds all that is linear in it."""

    reader: Reader
    constants: Mapping[int, Tensor]
    known: dict[int, Terms]

    @classmethod
    def of(cls, reader: Reader, constants: Mapping[int, Tensor], source: int) -> _Finder:
        whole = Term(1.0, tuple(Map("same", size) for size in reader.shape(source)))
        finder = cls(reader, constants, {source: (whole,)})
        for edge in reader.graph.edges:
            if edge.label in _STEPS and not finder.known.keys().isdisjoint(edge.needs):
                finder.add(edge)
        return finder

    def add(self, edge: Edge) -> None:
        (value,) = edge.gives
        try:
            terms = _STEPS[edge.label](self, edge)
        except _Unknown:
            return
        shape, values = self.reader.shape(value), self.reader.graph.values
        alike = values[value].dtype == values[next(iter(self.known))].dtype
        if alike and all(tuple(map.rows for map in term.maps) == shape for term in terms):
            self.known[value] = terms

    def terms(self, edge: Edge, argument: int) -> Terms:
        value = self.reader.value(edge, argument)
        if value not in self.known:
            raise _Unknown
        return self.known[value]

    def indices(self, edge: Edge) -> dict[int, int]:
        found = outer_indices(self.reader, edge)
        constants = [self.constants.get(index) for index in found.values()]
        if not constants or any(index is None or index.dtype != torch.int64 for index in constants):
            raise _Unknown
        return found

    def results(self) -> Iterator[tuple[int, Term]]:
        """What others read."""
        for value, terms in list(self.known.items())[1:]:
            readers = (edge for edge in self.reader.uses.get(value, ()) if edge.label not in ZEROS)
            read = value in self.reader.results or any(self.known.keys().isdisjoint(edge.gives) for edge in readers)
            if read and len(terms) == 1:
                yield value, terms[0]


def _pick(finder: _Finder, edge: Edge) -> Terms:
    terms = finder.terms(edge, 0)
    for dim, index in finder.indices(edge).items():
        rows = finder.constants[index].numel()
        terms = tuple(term.with_map(dim, "pick", rows, index) for term in terms)
    return terms


def _put(finder: _Finder, edge: Edge) -> Terms:
    """Written into zeros; what is written twice adds up."""
    terms, args = finder.terms(edge, 2), finder.reader.args(edge)
    if finder.reader.made_by(finder.reader.value(edge, 0), *ZEROS) is None or not args[3:] or not args[3]:
        raise _Unknown
    for dim, index in finder.indices(edge).items():
        rows = finder.reader.shape(edge.gives[0])[dim]
        if any(term.maps[dim].rows != finder.constants[index].numel() for term in terms):
            raise _Unknown
        terms = tuple(term.with_map(dim, "put", rows, index) for term in terms)
    return terms


def _scale(finder: _Finder, edge: Edge) -> Terms:
    """By a number, or by weights along one dimension."""
    place = int(finder.reader.value(edge, 0) not in finder.known)
    terms, other = finder.terms(edge, place), finder.reader.args(edge)[1 - place]
    if not isinstance(other, Ref):
        return tuple(term.times(float(other)) for term in terms)
    weights = edge.needs[other.slot]
    shape = finder.reader.shape(weights)
    long = [dim for dim, size in enumerate(shape, -len(shape)) if size > 1]
    if weights not in finder.constants or len(long) > 1 or not finder.constants[weights].is_floating_point():
        raise _Unknown
    dim = long[0] if long else -1
    return tuple(term.with_map(dim % len(term.maps), "scale", term.maps[dim].rows, weights) for term in terms)


def _negate(finder: _Finder, edge: Edge) -> Terms:
    return tuple(term.times(-1.0) for term in finder.terms(edge, 0))


def _sum(sign: float, finder: _Finder, edge: Edge) -> Terms:
    if edge.operations[0].kwargs:
        raise _Unknown
    return _added([*finder.terms(edge, 0), *(term.times(sign) for term in finder.terms(edge, 1))])


_SCALING: dict[str, Callable[[_Finder, Edge], Terms]] = {
    "mul": _scale,
    "neg": _negate,
    "add": partial(_sum, 1.0),
    "sub": partial(_sum, -1.0),
}
_STEPS: dict[str, Callable[[_Finder, Edge], Terms]] = {**_SCALING, "_unsafe_index": _pick, "_unsafe_index_put": _put}


def find_resampled(reader: Reader) -> Iterator[Region]:
    """Every image that is resampled, and every cotangent whose gradient is."""
    if not reader.edges("_unsafe_index", "_unsafe_index_put"):
        return
    with disable_current_modes():
        constants = computed(reader.capture, anywhere=True)
        found = [*_found(reader, constants)]
    yield from found


def _found(reader: Reader, constants: Mapping[int, Tensor]) -> Iterator[Region]:
    conditions: dict[Any, bool] = {}
    for source in dict.fromkeys(_sources(reader, constants)):
        for value, term in _Finder.of(reader, constants, source).results():
            if all(_is_sound(map, constants, conditions) for map in term.maps) and term.factor:
                needs = list(dict.fromkeys(constant for map in term.maps for constant in map.constants()))
                places = {constant: place for place, constant in enumerate(needs)}
                function = partial(_undo, term.factor, tuple(map.renamed(places) for map in term.maps))
                yield Region((source,), (value, *needs), function, "inverse of resampling")


def _sources(reader: Reader, constants: Mapping[int, Tensor]) -> Iterator[int]:
    for edge in reader.edges("_unsafe_index"):
        image = reader.value(edge, 0)
        if image is not None:
            yield image
    for edge in reader.edges("_unsafe_index_put"):
        written = reader.value(edge, 2)
        if written is not None:
            yield _origin(reader, constants, written)


def _origin(reader: Reader, constants: Mapping[int, Tensor], value: int) -> int:
    """The first value of which alone `value` is made, by weights."""
    origin, pending = value, {value}
    for _ in range(FARTHEST):
        last = max(pending)
        edge = reader.made_by(last, *_SCALING)
        operands = {need for need in edge.needs if need not in constants} if edge is not None else set()
        if edge is None or not operands or (edge.label == "mul" and len(operands) > 1):
            break
        pending = pending - {last} | operands
        if len(pending) == 1:
            (origin,) = pending
    return origin


def _is_sound(map: Map, constants: Mapping[int, Tensor], conditions: dict[Any, bool]) -> bool:
    if map.kind == "same":
        return True
    matrix = map.matrix(constants, torch.empty(0))
    key = (*matrix.shape, matrix.numpy().tobytes())
    if key not in conditions:
        conditions[key] = _is_injective(matrix)
    return conditions[key]


def _is_injective(matrix: Tensor) -> bool:
    """Whether it has full column rank, and well so."""
    if matrix.shape[0] < matrix.shape[1] or not 0 < matrix.numel() <= LARGEST:
        return False
    return float(torch.linalg.cond(matrix)) < LARGEST_CONDITION


def _undo(factor: float, maps: Sequence[Map], result: Tensor, *constants: Tensor) -> Tensor:
    for dim, map in enumerate(maps):
        if map.kind != "same":
            result = _unmapped(result, map.matrix(constants, result), dim)
    return result if factor == 1 else result / factor


def _unmapped(result: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """x from what the matrix makes of it along one dimension."""
    inverse = left_inverse(matrix).to(result.dtype)
    return (result.movedim(dim, -1) @ inverse.mT).movedim(-1, dim)


# -- with antialiasing, which is one operation ---------------------------------------------------------------------


def _antialiased(operation: Callable[..., Tensor], backward: bool) -> Rule:
    """What it makes of a unit matrix, along either dimension, tells its matrices."""

    def rule(call: Call) -> Iterator[Recipe]:
        image, features = (call.outputs[0], call.tensor(0))[:: 1 if backward else -1]
        if image is None or features is None:
            return
        align, *scales = call.args[3 if backward else 2 :]
        settings = (align, *scales, *[None] * (2 - len(scales)))
        sizes = tuple(zip(image.shape[-2:], features.shape[-2:], strict=True))

        def matrices(like: Tensor) -> list[Tensor]:
            found = [_matrix(operation, settings, axis, *both, like) for axis, both in enumerate(sizes)]
            return [matrix.mT for matrix in found] if backward else found

        with disable_current_modes():
            sound = all(map(_is_injective, matrices(torch.empty(0))))
        if sound:
            yield Recipe((call.args[0].slot,), lambda y: _unresampled(y, matrices(y)))

    return rule


def _matrix(operation: Callable[..., Tensor], settings: Sequence[Any], axis: int, before: int, after: int,
            like: Tensor) -> Tensor:  # fmt: skip
    align, *scales = settings
    scales[1 - axis] = None
    sizes = [before, before]
    sizes[axis] = after
    unit = torch.eye(before, dtype=torch.float64, device=like.device)
    found = operation(unit[None, None], sizes, align, *scales)[0, 0]
    return found.mT if axis else found


def _unresampled(y: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    for dim, matrix in enumerate(matrices, y.dim() - 2):
        y = _unmapped(y, matrix, dim)
    return y


RULES: dict[str, Rule] = {
    f"_upsample_{kind}2d_aa{suffix}": _antialiased(operation, bool(suffix))
    for kind, operation in (
        ("bilinear", torch.ops.aten._upsample_bilinear2d_aa),
        ("bicubic", torch.ops.aten._upsample_bicubic2d_aa),
    )
    for suffix in ("", "_backward")
}
