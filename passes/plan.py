"""The planner: contiguous segments, one strategy each, the fastest under a peak, by dynamic programming.

A state at the border behind block j is (bytes kept so far, seconds added so far). Each move appends one segment and
must fit: what earlier segments keep, plus the segment's own peak, plus the gradients that later segments have left.
Dominated states are dropped, so the result is the best of the family up to the additive model of the peaks; every
plan that is returned has been emitted and simulated operation by operation, and that peak is the one that counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .analysis import Analysis
from .cost import base_name, operation_seconds
from .costs import Cost, backward_program, segment_cost, signature
from .emit import Facts, Schedule, Segment, emit, random_residue, residue
from .keepsets import keep_sets
from .liveness import Timeline, simulate

Floats = npt.NDArray[np.float64]
INVERTED = ("invert", "moonwalk")
PRICES = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.0)
FRONT = 256  # states kept per border and kind: beyond this the front is thinned evenly


@dataclass(frozen=True)
class Certificate:
    """How much relative noise one block adds (`local`) and by how much it amplifies what it is given (`growth`)."""

    local: float
    growth: float


TRUSTED = Certificate(0.0, 1.0)


@dataclass(frozen=True)
class Planned:
    """A plan that has been emitted and simulated. Bytes and seconds are of the whole step."""

    segments: tuple[Segment, ...]
    schedule: Schedule
    forward: Timeline
    backward: Timeline
    seconds: float
    error: float = 0.0

    @property
    def peak(self) -> int:
        return max(self.forward.peak, self.backward.peak)


@dataclass(frozen=True)
class Move:
    """One candidate segment with its cost; `blocks` counts how many borders it crosses."""

    segment: Segment
    cost: Cost
    error: float = 0.0


@dataclass
class _Front:
    """States at one border: parallel arrays, and for each the state and move it came from."""

    kept: Floats
    seconds: Floats
    covered: npt.NDArray[np.bool_]
    anchor: npt.NDArray[np.bool_]
    parent: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    move: npt.NDArray[np.int64]


@dataclass
class _Table:
    """Moves into one border as arrays, so that all of them meet all states at once."""

    first: npt.NDArray[np.int64]
    own: Floats
    border: Floats
    forward: Floats
    backward: Floats
    seconds: Floats
    covers_in: npt.NDArray[np.bool_]
    covers_out: npt.NDArray[np.bool_]
    invert: npt.NDArray[np.bool_]
    moves: list[Move] = field(default_factory=list)


class Planner:
    """Prepares the moves of a step once, then answers for any budget."""

    def __init__(
        self,
        facts: Facts,
        strategies: Sequence[str] = ("keep", "checkpoint", "invert", "moonwalk"),
        certificates: Mapping[tuple[str, int], Certificate] | None = None,
        tolerance: float = math.inf,
    ) -> None:
        self.facts, self.analysis = facts, facts.analysis
        analysis = facts.analysis
        self.strategies, self.tolerance = tuple(strategies), tolerance
        self.certificates = dict(certificates or {})
        self.costs: dict[object, Cost | None] = {}
        self.signatures = [signature(analysis, block) for block in analysis.blocks]
        self.keys = self._number([key for key, _ in self.signatures])
        self.later_gradients = self._later_gradients()
        outputs = {analysis.charges[v] for v in analysis.held}
        self.base = sum(size for _, size in outputs)
        self.forward_seconds = sum(e.seconds for e in analysis.graph.stage_edges("forward"))
        self.tables = [self._table(j) for j in range(len(analysis.blocks))]

    def certify(self, certificates: Mapping[tuple[str, int], Certificate]) -> None:
        """Take measured certificates into account; blocks without one are trusted until they are measured."""
        self.certificates.update(certificates)
        self.tables = [self._table(j) for j in range(len(self.analysis.blocks))]

    def uncertified(self, segments: Iterable[Segment]) -> list[Segment]:
        """The inverted segments with a block that has no certificate."""
        return [
            segment
            for segment in segments
            if segment.strategy in INVERTED
            and any((segment.strategy, index) not in self.certificates for index in segment.span)
        ]

    @staticmethod
    def _number(keys: Sequence[object]) -> list[int]:
        numbers: dict[object, int] = {}
        return [numbers.setdefault(key, len(numbers)) for key in keys]

    def _later_gradients(self) -> list[int]:
        total, later = 0, []
        for block in reversed(self.analysis.blocks):
            later.append(total)
            total += sum(size for _, size in {self.analysis.charges[v] for v in block.gradients})
        return later[::-1]

    # -- moves ---------------------------------------------------------------------------------------------------

    def _table(self, last: int) -> _Table:
        moves = [move for move in self._moves(last) if move.segment.strategy in self.strategies]
        costs = [move.cost for move in moves]

        def column(values: Iterable[float]) -> Floats:
            return np.array(list(values), dtype=np.float64)

        return _Table(
            np.array([move.segment.first for move in moves], dtype=np.int64),
            column(c.own for c in costs),
            column(c.border_in for c in costs),
            column(c.forward_peak for c in costs),
            column(c.backward_peak + self.later_gradients[last] + self.base for c in costs),
            column(c.seconds for c in costs),
            np.array([c.covers_in for c in costs], dtype=bool),
            np.array([c.covers_out for c in costs], dtype=bool),
            np.array([move.segment.strategy == "invert" for move in moves], dtype=bool),
            moves,
        )

    def _moves(self, last: int) -> list[Move]:
        return [*self._keep_moves(last), *self._checkpoint_moves(last), *self._chain_moves(last)]

    def _translate(self, kept: Iterable[int], block: int) -> frozenset[int]:
        return frozenset(self.signatures[block][1][position] for position in kept)

    def _positions(self, kept: Iterable[int], block: int) -> tuple[int, ...]:
        place = {value: position for position, value in enumerate(self.signatures[block][1])}
        return tuple(place[value] for value in kept if value in place)

    def _cost(self, name: object, segment: Segment) -> Cost | None:
        """The cost of a segment; segments of the same shape (`name` and block kinds) are simulated once."""
        kinds = tuple(self.keys[index] for index in segment.span)
        if (name, kinds) not in self.costs:
            period = _period(kinds)
            if period is None:
                self.costs[name, kinds] = segment_cost(self.facts, segment)
            else:
                self.costs[name, kinds] = self._extrapolated(name, segment, period)
        return self.costs[name, kinds]

    def _extrapolated(self, name: object, segment: Segment, period: int) -> Cost | None:
        """A long run of repeating blocks costs what one period more adds to a shorter run."""
        shorter, shortest = (replace(segment, first=segment.first + n * period) for n in (1, 2))
        kept = segment.kept - frozenset(self.analysis.blocks[segment.first].live_in)
        costs = [
            self._cost(name, replace(s, kept=kept | frozenset(self.analysis.blocks[s.first].live_in)))
            for s in (shorter, shortest)
        ]
        return None if costs[0] is None or costs[1] is None else _continued(costs[0], costs[1])

    def _keep_moves(self, index: int) -> list[Move]:
        block, moves = self.analysis.blocks[index], []
        for position, kept in enumerate(self._keep_sets(index)):
            for anchored in (False, True):
                values = kept | frozenset(block.live_in if anchored else ()) | self._masks(index)
                segment = Segment(index, index, "keep", values)
                cost = self._cost(("keep", position, anchored), segment)
                if cost is not None and (not anchored or cost.covers_in):
                    moves.append(Move(segment, cost))
        return moves

    def _keep_sets(self, index: int) -> list[frozenset[int]]:
        key = ("keep sets", self.keys[index])
        if key not in self.costs:
            block = self.analysis.blocks[index]
            seconds = sum(edge.seconds for edge in block.forward) or 1e-9
            scale = self.analysis.graph.storage_bytes(block.demanded) / seconds
            sets = keep_sets(self.analysis, block, [price * scale for price in PRICES])
            self.costs[key] = [self._positions(kept, index) for kept in sets]  # type: ignore[assignment]
        return [self._translate(kept, index) for kept in self.costs[key]]  # type: ignore[union-attr]

    def _masks(self, index: int) -> frozenset[int]:
        """Results of random operations: drawn once, so kept under every strategy (as bits where they are masks)."""
        block = self.analysis.blocks[index]
        edges = (edge for edge in (*block.forward, *block.late) if edge.random)
        return frozenset(value for edge in edges for value in random_residue(self.analysis, edge))

    def _checkpoint_moves(self, last: int) -> list[Move]:
        longest = 2 * math.isqrt(len(self.analysis.blocks)) + 4
        moves = []
        for first in range(last, max(-1, last - longest), -1):
            span = range(first, last + 1)
            blocks = [self.analysis.blocks[index] for index in span]
            kept = frozenset(blocks[0].live_in).union(*(residue(self.analysis, block) for block in blocks))
            segment = Segment(first, last, "checkpoint", kept)
            cost = self._cost("checkpoint", segment)
            if cost is not None:
                moves.append(Move(segment, cost))
        return moves

    def _chain_moves(self, last: int) -> list[Move]:
        moves = []
        for strategy in INVERTED:
            if strategy in self.strategies:
                moves += self._chain(strategy, last)
        return moves

    def _single(self, strategy: str, index: int) -> tuple[Segment, Cost] | None:
        block = self.analysis.blocks[index]
        kept = residue(self.analysis, block)
        if strategy == "invert":
            if not block.live_in or self.facts.inversion(index).missing:
                return None
        else:
            if "invert" in self.strategies and not self.missing("invert", index):
                return None  # keeps more and computes more than inverting the same block
            if not block.cotangents_out or self.facts.spine(index).missing or self.facts.sweep(index).missing:
                return None
            kept |= frozenset(self.facts.spine(index).residuals) | frozenset(block.live_in)
        segment = Segment(index, index, strategy, kept)
        cost = self._cost(strategy, segment)
        return None if cost is None else (segment, cost)

    def _certificate(self, strategy: str, index: int) -> Certificate:
        return self.certificates.get((strategy, index), TRUSTED)

    def _chain(self, strategy: str, last: int) -> list[Move]:
        """Segments of `strategy` that end at `last`, grown to the front while the predicted error allows."""
        moves: list[Move] = []
        whole: Cost | None = None
        kept: frozenset[int] = frozenset()
        noise = _Noise(strategy)
        for first in range(last, -1, -1):
            single, certificate = self._single(strategy, first), self._certificate(strategy, first)
            if single is None or noise.grown(certificate).error > self.tolerance:
                break
            noise = noise.grown(certificate)
            inner = kept - frozenset(self.analysis.blocks[first + 1].live_in) if whole else kept
            kept = inner | single[0].kept
            whole = single[1] if whole is None else _joined(strategy, single[1], whole)
            moves.append(Move(Segment(first, last, strategy, kept), whole, noise.error))
        return moves

    # -- what a plan is asked about ---------------------------------------------------------------------------------

    def error_of(self, segment: Segment) -> float:
        """Predicted relative error of the gradients of an inverted segment; infinite without certificates."""
        return chain_error(segment, self.certificates)

    def single_error(self, strategy: str, index: int) -> float:
        return self.error_of(Segment(index, index, strategy, frozenset()))

    def missing(self, strategy: str, index: int) -> tuple[int, ...]:
        """The values that keep a block from being inverted."""
        block = self.analysis.blocks[index]
        if strategy == "invert":
            return self.facts.inversion(index).missing
        if not block.cotangents_out:
            return block.cotangents_in or block.gradients
        return self.facts.spine(index).missing or self.facts.sweep(index).missing

    def recomputed_labels(self, segment: Segment) -> list[str]:
        """Names of the forward operations that the backward pass of a segment runs again, views apart."""
        program = backward_program(self.facts, segment)
        forward = {v for index in segment.span for e in self.analysis.blocks[index].forward for v in e.gives}
        again = (i for i in program.instructions if i.value in forward and i.operation.new)
        return list(dict.fromkeys(base_name(instruction.operation.target) for instruction in again))

    # -- dynamic programming ----------------------------------------------------------------------------------------

    def fastest(self, budget: float) -> list[Move] | None:
        """The fastest chain of moves whose modelled peak is within `budget` bytes, or None."""
        fronts = [_start()]
        for table in self.tables:
            fronts.append(_extend(fronts, table, budget))
        final = fronts[-1]
        if not len(final.kept):
            return None
        usable = np.where(final.anchor & ~self._outputs_anchor(), np.inf, final.seconds)
        best = int(np.argmin(usable))
        return self._trace(fronts, best) if np.isfinite(usable[best]) else None

    def _outputs_anchor(self) -> bool:
        """An inverted last segment starts from the step's outputs, which the user holds."""
        return set(self.analysis.blocks[-1].live_out) <= set(self.analysis.graph.output_values)

    def _trace(self, fronts: Sequence[_Front], state: int) -> list[Move]:
        moves: list[Move] = []
        border = len(self.tables)
        while border:
            front = fronts[border]
            moves.append(self.tables[border - 1].moves[int(front.move[state])])
            border, state = int(front.source[state]), int(front.parent[state])
        return moves[::-1]

    def realise(self, moves: Sequence[Move]) -> Planned:
        """Emit and simulate a chain of moves."""
        segments = tuple(move.segment for move in moves)
        schedule = emit(self.facts, segments)
        return measure_schedule(self.analysis, segments, schedule, error=max((m.error for m in moves), default=0.0))

    def plain(self) -> Planned:
        """Plain backpropagation: keep what the backward pass reads, block by block."""
        segments = []
        for index in range(len(self.analysis.blocks)):
            kept = self._keep_sets(index)[0] | self._masks(index)
            segments.append(Segment(index, index, "keep", kept))
        return measure_schedule(self.analysis, tuple(segments), emit(self.facts, segments))

    def within(self, budget: float, rounds: int = 8) -> Planned | None:
        """The fastest plan whose *simulated* peak is within `budget`; the modelled budget is moved to get there."""
        best: Planned | None = None
        target, tried = float(budget), set()
        for _ in range(rounds):
            moves = self.fastest(target)
            if moves is None:
                if best is not None or target >= 2 * budget:
                    break
                target *= 1.04
                continue
            key = tuple(move.segment for move in moves)
            planned = self.realise(moves)
            slack = budget - planned.peak
            if slack >= 0 and (best is None or planned.seconds < best.seconds):
                best = planned
            if key in tried:
                break
            tried.add(key)
            target += slack if slack < 0 else max(slack, 0.01 * budget)
        return best

    def smallest(self) -> Planned:
        """The plan of the smallest simulated peak that the family reaches."""
        low, high = 0.0, self.plain().peak * 2.0
        while high - low > 0.004 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.fastest(middle) is not None else (middle, high)
        found = [self.realise(moves) for scale in (1.0, 1.01, 1.03, 1.06) if (moves := self.fastest(high * scale))]
        return min(found, key=lambda planned: planned.peak)

    def slowed(self, limit: float) -> Planned:
        """The smallest peak whose predicted step time is at most `limit` seconds."""
        plain = self.plain()
        smallest = self.smallest()
        if smallest.seconds <= limit:
            return smallest
        low, high, best = float(smallest.peak), float(plain.peak), plain
        for _ in range(10):
            middle = math.sqrt(low * high)
            planned = self.within(middle, rounds=3)
            if planned is not None and planned.seconds <= limit:
                high = min(middle, planned.peak)
                best = min(best, planned, key=lambda p: p.peak)
            else:
                low = middle
        return best


