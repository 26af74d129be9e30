"""What pads, crops and copies make of a tensor, dimension by dimension: where the elements of a result come from.

A circular padding is a score of slices, copies and scatters, and its gradient twice as many. All of them act along one
dimension at a time, so their result is told by one `Side` per dimension, however it was spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from heapq import heappop, heappush
from typing import Any

from ..graph import Edge, Ref
from .reader import Reader

Place = tuple[int, ...] | None  # the source's indices that add up there; None: whatever memory held
Side = tuple[Place, ...]
MOST_VALUES = 100  # that are looked at around one value


class _Unknown(Exception):
    """Not of this kind."""


@dataclass(frozen=True)
class Moved:
    """Element (i, j, ..) is the sum of the source's (a, b, ..), for all a in sides[0][i], b in sides[1][j], .."""

    sides: tuple[Side, ...]

    def with_side(self, dim: int, side: Iterable[Place]) -> Moved:
        return Moved((*self.sides[:dim], tuple(side), *self.sides[dim + 1 :]))

    @property
    def known(self) -> bool:
        """Whether no element is unset."""
        return all(place is not None for side in self.sides for place in side)

    @property
    def nothing(self) -> bool:
        """Whether no element says anything of the source: all are zero, or all unset."""
        return any(set(side) == {None} for side in self.sides) or (self.known and not all(map(any, self.sides)))


def whole(shape: Sequence[int]) -> Moved:
    """A tensor as it is."""
    return Moved(tuple(tuple((i,) for i in range(size)) for size in shape))


def transposed(side: Side, size: int) -> Side:
    """Along one dimension of the source, the indices of the result to which an element is added."""
    found: list[list[int]] = [[] for _ in range(size)]
    for index, place in enumerate(side):
        for source in place or ():
            found[source].append(index)
    return tuple(map(tuple, found))


def sources(reader: Reader, target: int) -> Iterator[tuple[int, Moved]]:
    """The values of which `target` is made, each alone, and how."""
    seen, queue = {target}, [target]
    for value in queue:
        edge = reader.graph.definition.get(value)
        if edge is None or edge.label not in _MOVES or edge.label == "add" or len(seen) > MOST_VALUES:
            continue
        new = [need for need in edge.needs if need not in seen]
        seen.update(new)
        queue += new
    for source in queue[1:]:
        moved = _try(reader, target, {source: whole(reader.shape(source))})
        if moved is not None:
            yield source, moved


def targets(reader: Reader, source: int) -> Iterator[tuple[int, Moved]]:
    """The values that are made of `source` alone and that somebody else reads, and how."""
    known = {source: whole(reader.shape(source))}
    heap = [source]
    while heap:
        value = heappop(heap)
        uses = reader.uses.get(value, ())
        made = {given for edge in uses for given in edge.gives if _try(reader, given, known) is not None}
        if value != source and (value in reader.results or any(made.isdisjoint(edge.gives) for edge in uses)):
            yield value, known[value]
        for given in made - set(heap):
            heappush(heap, given)


def _try(reader: Reader, value: int, known: dict[int, Moved]) -> Moved | None:
    try:
        return _describe(reader, value, known)
    except _Unknown:
        return None


def _describe(reader: Reader, value: int, known: dict[int, Moved], depth: int = 0) -> Moved:
    if value in known:
        return known[value]
    edge = reader.graph.definition.get(value)
    if edge is None or edge.random or edge.effect or len(edge.gives) != 1 or depth > MOST_VALUES:
        raise _Unknown
    shape = reader.shape(value)
    if edge.label in _BLANKS:
        known[value] = Moved(tuple((_BLANKS[edge.label],) * size for size in shape))
    elif edge.label in _MOVES:
        values = _moved_values(edge)
        moved = _MOVES[edge.label](edge, [_describe(reader, v, known, depth + 1) for v in values])
        dtypes = {reader.graph.values[v].dtype for v in (value, *values)}
        if len(dtypes) > 1 or tuple(map(len, moved.sides)) != shape:
            raise _Unknown
        known[value] = moved
    else:
        raise _Unknown
    return known[value]


def _moved_values(edge: Edge) -> list[int]:
    """The values whose elements go into the result, in order."""
    args = edge.operations[0].args
    if edge.label == "cat":
        places = args[0]
    else:
        places = args[1:2] if edge.label == "copy" else args[: 2 if edge.label in ("add", "slice_scatter") else 1]
    if not all(isinstance(place, Ref) for place in places):
        raise _Unknown
    return [edge.needs[place.slot] for place in places]


def _alike(a: Moved, b: Moved, dim: int) -> tuple[Moved, Moved]:
    """Both with the same sides but for `dim`; what holds nothing holds nothing whatever its other sides are."""
    if a.nothing:
        a = Moved(b.sides).with_side(dim, [_nothing(a)] * len(a.sides[dim]))
    elif b.nothing:
        b = Moved(a.sides).with_side(dim, [_nothing(b)] * len(b.sides[dim]))
    if a.with_side(dim, ()) != b.with_side(dim, ()):
        raise _Unknown
    return a, b


def _nothing(moved: Moved) -> Place:
    return () if moved.known else None


def _same(edge: Edge, parts: list[Moved]) -> Moved:
    return parts[0]


def _argument(edge: Edge, name: str, place: int, default: Any) -> Any:
    operation = edge.operations[0]
    if name in operation.kwargs:
        return operation.kwargs[name]
    return operation.args[place] if len(operation.args) > place else default


