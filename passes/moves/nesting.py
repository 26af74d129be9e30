"""Checkpoints within checkpoints: how a group of blocks, kept by its inputs only, is best run backward in pieces.

The recursion is rotor's: the first piece is run forward, and either keeps what its backward pass reads or only its
inputs; the rest is solved with what that leaves; then the first piece runs backward. Pieces have a few lengths
(`SPLITS`), each group a short front of (peak, seconds), and groups of equal blocks share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ..costs import Cost
from ..emit import Segment

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
FRONT = 5  # ways of running a group that are remembered


@dataclass(frozen=True)
class Piece:
    """Blocks `first` to `last`, counted from the group's first; `keep` numbers a kept set, None is a checkpoint."""

    first: int
    last: int
    keep: int | None = None
    inner: tuple[Piece, ...] = ()

    def moved(self, by: int) -> Piece:
        return Piece(self.first + by, self.last + by, self.keep, self.inner)


@dataclass(frozen=True)
class Option:
    """One way of running a group backward, from its inputs and what was drawn in it: its first `length` blocks (by
    the kept set `keep`, or recomputed in the way `inner`), then the `rest`."""

    peak: float
    seconds: float
    forward_peak: float
    length: int
    keep: int | None = None
    inner: Option | None = None
    rest: Option | None = None

    @property
    def nested(self) -> bool:
        return self.rest is not None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        inner = self.inner.pieces if self.inner is not None and self.inner.nested else ()
        rest = self.rest.pieces if self.rest is not None else ()
        return (Piece(0, self.length - 1, self.keep, inner), *(piece.moved(self.length) for piece in rest))


@dataclass(frozen=True)
class Unit:
    """What the recursion knows of a block: bytes of its inputs, what it draws and its gradients, and its costs."""

    kind: int
    forward_s: float
    border: int
    drawn: int
    gradients: int
    keeps: tuple[Cost, ...]


class Nesting:
    """The fronts of all groups. `checkpoint(first, last)` is the cost of recomputing these blocks in one go."""

    def __init__(self, units: Sequence[Unit], checkpoint: Callable[[int, int], Cost | None], longest: int) -> None:
        self.units, self.checkpoint, self.longest = units, checkpoint, longest
        self.kinds = [unit.kind for unit in units]
        self.forward_s = [0.0, *accumulate(unit.forward_s for unit in units)]
        self.gradients = [0, *accumulate(unit.gradients for unit in units)]
        self.drawn = [0, *accumulate(unit.drawn for unit in units)]
        self.found: dict[tuple[int, ...], list[Option]] = {}

    def options(self, first: int, last: int) -> list[Option]:
        """The front of blocks `first` to `last`, smallest peak first."""
        for start in range(last, first - 1, -1):  # the rests of a group come first: no deep recursion
            key = tuple(self.kinds[start : last + 1])
            if key not in self.found:
                self.found[key] = _front(self._candidates(start, last))
        return self.found[tuple(self.kinds[first : last + 1])]

    def cost(self, first: int, last: int, option: Option) -> Cost:
        """Of a group as a segment of the plan."""
        own = self.drawn[last + 1] - self.drawn[first]
        border = self.units[first].border
        return Cost(own, border, True, False, round(option.forward_peak), round(option.peak), option.seconds)

    def _candidates(self, first: int, last: int) -> Iterable[Option]:
        length = last - first + 1
        whole = self.checkpoint(first, last) if length <= self.longest else None
        if whole is not None:
            yield Option(whole.backward_peak, whole.seconds, whole.forward_peak, length)
        for split in SPLITS:
            if split >= length:
                break
            middle = first + split
            keeps = self.units[first].keeps if split == 1 else ()
            ways: list[tuple[Cost, int | None, Option | None]] = [
                *((self.cost(first, middle - 1, option), None, option) for option in self.options(first, middle - 1)),
                *((cost, keep, None) for keep, cost in enumerate(keeps)),
            ]
            for rest in self.options(middle, last):
                for way in ways:
                    yield self._joined(first, middle, last, *way, rest)

    def _joined(
        self, first: int, middle: int, last: int, cost: Cost, keep: int | None, inner: Option | None, rest: Option
    ) -> Option:
        """Blocks before `middle` at this `cost`, then the rest."""
        before = cost.kept - (self.units[middle].border if cost.covers_out else 0)
        later = self.gradients[last + 1] - self.gradients[middle]
        return Option(
            peak=max(cost.forward_peak, before + rest.peak, cost.backward_peak + later),
            seconds=self.forward_s[middle] - self.forward_s[first] + cost.seconds + rest.seconds,
            forward_peak=max(cost.forward_peak, self.units[first].border + cost.own + rest.forward_peak),
            length=middle - first,
            keep=keep,
            inner=inner,
            rest=rest,
        )


def _front(options: Iterable[Option]) -> list[Option]:
    """Undominated in (peak, seconds), thinned to `FRONT`, smallest peak first."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.peak, o.seconds)):
        if not best or option.seconds < best[-1].seconds * 0.999:
            best.append(option)
    if len(best) <= FRONT:
        return best
    step = (len(best) - 1) / (FRONT - 1)
    return [best[round(i * step)] for i in range(FRONT)]


def segments_of(
    pieces: Iterable[Piece], first: int, make: Callable[[int, int, int | None], Segment]
) -> tuple[Segment, ...]:
    """The pieces of a group that begins at block `first`, as segments; `make` builds one without its inner ones."""
    found = []
    for piece in pieces:
        outer = make(first + piece.first, first + piece.last, piece.keep)
        inner = segments_of(piece.inner, first + piece.first, make)
        found.append(replace(outer, inner=inner))
    return tuple(found)
