"""Blocks by kind: what is found for one holds for all that equal it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..costs import Cost, segment_cost, signature, with_passing
from ..emit import Segment
from ..solutions import Facts, residue


class Kinds:
    """The blocks of a step. Equal ones have equal `keys`, and their values stand at equal positions."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.analysis = facts, facts.analysis
        blocks = self.analysis.blocks
        signatures = [signature(facts, block) for block in blocks]
        self.keys = number([key for key, _ in signatures])
        self.orders = [order for _, order in signatures]
        self.places = [{value: place for place, value in enumerate(order)} for order in self.orders]
        self.residues = [residue(self.analysis, block) for block in blocks]
        made = self.analysis.block_of
        self.later = [[(v, made[v]) for v in b.demanded if made.get(v, b.index) > b.index] for b in blocks]
        self.gradients = [self._gradient_bytes(index) for index in range(len(blocks))]
        self.costs: dict[object, Cost | None] = {}

    def _gradient_bytes(self, index: int) -> int:
        return sum(size for _, size in {self.analysis.charges[value] for value in self.facts.gradients(index)})

    def of(self, span: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.keys[index] for index in span)

    def positions(self, values: Iterable[int], block: int) -> tuple[int, ...]:
        """Where these values stand in a block; those of other blocks are left out."""
        places = self.places[block]
        return tuple(places[value] for value in values if value in places)

    def values(self, positions: Iterable[int], block: int) -> frozenset[int]:
        return frozenset(self.orders[block][position] for position in positions)

    def shape(self, segment: Segment) -> object:
        """Equal for segments that treat equal blocks in the same way."""
        kept = tuple(
            tuple(sorted(self.positions(values, index)))
            for index in segment.span
            for values in (segment.kept, segment.whole)
        )
        inner = tuple((self.shape(part), part.first - segment.first) for part in segment.inner)
        return segment.strategy, self.of(segment.span), kept, inner

    def cost(self, name: object, segment: Segment) -> Cost | None:
        """What a segment costs; those of the same `name` and kinds of blocks are simulated once."""
        kinds = self.of(segment.span)
        if (name, kinds) not in self.costs:
            self.costs[name, kinds] = segment_cost(self.facts, segment)
        cost = self.costs[name, kinds]
        return None if cost is None else with_passing(self.facts, segment, cost)


def number(keys: Sequence[object]) -> list[int]:
    """Equal keys get equal numbers, in order of first appearance."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
