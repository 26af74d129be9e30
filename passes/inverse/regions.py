"""Rules over several nodes at once: what no single operation's inverse can give.

A tensor in all its slices; the sum of disjoint slice gradients, which is a concatenation in disguise; MaxMin, whose
backward pass is a 2x2 system; the gradient of `sort`, which is a permutation; that of `abs`, from the argument itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capture import Capture
from ..graph import Edge, Graph, Ref
from .composites import find_composites, find_softsigns
from .pooling import shape_only
from .rule import Region

Step = tuple[int, slice | int]  # one slice or selection along a dimension


def find_regions(capture: Capture) -> Iterator[Region]:
    """Every region of the joint graph."""
    reader = Reader(capture)
    yield from _tilings(reader)
    yield from _disjoint_sums(reader)
    yield from _maxmins(reader)
    yield from _sorts(reader)
    yield from _maxima(reader)
    yield from _signed(reader)
    yield from find_softsigns(reader)
    yield from find_composites(reader)
    for edge in capture.graph.edges:
        if edge.label.endswith(("pool2d_backward", "pool3d_backward", "with_indices_backward")):
            region = shape_only(edge, reader.shape(edge.gives[0]))
            if region is not None:
                yield region


class Reader:
    """Looks at the arguments of edges by value index."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.graph: Graph = capture.graph
        self.uses: dict[int, list[Edge]] = {}
        for edge in self.graph.edges:
            for value in edge.needs:
                self.uses.setdefault(value, []).append(edge)
        self.results = {*self.graph.output_values, *self.graph.gradient_values}

    def args(self, edge: Edge) -> tuple[Any, ...]:
        return edge.operations[0].args

    def value(self, edge: Edge, argument: int) -> int | None:
        """The value that stands at an argument's place."""
        args = self.args(edge)
        place = args[argument] if argument < len(args) else None
        return edge.needs[place.slot] if isinstance(place, Ref) else None

    def made_by(self, value: int | None, *labels: str) -> Edge | None:
        """The edge that gives `value`, if it is one of these operations."""
        edge = self.graph.definition.get(value) if value is not None else None
        return edge if edge is not None and edge.label in labels else None

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def edges(self, *labels: str) -> list[Edge]:
        return [edge for edge in self.graph.edges if edge.label in labels]


# -- a tensor in all its slices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """What a slice or a selection covers of its source along one dimension."""

    value: int
    covers: range
    selected: bool


def _pieces(reader: Reader, source: int) -> dict[int, list[_Piece]]:
    """The pieces of `source` that are read, by dimension."""
    shape = reader.shape(source)
    found: dict[int, list[_Piece]] = {}
    for edge in reader.uses.get(source, ()):
        if edge.label in ("slice", "select") and shape:
            dim, part = _step(edge.label, reader.args(edge)[1:])
            dim %= len(shape)
            covers = _restrict(range(shape[dim]), part)
            found.setdefault(dim, []).append(_Piece(edge.gives[0], covers, isinstance(part, int)))
    return found


def _step(label: str, constants: Sequence[Any]) -> Step:
    """The dimension and the part of it that `slice` or `select` (or their gradients) take."""
    dim = constants[0] if constants else 0
    return (dim, constants[1]) if label.startswith("select") else (dim, slice(*_padded(constants[1:])))


def _padded(bounds: Sequence[Any]) -> tuple[Any, Any, Any]:
    start, stop, step = (*bounds, None, None, None)[:3]
    return start, stop, step


def _restrict(covers: range, part: slice | int) -> range:
    if isinstance(part, slice):
        return covers[part]
    index = part % len(covers)
    return covers[index : index + 1]


def _tilings(reader: Reader) -> Iterator[Region]:
    """A value from pieces that cover it without overlap along one dimension."""
    for source in list(reader.uses):
        for dim, pieces in _pieces(reader, source).items():
            size = reader.shape(source)[dim]
            for first in [piece for piece in pieces if piece.covers[:1] == range(1)][:8]:
                chain = _chain(pieces, first, size)
                if chain is not None:
                    function = partial(_concatenate, dim, tuple(piece.selected for piece in chain))
                    yield Region((source,), tuple(piece.value for piece in chain), function, "inverse of slices")
            comb = _comb(pieces, size)
            if comb is not None:
                values = tuple(piece.value for piece in comb)
                yield Region((source,), values, partial(_interleave, dim), "inverse of strided slices")