@dataclass(frozen=True)
class _Noise:
    """Error carried along a chain: invert grows it from last block to first, moonwalk from first to last."""

    strategy: str
    total: float = 0.0
    amplification: float = 1.0
    worst: float = 0.0

    @property
    def error(self) -> float:
        return self.worst

    def grown(self, block: Certificate) -> _Noise:
        """Prepend a block to the chain."""
        if self.strategy == "invert":
            carried = math.hypot(self.total * block.growth, block.local)
            return replace(self, total=carried, worst=max(self.worst, carried))
        # Moonwalk carries noise the other way: a block put in front adds its local error times all growth behind it.
        amplification = max(1.0, self.amplification * block.growth)
        total = math.hypot(self.total, block.local * self.amplification)
        return replace(self, total=total, amplification=amplification, worst=max(self.worst, total))


def chain_error(segment: Segment, certificates: Mapping[tuple[str, int], Certificate]) -> float:
    """Predicted relative error of the gradients of an inverted segment; infinite where a certificate is missing."""
    noise = _Noise(segment.strategy)
    for index in reversed(segment.span):
        certificate = certificates.get((segment.strategy, index))
        if certificate is None:
            return math.inf
        noise = noise.grown(certificate)
    return noise.error


def _period(kinds: Sequence[int]) -> int | None:
    """The period of a sequence that repeats at least four times, if it is 4 or less."""
    for period in range(1, 5):
        if len(kinds) >= 4 * period and all(a == b for a, b in zip(kinds, kinds[period:], strict=False)):
            return period
    return None


