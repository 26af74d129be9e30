"""The moves of the planner: every segment that it may append, with what it costs.

Segments of the same shape are emitted and simulated once; what long checkpoints cost is told from shorter ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .blocks import Block
from .certificates import TRUSTED, Certificate, Noise, reach
from .costs import Cost, segment_cost, signature, storages, with_passing
from .emit import Segment, stored
from .inverse import INVERTED
from .keepsets import keep_sets, kept_as_one, not_packed
from .nesting import SPLITS, Nesting, Piece, Unit, segments_of
from .solutions import Facts, drawn, residue

CLOSE = 1e-3  # part by which a cost may be off where it was told from others
PRICES = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
RUNS = (2, 4)  # blocks that may keep as one, without what is between them


@dataclass(frozen=True)
class Move:
    """One candidate segment with its cost, and the gradient error that its certificates predict.

    What an inverted chain keeps is put together when it is chosen (`MoveMaker.segment`), and so are the inner segments
    of a nested checkpoint, from its `pieces`.
    """

    segment: Segment
    cost: Cost
    error: float = 0.0
    pieces: tuple[Piece, ...] = ()


class MoveMaker:
    """Makes the moves of one step; `certificates` may be extended between calls."""

    def __init__(self, facts: Facts, strategies: Sequence[str], tolerance: float) -> None:
        self.facts, self.analysis = facts, facts.analysis
        self.strategies, self.tolerance = tuple(strategies), tolerance
        self.certificates: dict[tuple[str, int], Certificate] = {}
        self.costs: dict[object, Cost | None] = {}
        self.keep_positions: dict[int, list[tuple[tuple[int, ...], float]]] = {}  # with prices, by kind of block
        self.run_positions: dict[object, list[tuple[list[tuple[int, ...]], float]]] = {}  # likewise, for each block
        self.exact: dict[int, list[Move]] = {}  # by last block: what no certificate changes
        self.keeps: dict[int, list[Move]] = {}
        self.checkpoints: dict[tuple[int, int], Move | None] = {}  # by first and last block
        self.foretold: set[tuple[int, int]] = set()  # those whose costs follow from shorter ones
        self.singles: dict[tuple[str, int], tuple[Segment, Cost] | None] = {}
        self.gradients = [self._gradient_bytes(index) for index in range(len(self.analysis.blocks))]
        self.residues = [residue(self.analysis, block) for block in self.analysis.blocks]
        self.signatures = [signature(facts, block) for block in self.analysis.blocks]
        self.places = [{value: place for place, value in enumerate(order)} for _, order in self.signatures]
        self.keys = number([key for key, _ in self.signatures])
        self.longest = 2 * math.isqrt(len(self.keys)) + 4  # blocks of a checkpoint that is recomputed in one go

    def _gradient_bytes(self, index: int) -> int:
        return sum(size for _, size in {self.analysis.charges[value] for value in self.facts.gradients(index)})

    def missing(self, strategy: str, index: int) -> tuple[int, ...]:
        """The values that keep a block from being inverted."""
        block = self.analysis.blocks[index]
        if strategy == "invert":
            return self.facts.inversion(index).missing
        if not block.cotangents_out:
            return block.cotangents_in or block.gradients
        return self.facts.spine(index).missing or self.facts.sweep(index).missing

    def ending_at(self, last: int) -> list[Move]:
        """Every segment of an allowed strategy whose last block is `last`; of inverted chains this one block."""
        if last not in self.exact:
            self.exact[last] = self._exact_moves(last)
        inverted = [self.inversion(last, last)] if self.reach[last] >= last else []
        return [*self.exact[last], *inverted, *(self._walks(last) if "moonwalk" in self.strategies else ())]

    def _exact_moves(self, last: int) -> list[Move]:
        moves = [*self._keep_moves(last), *self._run_moves(last)] if "keep" in self.strategies else []
        if "checkpoint" in self.strategies:
            moves = [*moves, *self._checkpoint_moves(last), *self._nested_moves(last)]
        return moves

    def segment(self, move: Move) -> Segment:
        """The segment of a chosen move, whole."""
        segment = move.segment
        if segment.strategy in INVERTED:
            return self.chain(segment.strategy, segment.first, segment.last)
        return replace(segment, inner=segments_of(move.pieces, segment.first, self._inner))

    def chain(self, strategy: str, first: int, last: int) -> Segment:
        """These blocks inverted, or walked, as one segment."""
        kept: frozenset[int] = frozenset()
        for index in range(last, first - 1, -1):
            if strategy == "moonwalk" and index < last:  # a walk keeps the border in front of it alone
                kept -= frozenset(self.analysis.blocks[index + 1].live_in)
            kept |= self._invertible(strategy, index)[0].kept
        return Segment(first, last, strategy, kept)

    def longest_chain(self, strategy: str, last: int) -> Segment | None:
        """The longest chain that ends at a block."""
        if strategy == "invert":
            first = next((index for index in range(last + 1) if self.reach[index] >= last), None)
        else:
            first = min((move.segment.first for move in self._walks(last)), default=None)
        return None if first is None else self.chain(strategy, first, last)

    def inversion(self, first: int, last: int) -> Move:
        """Inverted blocks joined to one move."""
        whole, noise, gradients = self._invertible("invert", last)[1], Noise("invert"), 0
        for index in range(last, first - 1, -1):
            noise = noise.grown(self._certificate("invert", index))
            if index < last:
                gradients += self.gradients[index + 1]
                whole = _joined_inversions(self._invertible("invert", index)[1], whole, gradients)
        return Move(Segment(first, last, "invert", frozenset()), whole, noise.error)

    @cached_property
    def reach(self) -> list[int]:
        """By block: the last one of the longest chain that is inverted down to it; -1 where it cannot be inverted."""
        count, ends = len(self.analysis.blocks), list[int]()
        able = [("invert" in self.strategies and self._single("invert", index) is not None) for index in range(count)]
        for index in reversed(range(count)):
            ends.append(ends[-1] if ends and able[index] and able[index + 1] else index + able[index])
        certificates = [self._certificate("invert", index) for index in range(count)]
        lengths = (reach(certificates[first:end], self.tolerance) for first, end in enumerate(reversed(ends)))
        return [first + length - 1 if length else -1 for first, length in enumerate(lengths)]

    def certify(self, certificates: Mapping[tuple[str, int], Certificate]) -> None:
        self.certificates.update(certificates)
        self.__dict__.pop("reach", None)

    def forbid_inversion(self) -> None:
        self.strategies = tuple(name for name in self.strategies if name not in INVERTED)
        self.__dict__.pop("reach", None)

    def plain(self, index: int) -> Segment:
        """One block under plain backpropagation: all that its backward pass reads is kept, and as it is."""
        everything, price = self._keep_sets(index)[0]
        kept = everything | drawn(self.analysis, self.analysis.blocks[index])
        return Segment(index, index, "keep", kept, whole=not_packed(self.analysis, kept, price))

    def checkpoint(self, first: int, last: int) -> Segment:
        """These blocks computed again in one go."""
        kept = frozenset(self.analysis.blocks[first].live_in).union(*self.residues[first : last + 1])
        return Segment(first, last, "checkpoint", kept)

    def shape(self, segment: Segment) -> object:
        """Equal for segments that treat equal blocks in the same way."""
        kept = tuple(
            tuple(sorted(self._positions(values, index)))
            for index in segment.span
            for values in (segment.kept, segment.whole)
        )
        inner = tuple((self.shape(part), part.first - segment.first) for part in segment.inner)
        return segment.strategy, tuple(self.keys[index] for index in segment.span), kept, inner

    def _translate(self, kept: Iterable[int], block: int) -> frozenset[int]:
        return frozenset(self.signatures[block][1][position] for position in kept)

    def _positions(self, kept: Iterable[int], block: int) -> tuple[int, ...]:
        places = self.places[block]
        return tuple(places[value] for value in kept if value in places)

    def _cost(self, name: object, segment: Segment) -> Cost | None:
        cost = self._own_cost(name, segment)
        return None if cost is None else with_passing(self.facts, segment, cost)

    def _own_cost(self, name: object, segment: Segment) -> Cost | None:
        """What passes through left out; segments of the same shape (`name` and block kinds) are simulated once."""
        kinds = tuple(self.keys[index] for index in segment.span)
        if (name, kinds) not in self.costs:
            self.costs[name, kinds] = segment_cost(self.facts, segment)
        return self.costs[name, kinds]

    def _keep_moves(self, index: int) -> list[Move]:
        if index not in self.keeps:
            self.keeps[index] = self._made_keep_moves(index)
        return self.keeps[index]

    def _made_keep_moves(self, index: int) -> list[Move]:
        """What could be kept as bits is; behind these moves stand those that pack only what is worth its time."""
        sets = self._keep_sets(index)
        ways = [*((kept, 0.0) for kept, _ in sets), *sets]
        moves = (self._keep_move(index, *way, anchored) for way in ways for anchored in (False, True))
        return [move for move in moves if move is not None]

    def _keep_move(self, index: int, kept: frozenset[int], price: float, anchored: bool) -> Move | None:
        """One of the kept sets of a block, `anchored` with all that enters it; None where the move adds nothing."""
        block = self.analysis.blocks[index]
        entering = frozenset(block.live_in if anchored else ())
        values = self._with_borders(kept | entering | drawn(self.analysis, block), block)
        whole = not_packed(self.analysis, values, price)
        if price and not whole:
            return None
        segment = Segment(index, index, "keep", values, whole=whole)
        cost = self._cost(("keep", self._positions(kept, index), price, anchored), segment)
        return Move(segment, cost) if cost is not None and (cost.covers_in or not anchored) else None

    def _run_moves(self, last: int) -> list[Move]:
        """Blocks that keep as one: what they hand to each other may follow from what they keep anyway."""
        moves = []
        for first in (last - length + 1 for length in RUNS if length <= last + 1):
            links = self._links(first, last)
            for number, (kept, price) in enumerate(self._run_sets(first, last, links)):
                moves += [self._run_move(first, last, kept, at, (links, number)) for at in (0.0, price)]
        return [move for move in moves if move is not None]

    def _run_move(self, first: int, last: int, kept: frozenset[int], price: float, name: object) -> Move | None:
        blocks = self.analysis.blocks[first : last + 1]
        values = kept.union(*(drawn(self.analysis, block) for block in blocks))
        values = self._with_borders(self._with_borders(values, blocks[0]), blocks[-1])
        whole = not_packed(self.analysis, values, price)
        if price and not whole:
            return None
        segment = Segment(first, last, "keep", values, whole=whole)
        cost = self._cost(("run", name, price), segment)
        return None if cost is None else Move(segment, cost)

    def _run_sets(self, first: int, last: int, links: object) -> list[tuple[frozenset[int], float]]:
        """What such blocks may keep, with prices at which that is best; only what is less than they keep one by one."""
        span = range(first, last + 1)
        key = tuple(self.keys[index] for index in span), links
        if key not in self.run_positions:
            blocks, sets = self.analysis.blocks[first : last + 1], dict[frozenset[int], float]()
            for price in sorted({price for index in span for _, price in self._keep_sets(index)}):
                alone = frozenset[int]().union(*(self._kept_at(index, price) for index in span))
                kept = kept_as_one(self.analysis, blocks, alone, price)
                if kept != alone:
                    sets[kept] = price
            found = sets.items()
            self.run_positions[key] = [
                ([self._positions(kept, index) for index in span], price) for kept, price in found
            ]
        return [
            (frozenset[int]().union(*map(self._translate, places, span)), price)
            for places, price in self.run_positions[key]
        ]

    def _links(self, first: int, last: int) -> tuple[tuple[int | None, ...], ...]:
        """Which places of these blocks stand for the same values."""
        entering = dict.fromkeys(
            value for block in self.analysis.blocks[first + 1 : last + 1] for value in block.live_in
        )
        return tuple(tuple(self.places[index].get(value) for index in range(first, last + 1)) for value in entering)

    def _kept_at(self, index: int, price: float) -> frozenset[int]:
        """The cheapest of the kept sets of a block, where a second costs `price` bytes."""
        return next(kept for kept, highest in reversed(self._keep_sets(index)) if highest >= price)

    def _with_borders(self, kept: frozenset[int], block: Block) -> frozenset[int]:
        """Of a storage that is kept anyway, every value at the borders: an inverted neighbour needs them all."""
        charges, there = self.analysis.charges, storages(self.analysis, kept)
        return kept | {value for value in (*block.live_in, *block.live_out) if charges[value][0] in there}

    def _keep_sets(self, index: int) -> list[tuple[frozenset[int], float]]:
        kind = self.keys[index]
        if kind not in self.keep_positions:
            block = self.analysis.blocks[index]
            seconds = self.facts.seconds(index)[0] or 1e-9
            scale = self.analysis.graph.storage_bytes(block.demanded) / seconds
            sets = keep_sets(self.analysis, block, [price * scale for price in PRICES])
            self.keep_positions[kind] = [(self._positions(kept, index), price) for kept, price in sets]
        return [(self._translate(kept, index), price) for kept, price in self.keep_positions[kind]]

    def _checkpoint_move(self, first: int, last: int) -> Move | None:
        if (first, last) not in self.checkpoints:
            segment = self.checkpoint(first, last)
            cost = self._recomputing(segment)
            self.checkpoints[first, last] = None if cost is None else Move(segment, cost)
        return self.checkpoints[first, last]

    def _recomputing(self, segment: Segment) -> Cost | None:
        """What a checkpoint costs: simulated, or told from the three within it where those were foretold as well."""
        first, last = segment.first, segment.last
        parts = [(first, last - 1), (first + 1, last), (first + 1, last - 1)]
        if last - first < 2 or self._bypassed(first, last):
            return self._cost("checkpoint", segment)
        front, back, both = (self._checkpoint_cost(*part) for part in parts)
        if front is None or back is None or both is None:
            return self._cost("checkpoint", segment)
        told = foretold(front, back, both)
        cost = told if self.foretold.issuperset(parts) else self._cost("checkpoint", segment)
        if cost is not None and are_close(told, cost):
            self.foretold.add((first, last))
        return cost

    def _bypassed(self, first: int, last: int) -> bool:
        """Whether the first and the last block share a value that the blocks between them do not touch."""
        passing = self.facts.passing
        return not passing(range(first + 1, last)) <= passing([first]) | passing([last])

    def _checkpoint_moves(self, last: int) -> list[Move]:
        found = (self._checkpoint_move(first, last) for first in range(last, max(-1, last - self.longest), -1))
        return [move for move in found if move is not None]

    def _checkpoint_cost(self, first: int, last: int) -> Cost | None:
        move = self._checkpoint_move(first, last)
        return None if move is None else move.cost

    @cached_property
    def nesting(self) -> Nesting:
        return Nesting(
            [self._unit(index) for index in range(len(self.keys))],
            self._checkpoint_cost,
            self.longest,
        )

    def _unit(self, index: int) -> Unit:
        analysis, block = self.analysis, self.analysis.blocks[index]
        checkpoint = self._checkpoint_cost(index, index)
        entering = {*block.live_in} - self.facts.passing([index])
        return Unit(
            kind=self.keys[index],
            forward_s=self.facts.seconds(index)[0],
            border=sum(size for _, size in {analysis.charges[value] for value in entering}),
            drawn=checkpoint.own if checkpoint else 0,
            gradients=self.gradients[index],
            keeps=self._costs_of_keeping(index) if checkpoint and "keep" in self.strategies else (),
        )

    def _costs_of_keeping(self, index: int) -> tuple[Cost, ...]:
        """Where they lie within a checkpoint, masks are packed: these moves come first. (What cannot be computed from
        the block's inputs could not be kept there: then there are none.)"""
        return tuple(move.cost for move in self._keep_moves(index) if not move.segment.whole)

    def _nested_moves(self, last: int) -> list[Move]:
        """Checkpoints that are computed again in pieces; those of one piece are `_checkpoint_moves`."""
        moves = []
        for length in SPLITS[1:]:
            first = last - length + 1
            if first < 0 or length > 4 * self.longest:
                break
            outer = self.checkpoint(first, last)
            for option in self.nesting.options(first, last):
                if option.nested:
                    moves.append(Move(outer, self.nesting.cost(first, last, option), pieces=option.pieces))
        return moves

    def _inner(self, first: int, last: int, keep: int | None) -> Segment:
        return self.checkpoint(first, last) if keep is None else self._keep_moves(first)[keep].segment

    def _invertible(self, strategy: str, index: int) -> tuple[Segment, Cost]:
        single = self._single(strategy, index)
        assert single is not None, (strategy, index)
        return single

    def _single(self, strategy: str, index: int) -> tuple[Segment, Cost] | None:
        """One block of an inverted chain, if it can be one."""
        if (strategy, index) not in self.singles:
            self.singles[strategy, index] = self._made_single(strategy, index)
        return self.singles[strategy, index]

    def _made_single(self, strategy: str, index: int) -> tuple[Segment, Cost] | None:
        block = self.analysis.blocks[index]
        kept = self.residues[index]
        if strategy == "invert":
            inversion = self.facts.inversion(index)
            if not block.live_in or inversion.missing:
                return None
            kept |= frozenset(inversion.residuals)
        else:
            if "invert" in self.strategies and self._inverts_for_nothing(index):
                return None  # keeps more and computes more than inverting the same block
            if not block.cotangents_out or self.facts.sweep(index).missing or self.facts.spine(index).missing:
                return None
            kept |= frozenset(self.facts.spine(index).residuals) | frozenset(block.live_in)
        segment = Segment(index, index, strategy, kept)
        cost = self._cost(strategy, segment)
        return None if cost is None else (segment, cost)

    def _inverts_for_nothing(self, index: int) -> bool:
        """Whether inverting a block keeps no more than walking it does."""
        inversion, spine = self.facts.inversion(index), self.facts.spine(index)
        if inversion.missing or not inversion.sides.issuperset(inversion.residuals):
            return False
        return bool(spine.missing) or self._kept_bytes(inversion.residuals) <= self._kept_bytes(spine.residuals)

    def _kept_bytes(self, values: Iterable[int]) -> int:
        return self.analysis.graph.storage_bytes({stored(self.analysis, value) for value in values})

    def _certificate(self, strategy: str, index: int) -> Certificate:
        return self.certificates.get((strategy, index), TRUSTED)

    def _walks(self, last: int) -> list[Move]:
        """Moonwalk segments that end at `last`, grown to the front while the predicted error allows."""
        moves: list[Move] = []
        whole: Cost | None = None
        noise = Noise("moonwalk")
        for first in range(last, -1, -1):
            single, certificate = self._single("moonwalk", first), self._certificate("moonwalk", first)
            if single is None or noise.grown(certificate).error > self.tolerance:
                break
            noise = noise.grown(certificate)
            whole = single[1] if whole is None else _joined_walks(single[1], whole)
            moves.append(Move(Segment(first, last, "moonwalk", frozenset()), whole, noise.error))
        return moves


def number(keys: Sequence[object]) -> list[int]:
    """Equal keys get equal numbers, in order of first appearance."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


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


def _joined_inversions(front: Cost, back: Cost, gradients: int) -> Cost:
    """The cost of an inverted chain from that of its first block and that of the rest, which leaves `gradients`."""
    shared = back.border_in if front.covers_out else 0
    return Cost(
        own=front.own + back.kept - shared,
        border_in=front.border_in,
        covers_in=front.covers_in,
        covers_out=back.covers_out,
        forward_peak=max(front.forward_peak, front.kept - shared + back.forward_peak),
        backward_peak=max(front.backward_peak + gradients, front.kept - shared + back.backward_peak),
        seconds=front.seconds + back.seconds,
    )


def _joined_walks(front: Cost, back: Cost) -> Cost:
    """The same of a moonwalk segment, which keeps the border in front of it alone."""
    residuals, fragments = back.own, front.fragments + back.fragments
    working = max(cost.backward_peak - cost.kept - cost.fragments for cost in (front, back))
    return Cost(
        own=front.own + residuals,
        border_in=front.border_in,
        covers_in=front.covers_in,
        covers_out=False,
        forward_peak=max(front.forward_peak, back.forward_peak - back.border_in + front.kept),
        backward_peak=front.kept + residuals + fragments + working,
        seconds=front.seconds + back.seconds,
        fragments=fragments,
    )