def _chain(pieces: Sequence[_Piece], first: _Piece, size: int) -> list[_Piece] | None:
    """Contiguous pieces from `first` to the end, each starting where the one before stops."""
    contiguous = [p for p in pieces if len(p.covers) and (p.covers.step == 1 or len(p.covers) == 1)]
    if first not in contiguous:
        return None
    dead: set[int] = set()

    def extend(position: int) -> list[_Piece] | None:
        if position == size:
            return []
        for piece in contiguous:
            if piece.covers.start == position and position not in dead:
                rest = extend(position + len(piece.covers))
                if rest is not None:
                    return [piece, *rest]
        dead.add(position)
        return None

    rest = extend(len(first.covers))
    return None if rest is None else [first, *rest]


def _comb(pieces: Sequence[_Piece], size: int) -> list[_Piece] | None:
    """Slices `[k::step]` for every k below the step."""
    for step in sorted({piece.covers.step for piece in pieces if piece.covers.step > 1}):
        teeth = {p.covers.start: p for p in pieces if p.covers.step == step and len(p.covers) * step == size}
        if set(range(step)) <= set(teeth):
            return [teeth[k] for k in range(step)]
    return None


def _concatenate(dim: int, selected: Sequence[bool], *pieces: Tensor) -> Tensor:
    return torch.cat([p.unsqueeze(dim) if s else p for p, s in zip(pieces, selected, strict=True)], dim)


def _interleave(dim: int, *pieces: Tensor) -> Tensor:
    return torch.stack(pieces, dim + 1).flatten(dim, dim + 1)


# -- sums ----------------------------------------------------------------------------------------------------------


def _is_sum(reader: Reader, edge: Edge | None) -> bool:
    if edge is None or edge.label != "add" or edge.operations[0].kwargs or len(edge.needs) != 2:
        return False
    values = [reader.graph.values[value] for value in (*edge.gives, *edge.needs)]
    return len({(value.shape, value.dtype) for value in values}) == 1


def _inner(reader: Reader, value: int) -> Edge | None:
    """The sum that `value` is, if it is only read by one other sum."""
    edge = reader.graph.definition.get(value)
    uses = reader.uses.get(value, ())
    alone = len(uses) == 1 and value not in reader.results and _is_sum(reader, uses[0])
    return edge if alone and _is_sum(reader, edge) else None


def added_up(reader: Reader, root: Edge) -> list[int]:
    """What a tree of sums adds up, in order."""
    found, stack = [], list(root.needs)[::-1]
    while stack:
        value = stack.pop()
        inner = _inner(reader, value)
        if inner is None:
            found.append(value)
        else:
            stack.extend(reversed(inner.needs))
    return found


def sum_roots(reader: Reader) -> Iterator[Edge]:
    for edge in reader.edges("add"):
        if _is_sum(reader, edge) and _inner(reader, edge.gives[0]) is None:
            yield edge


def subtract(total: Tensor, others: Sequence[Tensor]) -> Tensor:
    for other in others:
        total = total - other
    return total


# -- the sum of disjoint slice gradients ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Embedded:
    """A cotangent placed into zeros by slice gradients: the steps from the outside, and what it covers."""

    source: int
    steps: tuple[tuple[int, Any], ...]
    box: tuple[range, ...]

    def overlaps(self, other: _Embedded) -> bool:
        return all(_meet(a, b) for a, b in zip(self.box, other.box, strict=True))


def _meet(a: range, b: range) -> bool:
    if a.step == b.step == 1:
        return max(a.start, b.start) < min(a.stop, b.stop)
    return not set(a).isdisjoint(b)