def _continued(last: Cost, before: Cost) -> Cost:
    """The next member of a sequence of costs that grows by the same amount each time."""
    return Cost(
        own=2 * last.own - before.own,
        border_in=last.border_in,
        covers_in=last.covers_in,
        covers_out=last.covers_out,
        forward_peak=2 * last.forward_peak - before.forward_peak,
        backward_peak=2 * last.backward_peak - before.backward_peak,
        seconds=2 * last.seconds - before.seconds,
    )


def _joined(strategy: str, front: Cost, back: Cost) -> Cost:
    """The cost of a chain from that of its first block and that of the rest."""
    if strategy == "invert":
        return Cost(
            own=front.own + front.border_in + back.own + back.border_in,
            border_in=0,
            covers_in=False,
            covers_out=False,
            forward_peak=max(front.forward_peak, back.forward_peak + front.kept),
            backward_peak=max(front.backward_peak, back.backward_peak + front.kept),
            seconds=front.seconds + back.seconds,
        )
    residuals = back.own
    working = max(front.backward_peak - front.kept, back.backward_peak - back.kept)
    return Cost(
        own=front.own + residuals,
        border_in=front.border_in,
        covers_in=front.covers_in,
        covers_out=False,
        forward_peak=max(front.forward_peak, back.forward_peak - back.border_in + front.kept),
        backward_peak=front.kept + residuals + working,
        seconds=front.seconds + back.seconds,
    )


