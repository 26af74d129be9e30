"""Segments that keep: one block, or a run of neighbours, with one of the sets of values that it may keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..blocks import Block
from ..costs import storages
from ..emit import Segment
from ..solutions import drawn
from .keepsets import keep_sets, kept_as_one, not_packed
from .kinds import Kinds
from .move import Move

PRICES = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
RUNS = (2, 4)  # blocks that may keep as one, without what is between them

KeepSet = tuple[frozenset[int], float]  # the highest price of a second, in bytes, at which it is the cheapest


class Keeping:
    """The moves that keep. Kept sets are found once for each kind of block, and of run."""

    def __init__(self, kinds: Kinds) -> None:
        self.kinds, self.facts, self.analysis = kinds, kinds.facts, kinds.analysis
        self.sets: dict[int, list[tuple[tuple[int, ...], float]]] = {}  # positions in the block and prices, by its kind
        self.run_sets: dict[object, list[tuple[list[tuple[int, ...]], float]]] = {}  # likewise, positions in each block
        self.found: dict[int, list[Move]] = {}  # by block

    def plain(self, index: int) -> Segment:
        """One block under plain backpropagation: all that its backward pass reads is kept, and as it is."""
        everything, price = self._sets(index)[0]
        kept = everything | drawn(self.analysis, self.analysis.blocks[index])
        return Segment(index, index, "keep", kept, whole=not_packed(self.analysis, kept, price))

    def moves(self, index: int) -> list[Move]:
        """What could be kept as bits is; behind these moves stand those that pack only what is worth its time."""
        if index not in self.found:
            sets = self._sets(index)
            ways = [*((kept, 0.0) for kept, _ in sets), *sets]
            moves = (self._move(index, *way, anchored) for way in ways for anchored in (False, True))
            self.found[index] = [move for move in moves if move is not None]
        return self.found[index]

    def _move(self, index: int, kept: frozenset[int], price: float, anchored: bool) -> Move | None:
        """One of the kept sets of a block, `anchored` with all that enters it; None where the move adds nothing."""
        entering = frozenset(self.analysis.blocks[index].live_in if anchored else ())
        name = ("keep", self.kinds.positions(kept, index), price, anchored)
        move = self._keeping(index, index, kept | entering, price, name)
        return move if move is not None and (move.cost.covers_in or not anchored) else None

    def _keeping(self, first: int, last: int, kept: frozenset[int], price: float, name: object) -> Move | None:
        """These blocks with all that they draw; at a price, None where everything is worth packing."""
        blocks = self.analysis.blocks[first : last + 1]
        values = kept.union(*(drawn(self.analysis, block) for block in blocks))
        values = self._with_borders(values, (blocks[0], blocks[-1]))
        whole = not_packed(self.analysis, values, price)
        if price and not whole:
            return None
        segment = Segment(first, last, "keep", values, whole=whole)
        cost = self.kinds.cost(name, segment)
        return None if cost is None else Move(segment, cost)

    def _sets(self, index: int) -> list[KeepSet]:
        kinds = self.kinds
        kind = kinds.keys[index]
        if kind not in self.sets:
            block = self.analysis.blocks[index]
            seconds = self.facts.seconds(index)[0] or 1e-9
            scale = self.analysis.graph.storage_bytes(block.demanded) / seconds
            sets = keep_sets(self.analysis, block, [price * scale for price in PRICES])
            self.sets[kind] = [(kinds.positions(kept, index), price) for kept, price in sets]
        return [(kinds.values(positions, index), price) for positions, price in self.sets[kind]]

    def _with_borders(self, kept: frozenset[int], ends: Iterable[Block]) -> frozenset[int]:
        """Of a storage that is kept anyway, every value at the borders: an inverted neighbour needs them all."""
        charges, there = self.analysis.charges, storages(self.analysis, kept)
        borders = {value for block in ends for value in (*block.live_in, *block.live_out)}
        return kept | {value for value in borders if charges[value][0] in there}

    # -- runs ------------------------------------------------------------------------------------------------------

    def runs(self, last: int) -> Iterator[Move]:
        """Blocks that keep as one: what they hand to each other may follow from what they keep anyway."""
        for first in (last - length + 1 for length in RUNS if length <= last + 1):
            links = self._links(first, last)
            for number, (kept, price) in enumerate(self._run_sets(first, last, links)):
                moves = (self._keeping(first, last, kept, at, ("run", links, number, at)) for at in (0.0, price))
                yield from (move for move in moves if move is not None)

    def _run_sets(self, first: int, last: int, links: object) -> list[KeepSet]:
        """What such blocks may keep; only what is less than they keep one by one."""
        span = range(first, last + 1)
        key = self.kinds.of(span), links
        if key not in self.run_sets:
            blocks, sets = self.analysis.blocks[first : last + 1], dict[frozenset[int], float]()
            for price in sorted({price for index in span for _, price in self._sets(index)}):
                alone = frozenset[int]().union(*(self._set_at(index, price) for index in span))
                kept = kept_as_one(self.analysis, blocks, alone, price)
                if kept != alone:
                    sets[kept] = price
            self.run_sets[key] = [
                ([self.kinds.positions(kept, index) for index in span], price) for kept, price in sets.items()
            ]
        return [
            (frozenset[int]().union(*map(self.kinds.values, positions, span)), price)
            for positions, price in self.run_sets[key]
        ]

    def _links(self, first: int, last: int) -> tuple[tuple[int | None, ...], ...]:
        """Which positions in these blocks stand for the same values."""
        places = self.kinds.places
        entering = dict.fromkeys(
            value for block in self.analysis.blocks[first + 1 : last + 1] for value in block.live_in
        )
        return tuple(tuple(places[index].get(value) for index in range(first, last + 1)) for value in entering)

    def _set_at(self, index: int, price: float) -> frozenset[int]:
        """The cheapest of the kept sets of a block, where a second costs `price` bytes."""
        return next(kept for kept, highest in reversed(self._sets(index)) if highest >= price)
