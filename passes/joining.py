"""Cuts that a reversible step is better off without.

The narrowest place of a coupling is often inside the network that it runs, and no inverse starts there: what is alive
is a hidden layer. Such a cut is dropped where the blocks around it can be inverted together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .graph import Edge, Graph
from .inverse.solve import solve

TOGETHER = 6  # blocks that may become one


class _Joiner:
    """Asks of spans of the forward chain whether what enters follows from what leaves."""

    def __init__(
        self, graph: Graph, chain: Sequence[Edge], live: Sequence[frozenset[int]], inverse: Iterable[Edge]
    ) -> None:
        self.graph, self.chain, self.live = graph, chain, live
        self.static = graph.static | {*graph.primals}
        self.giving: dict[int, list[Edge]] = {}
        for edge in inverse:
            if edge.kind == "inverse" and edge.stage == "forward":
                for value in edge.gives:
                    self.giving.setdefault(value, []).append(edge)

    def inverts(self, first: int, last: int) -> bool:
        """Whether something is lost between the two places, and all of it comes back."""
        lost = self.live[first] - self.live[last]
        if not lost or not all(value in self.giving for value in lost):
            return False
        forward = [edge for edge in self.chain[first:last] if not edge.random and not edge.effect]
        scope = self.live[first].union(*(edge.gives for edge in forward))
        known = scope | self.live[last] | self.static
        backward = {
            id(edge): edge
            for value in scope
            for edge in self.giving.get(value, ())
            if known.issuperset(edge.needs) and known.issuperset(edge.gives)
        }
        at_hand = self.live[last] | {
            v for edge in (*forward, *backward.values()) for v in edge.needs if v in self.static
        }
        return not solve([*forward, *backward.values()], at_hand, lost).missing


def joined_cuts(
    graph: Graph, chain: Sequence[Edge], live: Sequence[frozenset[int]], cuts: Sequence[int], inverse: Iterable[Edge]
) -> list[int]:
    """The cuts that stay, from the last to the first; `live[p]` are the values alive before edge p of the chain."""
    joiner = _Joiner(graph, chain, live, inverse)
    borders = [0, *cuts, len(chain)]
    kept, last = [], len(borders) - 1
    while last > 0:
        spans = range(last - 1, max(-1, last - 1 - TOGETHER), -1)
        nearest = live[borders[last - 1]] <= live[borders[last]]  # all that enters leaves: nothing to solve for
        first = last - 1 if nearest else next((p for p in spans if joiner.inverts(borders[p], borders[last])), last - 1)
        kept.append(borders[first])
        last = first
    return [cut for cut in reversed(kept) if cut]
