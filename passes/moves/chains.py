"""Segments without checkpoints: chains of blocks that are inverted, or walked by moonwalk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from ..certificates import TRUSTED, Certificate, Noise, reach
from ..costs import Cost
from ..emit import Segment, stored
from ..inverse import INVERTED
from ..solutions import waiting_seconds
from .kinds import Kinds
from .move import Move


class Chains:
    """The moves that follow inverse rules, as far as certificates allow: `certify` may be called in between."""

    def __init__(self, kinds: Kinds, strategies: Iterable[str], tolerance: float) -> None:
        self.kinds, self.facts, self.analysis = kinds, kinds.facts, kinds.analysis
        self.strategies, self.tolerance = tuple(s for s in strategies if s in INVERTED), tolerance
        self.certificates: dict[tuple[str, int], Certificate] = {}
        self.singles: dict[tuple[str, int], tuple[Segment, Cost] | None] = {}
        self.unable: set[tuple[str, int]] = set()  # kinds of blocks whose values cannot be solved for

    def certify(self, certificates: Mapping[tuple[str, int], Certificate]) -> None:
        self.certificates.update(certificates)
        self.__dict__.pop("reach", None)

    def forbid(self) -> None:
        self.strategies = ()
        self.__dict__.pop("reach", None)

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

    def lead_back(self) -> bool:
        """Whether any block can be inverted or walked."""
        indices = range(len(self.analysis.blocks))
        return any(self._single(strategy, index) is not None for strategy in self.strategies for index in indices)

    def segment(self, strategy: str, first: int, last: int) -> Segment:
        """These blocks inverted, or walked, as one segment."""
        kept: frozenset[int] = frozenset()
        for index in range(last, first - 1, -1):
            if strategy == "moonwalk" and index < last:  # a walk keeps the border in front of it alone
                kept -= frozenset(self.analysis.blocks[index + 1].live_in)
            kept |= self._able(strategy, index)[0].kept
        return Segment(first, last, strategy, kept)

    def longest(self, strategy: str, last: int) -> Segment | None:
        """The longest chain that ends at a block."""
        if strategy == "invert":
            first = next((index for index in range(last + 1) if self.reach[index] >= last), None)
        else:
            first = min((move.segment.first for move in self.walks(last)), default=None)
        return None if first is None else self.segment(strategy, first, last)

    def inversion(self, first: int, last: int) -> Move:
        """Inverted blocks joined to one move."""
        whole, noise, gradients = self._able("invert", last)[1], Noise("invert"), 0
        for index in range(last, first - 1, -1):
            noise = noise.grown(self._certificate("invert", index))
            if index < last:
                gradients += self.kinds.gradients[index + 1]
                whole = _joined_inversions(self._able("invert", index)[1], whole, gradients)
        return Move(Segment(first, last, "invert", frozenset()), whole, noise.error)

    def walks(self, last: int) -> Iterator[Move]:
        """Moonwalk segments that end at `last`, grown to the front while the predicted error allows."""
        if "moonwalk" not in self.strategies:
            return
        whole: Cost | None = None
        noise = Noise("moonwalk")
        for first in range(last, -1, -1):
            single, certificate = self._single("moonwalk", first), self._certificate("moonwalk", first)
            if single is None or noise.grown(certificate).error > self.tolerance:
                return
            noise = noise.grown(certificate)
            if whole is None:
                whole = single[1]
            else:
                waiting = waiting_seconds(self.analysis, self.analysis.blocks[first + 1].live_in)
                whole = _joined_walks(single[1], whole, waiting)
            yield Move(Segment(first, last, "moonwalk", frozenset()), whole, noise.error)

    def missing(self, strategy: str, index: int) -> tuple[int, ...]:
        """The values that keep a block from being inverted."""
        block = self.analysis.blocks[index]
        if strategy == "invert":
            return self.facts.inversion(index).missing
        if not block.cotangents_out:
            return block.cotangents_in or block.gradients
        return self.facts.spine(index).missing or self.facts.sweep(index).missing

    def _able(self, strategy: str, index: int) -> tuple[Segment, Cost]:
        single = self._single(strategy, index)
        assert single is not None, (strategy, index)
        return single

    def _single(self, strategy: str, index: int) -> tuple[Segment, Cost] | None:
        """One block of an inverted chain, if it can be one."""
        if (strategy, index) not in self.singles:
            self.singles[strategy, index] = self._made_single(strategy, index)
        return self.singles[strategy, index]

    def _made_single(self, strategy: str, index: int) -> tuple[Segment, Cost] | None:
        block, kept = self.analysis.blocks[index], self.kinds.residues[index]
        if not (block.live_in if strategy == "invert" else block.cotangents_out) or not self._is_able(strategy, index):
            return None
        if strategy == "invert":
            kept |= frozenset(self.facts.inversion(index).residuals)
        elif "invert" in self.strategies and self._inverts_for_nothing(index):
            return None  # keeps more and computes more than inverting the same block
        else:
            kept |= frozenset(self.facts.spine(index).residuals) | frozenset(block.live_in)
        segment = Segment(index, index, strategy, kept)
        cost = self.kinds.cost(strategy, segment)
        return None if cost is None else (segment, cost)

    def _is_able(self, strategy: str, index: int) -> bool:
        """Whether a block's values can be solved for. Where one's cannot, none of its kind is asked again."""
        kind = strategy, self.kinds.keys[index]
        if kind not in self.unable and self.missing(strategy, index):
            self.unable.add(kind)
        return kind not in self.unable

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


def _joined_walks(front: Cost, back: Cost, waiting: float) -> Cost:
    """The same of a moonwalk segment, which keeps the border in front of it alone: the other's `waiting` is saved."""
    residuals, fragments = back.own, front.fragments + back.fragments
    working = max(cost.backward_peak - cost.kept - cost.fragments for cost in (front, back))
    return Cost(
        own=front.own + residuals,
        border_in=front.border_in,
        covers_in=front.covers_in,
        covers_out=False,
        forward_peak=max(front.forward_peak, back.forward_peak - back.border_in + front.kept),
        backward_peak=front.kept + residuals + fragments + working,
        seconds=front.seconds + back.seconds - waiting,
        fragments=fragments,
    )
