"""The engine: from known values to wanted ones, through forward operations and inverse rules alike."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..graph import Edge


@dataclass(frozen=True)
class Solution:
    """`edge[v]` is the edge that gives v, `missing` the wanted values that nothing reaches."""

    edge: Mapping[int, Edge]
    known: frozenset[int]
    missing: tuple[int, ...]

    def program(self, wanted: Iterable[int]) -> list[Edge]:
        """The edges that lead to `wanted`, each once, in an order that can be executed."""
        order: dict[int, Edge] = {}
        done = set(self.known)
        for value in wanted:
            for edge in self._path(value, done):
                order.setdefault(id(edge), edge)
        return list(order.values())

    def _path(self, value: int, done: set[int]) -> Iterator[Edge]:
        stack = [value]
        while stack:
            top = stack[-1]
            if top in done:
                stack.pop()
                continue
            edge = self.edge[top]
            waiting = [need for need in edge.needs if need not in done]
            if waiting:
                stack.extend(reversed(waiting))
                continue
            yield edge
            done.update(edge.gives)
            stack.pop()


def solve(edges: Iterable[Edge], known: Iterable[int], wanted: Iterable[int]) -> Solution:
    """The lightest way to every value that can be reached (Knuth's generalisation of Dijkstra's algorithm).

    A value's weight is the seconds of its edge plus the weight of the heaviest value that the edge needs, which
    never decreases along an edge, so the first time a value is reached is final.
    """
    edges = list(edges)
    readers: dict[int, list[int]] = {}
    waiting = []
    for position, edge in enumerate(edges):
        needs = set(edge.needs)
        waiting.append(len(needs))
        for value in needs:
            readers.setdefault(value, []).append(position)
    start = frozenset(known)
    heap: list[tuple[float, int, int]] = [(0.0, -1, value) for value in sorted(start.intersection(readers))]
    heap += [(edges[p].seconds, p, value) for p, count in enumerate(waiting) if not count for value in edges[p].gives]
    heapq.heapify(heap)
    chosen: dict[int, Edge] = {}
    reached: set[int] = set()
    while heap:
        weight, position, value = heapq.heappop(heap)
        if value in reached or (value in start and position >= 0):
            continue
        reached.add(value)
        if position >= 0:
            chosen[value] = edges[position]
        for reader in readers.get(value, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                for given in edges[reader].gives:
                    heapq.heappush(heap, (weight + edges[reader].seconds, reader, given))
    reached |= start
    return Solution(chosen, start, tuple(value for value in wanted if value not in reached))
