"""Sums of several values, as the trees of `add` in which they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..graph import Edge
from .reader import Reader


def is_sum(reader: Reader, edge: Edge | None) -> bool:
    if edge is None or edge.label != "add" or edge.operations[0].kwargs or len(edge.needs) != 2:
        return False
    values = [reader.graph.values[value] for value in (*edge.gives, *edge.needs)]
    return len({(value.shape, value.dtype) for value in values}) == 1


def _inner(reader: Reader, value: int) -> Edge | None:
    """The sum that `value` is, if it is only read by one other sum."""
    edge = reader.graph.definition.get(value)
    uses = reader.uses.get(value, ())
    alone = len(uses) == 1 and value not in reader.results and is_sum(reader, uses[0])
    return edge if alone and is_sum(reader, edge) else None


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
        if is_sum(reader, edge) and _inner(reader, edge.gives[0]) is None:
            yield edge


def subtract(total: Tensor, others: Sequence[Tensor]) -> Tensor:
    for other in others:
        total = total - other
    return total