def _embedded(reader: Reader, value: int) -> _Embedded | None:
    box = [range(size) for size in reader.shape(value)]
    dims = list(range(len(box)))
    steps: list[tuple[int, Any]] = []
    while (edge := reader.made_by(value, "slice_backward", "select_backward")) is not None:
        dim, part = _step(edge.label, reader.args(edge)[2:])
        dim %= len(dims)
        box[dims[dim]] = _restrict(box[dims[dim]], part)
        if isinstance(part, int):
            del dims[dim]
        # A slice is not hashable before Python 3.12, and the steps are part of a cache key.
        steps.append((dim, part if isinstance(part, int) else (part.start, part.stop, part.step)))
        value = edge.needs[0]
    return _Embedded(value, tuple(steps), tuple(box)) if steps else None


def _disjoint_sums(reader: Reader) -> Iterator[Region]:
    """The cotangents of the pieces from the cotangent of the whole."""
    for root in sum_roots(reader):
        summands = added_up(reader, root)
        leaves = {value: leaf for value in summands if (leaf := _embedded(reader, value)) is not None}
        parts = list(leaves.values())
        sources = [leaf.source for leaf in parts]
        others = [value for value in summands if value not in leaves]
        repeated = len(set(summands)) < len(summands) or len(set(sources)) < len(sources) or set(sources) & set(others)
        if len(parts) < 2 or repeated or any(a.overlaps(b) for i, a in enumerate(parts) for b in parts[:i]):
            continue
        function = partial(_cut, tuple(leaf.steps for leaf in parts))
        yield Region(tuple(sources), (root.gives[0], *others), function, "inverse of slice gradients")


