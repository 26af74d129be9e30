"""Maps that fold: abs, MaxMin, sort. Their Jacobians are signs and permutations.

The cotangent of what they give follows from that of what they read. So do their inputs from their outputs, with what
says which side was which: a sign, a mask or an index, kept as a bit per element where it has two values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..graph import Edge
from .reader import Reader
from .rule import Region
from .sums import added_up, subtract, sum_roots


def find_folds(reader: Reader) -> Iterator[Region]:
    yield from _maxmins(reader)
    yield from _ordered_pairs(reader)
    yield from _maxima(reader)
    yield from _sort_gradients(reader)
    yield from _sorts(reader)
    yield from _signed(reader)
    yield from _absolutes(reader)


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


def _ordered_pairs(reader: Reader) -> Iterator[Region]:
    """a and b from max(a, b), min(a, b) and a > b."""
    smaller = {frozenset(edge.needs): edge for edge in reader.edges("minimum")}
    for larger in reader.edges("maximum"):
        pair = frozenset(larger.needs)
        if len(pair) < 2 or pair not in smaller or len({reader.shape(value) for value in pair}) > 1:
            continue
        for test in reader.uses[larger.needs[0]]:
            order = _comparison(reader, test.gives[0], "gt", "lt")
            if order is not None and {*order} == pair:
                both = (*larger.gives, *smaller[pair].gives)
                yield from _both_ways(both, order, test.gives, partial(_choose), partial(_choose), "maxmin by its mask")


def _choose(larger: Tensor, smaller: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, larger, smaller), torch.where(mask, smaller, larger)


def _both_ways(
    folded: tuple[int, ...],
    sources: tuple[int, ...],
    sides: tuple[int, ...],
    fold: Callable[..., Any],
    unfold: Callable[..., Any],
    label: str,
) -> Iterator[Region]:
    """What a fold gives from what it reads, and the other way round, on sides that stay as they were."""
    yield Region(folded, (*sources, *sides), fold, label, inverse=False)
    yield Region(sources, (*folded, *sides), unfold, f"inverse of {label}")


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


def _absolutes(reader: Reader) -> Iterator[Region]:
    for edge in reader.edges("abs"):
        source = edge.needs[0]
        for sign in reader.uses[source]:
            if sign.label in ("sgn", "sign") and reader.capture.fake(source).is_floating_point():
                times = partial(torch.mul)
                yield from _both_ways(edge.gives, edge.needs, sign.gives, times, times, "abs by its sign")


# -- sort ----------------------------------------------------------------------------------------------------------


def _sort_gradients(reader: Reader) -> Iterator[Region]:
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


def _sorts(reader: Reader) -> Iterator[Region]:
    for edge in reader.edges("sort"):
        if len(edge.gives) == 2 and reader.shape(edge.needs[0]):
            dim = _sorted_dim(reader, edge)
            ways = partial(_gather, dim), partial(_scatter, dim)
            yield from _both_ways(edge.gives[:1], edge.needs, edge.gives[1:], *ways, "sort by its indices")


def _scatter(dim: int, values: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(values).scatter(dim, index, values)
