"""Segments that are computed again, in one go or in pieces; what long ones cost is told from shorter ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

from ..costs import Cost
from ..emit import Segment
from .keeping import Keeping
from .kinds import Kinds
from .move import Move
from .nesting import SPLITS, Nesting, Unit, segments_of

CLOSE = 1e-3  # part by which a cost may be off where it was told from others


class Checkpoints:
    """The moves that compute again. `keeping` is what pieces may keep; None where they may not."""

    def __init__(self, kinds: Kinds, keeping: Keeping | None) -> None:
        self.kinds, self.keeping = kinds, keeping
        self.facts, self.analysis = kinds.facts, kinds.analysis
        self.found: dict[tuple[int, int], Move | None] = {}  # by first and last block
        self.foretold: set[tuple[int, int]] = set()  # those whose costs follow from shorter ones
        self.longest = 2 * math.isqrt(len(kinds.keys)) + 4  # blocks that are computed again in one go

    def segment(self, first: int, last: int) -> Segment:
        """These blocks computed again in one go. What they read of later blocks, such as a sum over all, is kept."""
        kept = frozenset(self.analysis.blocks[first].live_in).union(*self.kinds.residues[first : last + 1])
        later = {v for index in range(first, last + 1) for v, maker in self.kinds.later[index] if maker > last}
        return Segment(first, last, "checkpoint", kept | later)

    def inner(self, move: Move) -> tuple[Segment, ...]:
        return segments_of(move.pieces, move.segment.first, self._piece)

    def moves(self, last: int) -> Iterator[Move]:
        found = (self.move(first, last) for first in range(last, max(-1, last - self.longest), -1))
        yield from (move for move in found if move is not None)

    def nested(self, last: int) -> Iterator[Move]:
        """Checkpoints that are computed again in pieces; those of one piece are `moves`."""
        for length in SPLITS[1:]:
            first = last - length + 1
            if first < 0 or length > 4 * self.longest:
                return
            outer = self.segment(first, last)
            for option in self.nesting.options(first, last):
                if option.nested:
                    yield Move(outer, self.nesting.cost(first, last, option), pieces=option.pieces)

    def move(self, first: int, last: int) -> Move | None:
        if (first, last) not in self.found:
            segment = self.segment(first, last)
            cost = self._recomputing(segment)
            self.found[first, last] = None if cost is None else Move(segment, cost)
        return self.found[first, last]

    def _recomputing(self, segment: Segment) -> Cost | None:
        """What a checkpoint costs: simulated, or told from the three within it where those were foretold as well."""
        first, last = segment.first, segment.last
        parts = [(first, last - 1), (first + 1, last), (first + 1, last - 1)]
        if last - first < 2 or self._bypassed(first, last):
            return self.kinds.cost("checkpoint", segment)
        front, back, both = (self._cost(*part) for part in parts)
        if front is None or back is None or both is None:
            return self.kinds.cost("checkpoint", segment)
        told = foretold(front, back, both)
        cost = told if self.foretold.issuperset(parts) else self.kinds.cost("checkpoint", segment)
        if cost is not None and are_close(told, cost):
            self.foretold.add((first, last))
        return cost

    def _bypassed(self, first: int, last: int) -> bool:
        """Whether the first and the last block share a value that the blocks between them do not touch."""
        passing = self.facts.passing
        return not passing(range(first + 1, last)) <= passing([first]) | passing([last])

    def _cost(self, first: int, last: int) -> Cost | None:
        move = self.move(first, last)
        return None if move is None else move.cost

    # -- in pieces ---------------------------------------------------------------------------------------------------

    @cached_property
    def nesting(self) -> Nesting:
        return Nesting([self._unit(index) for index in range(len(self.kinds.keys))], self._cost, self.longest)

    def _unit(self, index: int) -> Unit:
        analysis, block = self.analysis, self.analysis.blocks[index]
        checkpoint = self._cost(index, index)
        entering = {*block.live_in} - self.facts.passing([index])
        return Unit(
            kind=self.kinds.keys[index],
            forward_s=self.facts.seconds(index)[0],
            border=sum(size for _, size in {analysis.charges[value] for value in entering}),
            drawn=checkpoint.own if checkpoint else 0,
            gradients=self.kinds.gradients[index],
            keeps=self._costs_of_keeping(self.keeping, index) if checkpoint and self.keeping else (),
        )

    def _costs_of_keeping(self, keeping: Keeping, index: int) -> tuple[Cost, ...]:
        """Where they lie within a checkpoint, masks are packed: these moves come first. (What cannot be computed from
        the block's inputs could not be kept there: then there are none.)"""
        return tuple(move.cost for move in keeping.moves(index) if not move.segment.whole)

    def _piece(self, first: int, last: int, keep: int | None) -> Segment:
        if keep is None:
            return self.segment(first, last)
        assert self.keeping is not None
        return self.keeping.moves(first)[keep].segment


def foretold(front: Cost, back: Cost, both: Cost) -> Cost:
    """What a checkpoint costs by those without its last block, without its first, and without both."""
    own = front.own + back.own - both.own
    return Cost(
        own=own,
        border_in=front.border_in,
        covers_in=front.covers_in,
        covers_out=back.covers_out,
        forward_peak=max(front.forward_peak, back.forward_peak - back.kept + own + front.border_in),
        backward_peak=front.backward_peak + back.backward_peak - both.backward_peak,
        seconds=front.seconds + back.seconds - both.seconds,
    )


def are_close(one: Cost, other: Cost) -> bool:
    """Whether two costs are the same but for roundings."""
    return (one.covers_in, one.covers_out) == (other.covers_in, other.covers_out) and all(
        math.isclose(a, b, rel_tol=CLOSE)
        for a, b in (
            (one.kept, other.kept),
            (one.forward_peak, other.forward_peak),
            (one.backward_peak, other.backward_peak),
            (one.seconds, other.seconds),
        )
    )