def _cut(paths: Sequence[Sequence[tuple[int, Any]]], total: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    total = subtract(total, others)
    return tuple(_follow(total, path) for path in paths)


def _follow(tensor: Tensor, path: Sequence[tuple[int, Any]]) -> Tensor:
    for dim, part in path:
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            tensor = torch.ops.aten.slice(tensor, dim, part[0], part[1], part[2] or 1)
    return tensor


# -- MaxMin --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Masked:
    """A summand `masked_fill(where(a == b, g / 2, g), mask, 0)` where the mask says `larger > smaller`."""

    cotangent: int
    mask: int
    larger: int
    smaller: int

    @property
    def opposite(self) -> tuple[int, int, int]:
        return self.cotangent, self.smaller, self.larger

    @property
    def key(self) -> tuple[int, int, int]:
        return self.cotangent, self.larger, self.smaller


def _comparison(reader: Reader, value: int | None, *labels: str) -> tuple[int, int] | None:
    """The two compared values, larger first."""
    edge = reader.made_by(value, *labels)
    if edge is None or len(edge.needs) != 2 or reader.shape(edge.needs[0]) != reader.shape(edge.needs[1]):
        return None
    a, b = reader.value(edge, 0), reader.value(edge, 1)
    if a is None or b is None:
        return None
    return (b, a) if edge.label == "lt" else (a, b)


def _masked(reader: Reader, value: int) -> _Masked | None:
    fill = reader.made_by(value, "masked_fill")
    if fill is None or reader.args(fill)[2] != 0:
        return None
    where, mask = reader.made_by(reader.value(fill, 0), "where"), reader.value(fill, 1)
    order = _comparison(reader, mask, "gt", "lt")
    if where is None or order is None or mask is None:
        return None
    tied, half, cotangent = (reader.value(where, i) for i in range(3))
    tie = _comparison(reader, tied, "eq")
    halved = reader.made_by(half, "div")
    if tie is None or set(tie) != set(order) or halved is None or cotangent is None:
        return None
    if reader.args(halved)[1] != 2 or halved.needs != (cotangent,) or halved.operations[0].kwargs:
        return None
    return _Masked(cotangent, mask, *order)


def _maxmins(reader: Reader) -> Iterator[Region]:
    """Both cotangents of max(a, b) and min(a, b) from those of a and b, and the other way round at less cost.

    Exact ties share the cotangent in torch, which cannot be undone; here one side gets it all.
    """
    first: dict[tuple[Any, ...], tuple[int, list[int], int]] = {}
    for root in sum_roots(reader):
        summands = added_up(reader, root)
        terms = {value: term for value in summands if (term := _masked(reader, value)) is not None}
        if len(terms) != 2 or len(set(summands)) < len(summands):
            continue
        p, q = sorted(terms.values(), key=lambda term: term.cotangent)
        if (p.larger, p.smaller) != (q.smaller, q.larger) or p.cotangent == q.cotangent:
            continue
        others = [value for value in summands if value not in terms]
        partner = first.get((p.opposite, q.opposite))
        if partner is None:
            first[p.key, q.key] = (root.gives[0], others, q.mask)
        else:
            # Where its mask says so, the partner received all of p and this sum all of q.
            total, rest, mask = partner
            yield from _maxmin((p.cotangent, q.cotangent), (total, root.gives[0]), mask, rest, others)


def _maxmin(
    inside: tuple[int, int], outside: tuple[int, int], mask: int, rest: Sequence[int], others: Sequence[int]
) -> Iterator[Region]:
    known = {*rest, *others}
    if known & {*inside, *outside}:
        return
    needs = (mask, *rest, *others)
    yield Region(inside, (*outside, *needs), partial(_undo_maxmin, len(rest)), "inverse of maxmin")
    yield Region(outside, (*inside, *needs), partial(_do_maxmin, len(rest)), "maxmin from its mask", inverse=False)


def _undo_maxmin(count: int, a: Tensor, b: Tensor, mask: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    a, b = subtract(a, others[:count]), subtract(b, others[count:])
    return torch.where(mask, a, b), torch.where(mask, b, a)


def _do_maxmin(count: int, p: Tensor, q: Tensor, mask: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.where(mask, p, q), torch.where(mask, q, p)
    return sum(others[:count], a), sum(others[count:], b)


def _maxima(reader: Reader) -> Iterator[Region]:
    """The cotangent of max(a, b), or of min(a, b), from what both sides get of it: their sum, also where they tie."""
    first: dict[tuple[int, int, int], int] = {}
    for edge in reader.edges("masked_fill"):
        term = _masked(reader, edge.gives[0])
        if term is None:
            continue
        other = first.setdefault(term.opposite, edge.gives[0])
        if other != edge.gives[0]:
            yield Region((term.cotangent,), (other, *edge.gives), partial(torch.add), "inverse of a maximum")
        first.setdefault(term.key, edge.gives[0])


# -- abs -----------------------------------------------------------------------------------------------------------


def _signed(reader: Reader) -> Iterator[Region]:
    """The factor of a sign, in one pass over what the sign is of. As in packed signs, an exact zero is negative."""
    values = reader.graph.values
    for edge in reader.edges("mul"):
        for factor in (0, 1):
            value, sign = reader.value(edge, factor), reader.made_by(reader.value(edge, 1 - factor), "sgn", "sign")
            if value is None or sign is None or value in (*sign.gives, *sign.needs):
                continue
            layouts = {(values[v].shape, values[v].dtype) for v in (*edge.gives, value, *sign.needs)}
            if len(layouts) == 1 and reader.capture.fake(value).is_floating_point():
                yield Region((value,), (*edge.gives, *sign.needs), partial(_times_sign), "inverse of times sign")


def _times_sign(y: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.leaky_relu_backward(y, x, -1.0, False)


# -- sort ----------------------------------------------------------------------------------------------------------


def _sorts(reader: Reader) -> Iterator[Region]:
    """The gradient of `sort` scatters by a permutation: gather undoes it."""
    for edge in reader.edges("scatter"):
        target, index, source = (reader.value(edge, i) for i in (0, 2, 3))
        order = reader.made_by(index, "sort", "topk")
        if order is None or target is None or index is None or source is None or edge.operations[0].kwargs:
            continue
        if reader.shape(source) != reader.shape(index) or not reader.shape(index):
            continue
        dim = reader.args(edge)[1] % len(reader.shape(index))
        if index == order.gives[-1] and _sorted_dim(reader, order) == dim:
            yield Region((source,), (edge.gives[0], index), partial(_gather, dim), "inverse of sort's gradient")


def _sorted_dim(reader: Reader, order: Edge) -> int:
    operation = order.operations[0]
    place = 2 if order.label == "topk" else 1
    dim = operation.kwargs.get("dim", operation.args[place] if len(operation.args) > place else -1)
    return int(dim) % len(reader.shape(order.needs[0]))


def _gather(dim: int, total: Tensor, index: Tensor) -> Tensor:
    return total.gather(dim, index)