def _start() -> _Front:
    zero, none = np.zeros(1), np.zeros(1, dtype=np.int64)
    return _Front(zero, zero.copy(), np.zeros(1, dtype=bool), np.zeros(1, dtype=bool), none, none, none)


def _extend(fronts: Sequence[_Front], table: _Table, budget: float) -> _Front:
    """All moves of a table against all states at the border where each move begins, in one go."""
    counts = np.array([len(front.kept) for front in fronts])
    starts = np.concatenate([[0], np.cumsum(counts)])
    repeats = counts[table.first]
    move = np.repeat(np.arange(len(table.first)), repeats)
    state = np.arange(len(move)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    place = starts[table.first[move]] + state
    kept, seconds, covered, anchor = (
        np.concatenate([getattr(front, name) for front in fronts])[place]
        for name in ("kept", "seconds", "covered", "anchor")
    )
    border = np.where(covered, 0.0, table.border[move])
    before = kept - (table.border[move] - border)
    peak = before + np.maximum(table.forward[move], table.backward[move])
    fits = np.flatnonzero((peak <= budget) & (~anchor | table.covers_in[move]))
    kept = (kept + table.own[move] + border)[fits]
    seconds = (seconds + table.seconds[move])[fits]
    move, state = move[fits], state[fits]
    covered, anchor = table.covers_out[move], table.invert[move]
    chosen = _undominated(kept, seconds, covered, anchor)
    move, state = move[chosen], state[chosen]
    return _Front(kept[chosen], seconds[chosen], covered[chosen], anchor[chosen], state, table.first[move], move)


def _undominated(
    kept: Floats, seconds: Floats, covered: npt.NDArray[np.bool_], anchor: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    chosen = []
    for kind in range(4):
        rows = np.flatnonzero((covered == bool(kind & 1)) & (anchor == bool(kind & 2)))
        if not len(rows):
            continue
        rows = rows[np.lexsort((seconds[rows], kept[rows]))]
        best = np.minimum.accumulate(seconds[rows])
        better = np.ones(len(rows), dtype=bool)
        better[1:] = seconds[rows][1:] < best[:-1]
        rows = rows[better]
        if len(rows) > FRONT:
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, FRONT).astype(np.int64))]
        chosen.append(rows)
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def measure_schedule(
    analysis: Analysis, segments: tuple[Segment, ...], schedule: Schedule, error: float = 0.0
) -> Planned:
    """Simulate both programs: what the user holds (the outputs) stays alive through the backward pass."""
    charges = analysis.charges
    forward = simulate(schedule.forward, charges)
    backward = simulate(schedule.backward, charges, pinned=analysis.held)
    seconds = sum(
        operation_seconds(instruction.operation, analysis.device)
        for program in (schedule.forward, schedule.backward)
        for instruction in program.instructions
    )
    return Planned(segments, schedule, forward, backward, seconds, error)