def _covered(edge: Edge, first: int, size: int) -> slice:
    start, stop, step = (_argument(edge, n, first + i, d) for i, (n, d) in enumerate(_BOUNDS))
    return slice(*slice(start, stop, step).indices(size))


_BOUNDS = (("start", None), ("end", None), ("step", 1))


def _dim(edge: Edge, place: int, moved: Moved) -> int:
    dim: int = _argument(edge, "dim", place, 0)
    return dim % len(moved.sides)


def _slice(edge: Edge, parts: list[Moved]) -> Moved:
    (moved,) = parts
    dim = _dim(edge, 1, moved)
    side = moved.sides[dim]
    return moved.with_side(dim, side[_covered(edge, 2, len(side))])


def _slice_scatter(edge: Edge, parts: list[Moved]) -> Moved:
    dim = _dim(edge, 2, parts[0])
    base, written = _alike(parts[0], parts[1], dim)
    return _placed(base, written, dim, _covered(edge, 3, len(base.sides[dim])))


def _slice_backward(edge: Edge, parts: list[Moved]) -> Moved:
    dim = _dim(edge, 2, parts[0])
    size = edge.operations[0].args[1][dim]
    return _placed(parts[0].with_side(dim, [()] * size), parts[0], dim, _covered(edge, 3, size))


def _placed(base: Moved, written: Moved, dim: int, covers: slice) -> Moved:
    side = list(base.sides[dim])
    if len(side[covers]) != len(written.sides[dim]):
        raise _Unknown
    side[covers] = written.sides[dim]
    return base.with_side(dim, side)


def _add(edge: Edge, parts: list[Moved]) -> Moved:
    """Two that differ along one dimension at most."""
    if edge.operations[0].kwargs:
        raise _Unknown
    a, b = parts
    if len(a.sides) != len(b.sides):
        raise _Unknown
    differing = [dim for dim, (p, q) in enumerate(zip(a.sides, b.sides, strict=True)) if p != q]
    dim = differing[0] if differing else 0
    a, b = _alike(a, b, dim)
    if len(a.sides[dim]) != len(b.sides[dim]):
        raise _Unknown
    pairs = zip(a.sides[dim], b.sides[dim], strict=True)
    return a.with_side(dim, (None if p is None or q is None else p + q for p, q in pairs))


def _cat(edge: Edge, parts: list[Moved]) -> Moved:
    dim = _dim(edge, 1, parts[0])

    def joined(a: Moved, b: Moved) -> Moved:
        a, b = _alike(a, b, dim)
        return a.with_side(dim, a.sides[dim] + b.sides[dim])

    return reduce(joined, parts)


def _padding(edge: Edge, place: int, moved: Moved) -> Iterator[tuple[int, int, int]]:
    """(dimension, before, behind)"""
    pads = edge.operations[0].args[place]
    for k in range(len(pads) // 2):
        yield len(moved.sides) - 1 - k, pads[2 * k], pads[2 * k + 1]


def _constant_pad(edge: Edge, parts: list[Moved]) -> Moved:
    (moved,) = parts
    if _argument(edge, "value", 2, 0) != 0:
        raise _Unknown
    for dim, before, behind in _padding(edge, 1, moved):
        side = moved.sides[dim]
        kept = side[max(0, -before) : len(side) - max(0, -behind)]
        moved = moved.with_side(dim, ((),) * max(0, before) + kept + ((),) * max(0, behind))
    return moved


def _mirrored(index: int, size: int) -> int:
    return abs(index) if index < size else 2 * (size - 1) - index


def _clamped(index: int, size: int) -> int:
    return min(max(index, 0), size - 1)


Move = Callable[[Edge, list[Moved]], Moved]


def _extended(inside: Callable[[int, int], int]) -> Move:
    """Padding by what stands elsewhere."""

    def move(edge: Edge, parts: list[Moved]) -> Moved:
        (moved,) = parts
        for dim, before, behind in _padding(edge, 1, moved):
            side = moved.sides[dim]
            size = len(side)
            moved = moved.with_side(dim, (side[inside(i, size)] for i in range(-before, size + behind)))
        return moved

    return move


def _extended_backward(inside: Callable[[int, int], int]) -> Move:
    def move(edge: Edge, parts: list[Moved]) -> Moved:
        (moved,) = parts
        for dim, before, behind in _padding(edge, 2, moved):
            size = len(moved.sides[dim]) - before - behind
            side: list[Place] = [()] * size
            for index, place in enumerate(moved.sides[dim], -before):
                there = side[inside(index, size)]
                side[inside(index, size)] = None if there is None or place is None else there + place
            moved = moved.with_side(dim, side)
        return moved

    return move


_BLANKS: dict[str, Place] = {
    **dict.fromkeys(("empty", "new_empty", "new_empty_strided", "empty_like", "empty_strided"), None),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), ()),
}
_MOVES: dict[str, Move] = {
    **dict.fromkeys(("clone", "alias", "detach", "copy", "_to_copy"), _same),
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "slice_backward": _slice_backward,
    "constant_pad_nd": _constant_pad,
    "add": _add,
    "cat": _cat,
    **{f"reflection_pad{n}d": _extended(_mirrored) for n in (1, 2, 3)},
    **{f"reflection_pad{n}d_backward": _extended_backward(_mirrored) for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _extended(_clamped) for n in (1, 2, 3)},
    **{f"replication_pad{n}d_backward": _extended_backward(_clamped) for n in (1, 2, 3)},
}
