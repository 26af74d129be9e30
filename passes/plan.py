"""The planner: contiguous segments, one strategy each, the fastest under a peak, by dynamic programming.

A state at the border behind block j is (bytes kept so far, seconds added so far). Each move appends one segment and
must fit: what earlier segments keep, plus the segment's own peak, plus the gradients that later segments have left.
Dominated states are dropped, so the result is the best of the family up to the additive model of the peaks; every
plan that is returned has been emitted and simulated operation by operation, and that peak is the one that counts.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from .bits import unpack_two
from .certificates import Certificate, chain_error
from .cost import base_name
from .costs import Cost, backward_program, segment_cost
from .emit import Segment, Unreachable, emit
from .fronts import FRONT, LONG, Floats, Front, Table, column, extend, start
from .inverse import INVERTED
from .moves import Move, MoveMaker
from .planned import Measure, Planned, measure_schedule, without_pieces
from .solutions import Facts

CLOSE = 0.002  # part of a budget that is not worth another round; twice as much after each,
CLOSEST = 0.01  # up to this much
HARDLY = 0.01  # part of a step's time that a plan of fewer segments may take longer
HARDLY_FASTER = 0.001  # part of a step's time for which another plan is not simulated
HARDLY_LARGER = 0.005  # part of the smallest peak that is not worth a slower plan
REACH = 8  # blocks behind a chain over which it may be grown
TRIALS = 4  # such plans that are simulated
# Of a modelled peak, until the simulated time is in reach.
SCALES = (1.0, 1.01, 1.02, 1.04, 1.07, 1.12, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0)


class NoPlan(Exception):
    """The allowed strategies leave a block without any segment."""


Answer = TypeVar("Answer")


def remembered(method: Callable[..., Answer]) -> Callable[..., Answer]:
    """The same question, asked again before certificates change, has the same answer."""

    @functools.wraps(method)
    def ask(self: Planner, *question: Any) -> Answer:
        key = (method.__name__, *question)
        if key not in self.answers:
            self.answers[key] = method(self, *question)
        answer: Answer = self.answers[key]
        return answer

    return ask


class Planner:
    """Prepares the moves of a step once, then answers for any budget.

    `measure` simulates emitted plans (default: `measure_schedule`, forward and backward as two programs).
    """

    def __init__(
        self,
        facts: Facts,
        strategies: Sequence[str] = ("keep", "checkpoint", "invert", "moonwalk"),
        certificates: Mapping[tuple[str, int], Certificate] | None = None,
        tolerance: float = math.inf,
        measure: Measure | None = None,
    ) -> None:
        self.facts, self.analysis = facts, facts.analysis
        self.measure = measure or measure_schedule
        self.maker = MoveMaker(facts, strategies, tolerance)
        self.maker.certify(certificates or {})
        done = list(accumulate(self.maker.kinds.gradients))
        self.later_gradients = [done[-1] - gradients for gradients in done]  # by block: those of all behind it
        self.recomputed: dict[object, list[str]] = {}  # by shape of a segment
        self.costs: dict[object, Cost | None] = {}  # likewise
        self.answers: dict[object, Any] = {}  # to what was asked since certificates were last measured
        self.base = sum(size for _, size in {self.analysis.charges[v] for v in self.analysis.held})

    @property
    def certificates(self) -> dict[tuple[str, int], Certificate]:
        return self.maker.chains.certificates

    @property
    def tolerance(self) -> float:
        return self.maker.chains.tolerance

    @property
    def strategies(self) -> tuple[str, ...]:
        return self.maker.strategies

    @property
    def inverts(self) -> bool:
        """Whether any block can be inverted, or walked by moonwalk."""
        return self.maker.chains.lead_back()

    def certify(self, certificates: Mapping[tuple[str, int], Certificate]) -> None:
        """Take measured certificates into account; blocks without one are trusted until they are measured."""
        self.maker.certify(certificates)
        self._forget_moves()

    def forbid_inversion(self) -> None:
        self.maker.forbid_inversion()
        self._forget_moves()

    def _forget_moves(self) -> None:
        self.__dict__.pop("moves", None)
        self.__dict__.pop("tables", None)
        self.answers.clear()

    @cached_property
    def moves(self) -> list[list[Move]]:
        """Every segment that a plan may be made of, by its last block; of inverted chains the single blocks."""
        return [self.maker.ending_at(last) for last in range(len(self.analysis.blocks))]

    @cached_property
    def tables(self) -> list[Table]:
        return [self._table(last, moves) for last, moves in enumerate(self.moves)]

    def _table(self, last: int, moves: Sequence[Move]) -> Table:
        costs = [move.cost for move in moves]
        return Table(
            first=np.array([move.segment.first for move in moves], dtype=np.int64),
            own=column(cost.own for cost in costs),
            border=column(cost.border_in for cost in costs),
            forward=column(cost.forward_peak for cost in costs),
            backward=column(cost.backward_peak + self.later_gradients[last] + self.base for cost in costs),
            seconds=column(cost.seconds for cost in costs),
            covers_in=np.array([cost.covers_in for cost in costs], dtype=bool),
            covers_out=np.array([cost.covers_out for cost in costs], dtype=bool),
            reach=np.array(
                [self.maker.chains.reach[last] if move.segment.strategy == "invert" else -1 for move in moves],
                dtype=np.int64,
            ),
        )

    def uncertified(self, segments: Iterable[Segment]) -> list[Segment]:
        """The inverted segments with a block that has no certificate."""
        return [
            segment
            for segment in segments
            if segment.strategy in INVERTED
            and any((segment.strategy, index) not in self.certificates for index in segment.span)
        ]

    # -- what a plan is asked about ---------------------------------------------------------------------------------

    def error_of(self, segment: Segment) -> float:
        """Predicted relative error of the gradients of an inverted segment; infinite without certificates."""
        return chain_error(segment, self.certificates)

    def still_holds(self, planned: Planned) -> Planned | None:
        """A plan made before its certificates were measured, now with its error; None where that is too large.

        Blocks without a certificate are trusted, so measuring only ever takes moves away: a plan whose own moves are
        all still there is still the best one.
        """
        errors = [self.error_of(segment) for segment in planned.segments if segment.strategy in INVERTED]
        error = max(errors, default=0.0)
        return replace(planned, error=error) if error <= self.tolerance else None

    def single_error(self, strategy: str, index: int) -> float:
        return self.error_of(Segment(index, index, strategy, frozenset()))

    def missing(self, strategy: str, index: int) -> tuple[int, ...]:
        """The values that keep a block from being inverted."""
        return self.maker.chains.missing(strategy, index)

    def cost_of(self, segment: Segment) -> Cost | None:
        """What a segment costs alone, without what only passes through it."""
        shape = self.maker.kinds.shape(segment)
        if shape not in self.costs:
            self.costs[shape] = segment_cost(self.facts, segment)
        return self.costs[shape]

    def recomputed_labels(self, segment: Segment) -> list[str]:
        """Names of the forward operations that the backward pass of a segment runs again, views apart."""
        shape = self.maker.kinds.shape(segment)
        if shape not in self.recomputed:
            self.recomputed[shape] = self._recomputed_labels(segment)
        return self.recomputed[shape]

    def _recomputed_labels(self, segment: Segment) -> list[str]:
        program = backward_program(self.facts, segment)
        forward = {v for index in segment.span for e in self.analysis.blocks[index].forward for v in e.gives}
        again = (i.operation for i in program.instructions if i.value in forward and i.operation.new)
        return list(dict.fromkeys(base_name(op.target) for op in again if op.target is not unpack_two.default))

    # -- dynamic programming ----------------------------------------------------------------------------------------

    def fastest(self, budget: float, states: int | None = None) -> list[Move] | None:
        """The fastest chain of moves whose modelled peak is within `budget` bytes, or None.

        With one of the `states` (by default, as many as is quick) kept at each border, one that keeps least instead.
        """
        fronts = self._fronts(budget, states)
        usable = self._usable(fronts[-1])
        if not np.isfinite(usable).any():
            return None
        return self._trace(fronts, int(np.argmin(usable)))

    def reachable(self, budget: float) -> bool:
        """Whether any chain of moves has a modelled peak within `budget` bytes."""
        return bool(np.isfinite(self._usable(self._fronts(budget, states=1)[-1])).any())

    def _fronts(self, budget: float, states: int | None = None) -> list[Front]:
        fronts, states = [start()], states or self._states()
        for table in self.tables:
            fronts.append(extend(fronts, table, budget, states))
        return fronts

    def _states(self) -> int:
        return min(FRONT, max(LONG // len(self.tables), 1))

    def _usable(self, final: Front) -> Floats:
        """Seconds of the final states; infinite where an inverted last segment has nothing to start from."""
        return np.where((final.reach >= 0) & (not self._outputs_anchor()), np.inf, final.seconds)

    def _outputs_anchor(self) -> bool:
        """An inverted last segment starts from the step's outputs, which the user holds."""
        return set(self.analysis.blocks[-1].live_out) <= set(self.analysis.graph.output_values)

    def _trace(self, fronts: Sequence[Front], state: int) -> list[Move]:
        moves: list[Move] = []
        border = end = len(self.tables)  # `end` is that of the chain that is being followed
        while border:
            front = fronts[border]
            move = self.moves[border - 1][int(front.move[state])]
            source, parent = int(front.source[state]), int(front.parent[state])
            chained = move.segment.strategy == "invert"
            if not (chained and fronts[source].reach[parent] >= border - 1):
                moves.append(self.maker.chains.inversion(source, end - 1) if chained else move)
                end = source
            border, state = source, parent
        return moves[::-1]

    def realise(self, moves: Sequence[Move]) -> Planned:
        """Emit and simulate a chain of moves, in the better order where sweeps may wait."""
        segments = tuple(self.maker.segment(move) for move in moves)
        error = max((m.error for m in moves), default=0.0)
        orders = (False, True) if any(s.strategy == "moonwalk" and s.first for s in segments) else (False,)
        schedules = (emit(self.facts, segments, sweeps_last) for sweeps_last in orders)
        return min(
            (self.measure(self.facts, segments, schedule, error) for schedule in schedules), key=lambda p: p.peak
        )

    def arranged(self, segments: Iterable[Segment]) -> Planned:
        """Emit and simulate segments that someone else has chosen."""
        segments = tuple(segments)
        return self.measure(self.facts, segments, emit(self.facts, segments), 0.0)

    def tidied(self, planned: Planned, peak: float, seconds: float) -> Planned:
        """A plan of fewer segments that is hardly slower and within both bounds, or the same one.

        The search fills what room is left at the ends of an inverted chain with segments of all kinds. Each kind is
        code of its own to compile and a row to read, for a fraction of a percent of time.
        """
        seconds = min(seconds, planned.seconds * (1 + HARDLY))
        fewer = [
            segments
            for segments in self._widened(planned.segments)
            if len(segments) < len(planned.segments) and {s.strategy for s in segments} <= {*self.strategies}
        ]
        for segments in sorted(fewer, key=len)[:TRIALS]:
            with contextlib.suppress(Unreachable):
                found = self.arranged(segments)
                if found.peak <= peak and found.seconds <= seconds:
                    return replace(found, error=planned.error)
        return planned

    def _widened(self, segments: Sequence[Segment]) -> Iterator[tuple[Segment, ...]]:
        """The plan with one of its inverted chains grown at both ends, over what stands there or a checkpoint of it."""
        for chain in segments:
            if chain.strategy not in INVERTED:
                continue
            for last in range(chain.last, min(chain.last + REACH, len(self.moves))):
                core = self.maker.chains.longest(chain.strategy, last)
                if core is not None and core.first <= chain.first:
                    front, back = self._outside(segments, core)
                    yield (*front, core, *back)
                    if back:
                        yield (*front, core, self.maker.checkpoints.segment(core.last + 1, len(self.moves) - 1))

    def _outside(self, segments: Sequence[Segment], core: Segment) -> tuple[list[Segment], list[Segment]]:
        """What a plan has in front of a chain and behind it; what the chain covers in part becomes a checkpoint."""
        front = [s for s in segments if s.last < core.first]
        back = [s for s in segments if s.first > core.last]
        before = front[-1].last + 1 if front else 0
        behind = (back[0].first if back else len(self.moves)) - 1
        if before < core.first:
            front.append(self.maker.checkpoints.segment(before, core.first - 1))
        if core.last < behind:
            back.insert(0, self.maker.checkpoints.segment(core.last + 1, behind))
        return front, back

    @cached_property
    def plain(self) -> Planned:
        """Plain backpropagation, as PyTorch runs it: all that the backward pass reads is kept, nothing written over."""
        workspaces = self.facts.workspace
        facts = Facts(self.analysis, workspace=None if workspaces is None else workspaces.plain)
        segments, device = self._all_kept(), self.analysis.device.plain
        return without_pieces(measure_schedule(facts, segments, emit(facts, segments), device=device), device)

    @cached_property
    def loose(self) -> Planned:
        """The same, lowered as every plan of ours is."""
        return self.arranged(self._all_kept())

    def _all_kept(self) -> tuple[Segment, ...]:
        return tuple(self.maker.keeping.plain(index) for index in range(len(self.analysis.blocks)))

    @remembered
    def within(self, budget: float, plans: int = 8) -> Planned | None:
        """The fastest plan whose *simulated* peak is within `budget`; the modelled budget is moved to get there.

        By what is left or lacking, in steps that grow while it lacks, and by halves between one that was low enough
        and one that was too high; as long as the model promises to gain something. (More states save such rounds.)
        """
        best: Planned | None = None
        promised = math.inf  # seconds of the best one, by the model
        target, enough, short, push = float(budget), 0.0, math.inf, 1
        found: dict[object, int] = {}  # peaks
        for attempt in range(2 * plans):
            moves = self.fastest(target, 2 * self._states())
            if moves is None:
                if best is not None or target >= 2 * budget:
                    break
                target *= 1.04
                continue
            key = tuple((move.segment, move.pieces) for move in moves)
            seconds = sum(move.cost.seconds for move in moves)
            if key not in found:
                hopeless = best is not None and promised - seconds < HARDLY_FASTER * best.seconds
                if hopeless or len(found) == plans:
                    break
                planned = self.realise(moves)
                found[key] = planned.peak
                if planned.peak <= budget and (best is None or planned.seconds < best.seconds):
                    best, promised = planned, seconds
            slack = budget - found[key]
            if slack >= 0:
                enough, push = max(enough, target), 1
                target += max(slack, 0.01 * budget)
            else:
                short = min(short, target)
                target -= push * max(-slack, 2 * CLOSE * budget)
                push *= 2
            if 0 <= slack < min(CLOSE * 2**attempt, CLOSEST) * budget or short - enough < CLOSE * budget:
                break
            if not enough < target < short:
                target = (enough + short) / 2
        return best

    @remembered
    def smallest(self) -> Planned:
        """The plan of the smallest simulated peak that the family reaches, up to a sliver."""
        target = self._lowest(self.reachable)
        chains = [self.fastest(target * scale) for scale in (1.0, 1.01, 1.03, 1.06)]
        chains.append(self.fastest(target, states=1))  # hardly a matter of times
        found = [self.realise(moves) for moves in chains if moves]
        if not found:
            raise NoPlan(", ".join(self.strategies))
        lowest = min(planned.peak for planned in found)
        return min((p for p in found if p.peak <= lowest * (1 + HARDLY_LARGER)), key=lambda planned: planned.seconds)

    @remembered
    def slowed(self, limit: float) -> Planned:
        """The smallest peak whose predicted step time is at most `limit` seconds."""
        smallest, best = self.smallest(), self.loose
        if smallest.seconds <= limit:
            return smallest
        target = self._lowest(lambda budget: self._seconds(budget) <= limit)
        for scale in SCALES:
            moves = self.fastest(target * scale)
            planned = best if moves is None else self.realise(moves)
            if planned.seconds <= limit and planned.peak < best.peak:
                best = planned
            elif best is not self.loose:
                break
        return best

    def _seconds(self, budget: float) -> float:
        """The modelled time of a step of the fastest plan; infinite where there is none."""
        usable = self._usable(self._fronts(budget)[-1])
        return self.loose.seconds + float(min(usable, default=math.inf))

    def _lowest(self, enough: Callable[[float], bool]) -> float:
        """The lowest modelled peak that is enough."""
        low, high = float(self.base + self.later_gradients[0] + 1), self.plain.peak * 2.0
        while high > 1.004 * low:  # in ratios: small budgets leave few states, and are quick to ask for
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high
