"""The choice of a plan: the fastest that fits its budget as lowered, or the smallest within a slowdown."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .errors import BudgetError
from .options import Budget, Options
from .passes.certificates import Certificate
from .passes.emit import Segment
from .passes.fusion import unmaterialised
from .passes.liveness import simulate
from .passes.lower import Half
from .passes.opaque import has_pieces
from .passes.plan import Planner
from .passes.planned import Planned
from .passes.program import Program
from .passes.sizes import left_unused, promised
from .passes.verify import verify, verify_certified
from .pause import collector_back
from .units import format_bytes

ROOM = 0.04  # part of a budget that is worth another compilation, if generated code leaves it unused
MORE = 2  # such compilations
SPARE = 0.002  # part of a budget that is taken off in addition where generated code exceeds it; twice as much each time

EASY = 1.02  # of plain's time: of a plan that takes less, no other is looked for
BETTER = 0.98  # of the time or the peak of another plan, to be worth a graph of more operations


class TooSlow(Exception):
    """No plan keeps to `max_slowdown`, as what has sizes that depend on data is computed again in any."""

    def __init__(self, ratio: float, allowed: float) -> None:
        super().__init__(
            f"what has sizes that depend on data would be computed twice, for {ratio:.2f} times the time, and "
            f"max_slowdown is {allowed:g}: allow more, or give a budget"
        )


Certificates = dict[tuple[str, int], Certificate]
Known = dict[bool, Certificates]  # of the blocks of a graph as it was captured, and of those of the same graph in parts


@dataclass(frozen=True)
class LoweredPlan:
    """A plan with its compiled halves. `peak` is that of the generated code; of the simulation where that is what runs,
    or where nothing was compiled."""

    planned: Planned
    peak: int
    forward: Half | None = None
    backward: Half | None = None

    @property
    def generated(self) -> bool:
        return self.backward is not None and self.backward.timeline is not None


@dataclass
class Chooser:
    """Chooses for one step. Plans are lowered by `lower`, which is told the limit and whether the plan is the smallest;
    `programs` are what a plan runs, each with what the user holds meanwhile; `certify` measures what a plan inverts
    (None without real inputs). `margin` are bytes by which an earlier plan was measured above its prediction."""

    planner: Planner
    options: Options
    margin: int
    lower: Callable[[Planned, float, bool], LoweredPlan] | None
    programs: Callable[[Planned], list[tuple[Program, Sequence[int]]]]
    certify: Callable[[list[Segment]], Certificates] | None
    cornered: bool = False  # the budget left only the smallest plan

    def is_easy(self) -> bool:
        """Whether a plan fits the budget that is hardly slower than plain backpropagation."""
        planned, plain = self.foreseen, self.planner.plain
        return self.options.budget is not None and not self.cornered and planned.seconds <= EASY * plain.seconds

    def is_better_than(self, other: Chooser) -> bool:
        """By simulation: within the budget where the other is not, or else faster; smaller where there is none."""
        mine, theirs = self.foreseen, other.foreseen
        if self.options.budget is None or (self.cornered and other.cornered):
            return mine.peak < BETTER * theirs.peak
        if self.cornered != other.cornered:
            return other.cornered
        return mine.seconds < BETTER * theirs.seconds

    @cached_property
    def foreseen(self) -> Planned:
        """The plan that is tried first, before anything is measured or lowered."""
        return self._chosen(self._taken_off())

    def settle(self) -> LoweredPlan:
        """A plan within the budget, or within what the budget came to for other inputs.

        The last batch of an epoch may be too small for its part of plain's peak, most of which is then gradients.
        """
        try:
            return self._settled()
        except BudgetError as error:
            budget = self.options.budget
            if budget is None or budget.granted <= error.budget_bytes:
                raise
            self.options = replace(self.options, budget=Budget(bytes=budget.granted, granted=budget.granted))
            return self._settled()

    def _settled(self, rounds: int = 5) -> LoweredPlan:
        """A plan that fits as lowered: where the generated code needs more than the budget, take that off and retry.

        Where it needs clearly less than was simulated, another plan may use what is left: planned again, `MORE` times
        at most. Raises BudgetError when even the smallest plan does not fit.
        """
        planner, analysis = self.planner, self.planner.analysis
        places, limit = self._places(), self._limit()
        spare = left_unused(limit, places)
        less, most, peak, settled = self._taken_off(), 0, 0, None
        for attempt in range(rounds):
            last = attempt == rounds - 1 and settled is None
            planned = self._certified(int(limit) if last else less)
            verify(analysis, planned.schedule)
            if self.certify is not None:
                verify_certified(planned.segments, planner.certificates)
            lowered = self._lowered(planned, limit)
            peak = lowered.peak + self.margin
            if peak <= limit:
                settled, most = lowered, less
                less = peak - planned.peak + spare
                if self.cornered:  # between this plan and the budget the simulation saw none: look a bit further
                    less = min(less, peak - int(limit))
                if not _leaves_room(lowered, peak, limit) or planned is planner.loose:
                    break
            elif settled is None and self.cornered:
                break
            else:
                less = peak - planned.peak + spare + int(limit * SPARE * 2**attempt)
            if settled is not None and (attempt >= MORE or less >= most):
                break
        if settled is None:
            raise BudgetError(int(limit), promised(peak, places), pinned_tensors(planner, planned))
        return settled

    def _limit(self) -> float:
        return math.inf if self.options.budget is None else self.options.budget.resolve(self.planner.plain.peak)

    def _places(self) -> set[torch.device]:
        return {fake.device for fake in self.planner.analysis.fakes.values() if isinstance(fake, Tensor)}

    def _taken_off(self) -> int:
        """Bytes of the budget that the first plan leaves alone; negative where generated code will need less."""
        limit = self._limit()
        return self.margin + left_unused(limit, self._places()) - self._fused_away(limit)

    def _lowered(self, planned: Planned, limit: float) -> LoweredPlan:
        if self.lower is None:
            return LoweredPlan(planned, planned.peak)
        with collector_back() if self.options.lowering == "inductor" else contextlib.nullcontext():
            return self.lower(planned, limit - self.margin, self.cornered)

    def _fused_away(self, limit: float) -> int:
        """Bytes at the peak that generated code will hardly need; 0 where no other plan would be chosen for them."""
        analysis = self.planner.analysis
        if self.lower is None or not analysis.device.fused or limit == math.inf:
            return 0
        programs = self.programs(self.planner.loose)
        peaks = [
            max(simulate(way(program), analysis.charges, pinned=pinned).peak for program, pinned in programs)
            for way in (lambda program: program, unmaterialised)
        ]
        saved = peaks[0] - peaks[1]
        return saved if saved > ROOM * limit else 0

    def _certified(self, less: int, rounds: int = 6) -> Planned:
        """Plan, measure what the plan inverts, and plan again until nothing is inverted without a certificate."""
        planner = self.planner
        for _ in range(rounds):
            planned = self._chosen(less)
            open_segments = planner.uncertified(planned.segments)
            if not open_segments or self.certify is None:
                return planned
            planner.certify(self.certify(open_segments))
            confirmed = planner.still_holds(planned)
            if confirmed is not None:
                return confirmed
        planner.forbid_inversion()
        return self._chosen(less)

    def _chosen(self, less: int) -> Planned:
        """The plan as simulated; `less` bytes are taken off the budget. What cannot be met gets the smallest plan."""
        planner, plain = self.planner, self.planner.plain
        if self.options.budget is None:
            limit = self.options.max_slowdown * plain.seconds
            planned = planner.slowed(limit)
            if planned.seconds > limit and has_pieces(planner.analysis.graph):
                raise TooSlow(planned.seconds / plain.seconds, self.options.max_slowdown)
            return planner.tidied(planned, planned.peak, limit)
        budget = self.options.budget.resolve(plain.peak) - less
        if plain.peak <= budget and "keep" in self.options.strategies:
            return planner.loose
        found = planner.within(budget)
        self.cornered = found is None
        return planner.smallest() if found is None else planner.tidied(found, budget, math.inf)


def _leaves_room(lowered: LoweredPlan, peak: int, limit: float) -> bool:
    """Whether generated code needs so much less than was simulated that another plan may use it."""
    return lowered.generated and ROOM * limit < limit - peak < math.inf


def pinned_tensors(planner: Planner, planned: Planned, most: int = 6) -> tuple[str, ...]:
    """The largest values that are alive at the peak of a plan."""
    graph, schedule = planner.analysis.graph, planned.schedule
    backward = planned.backward.peak >= planned.forward.peak
    program, timeline = (schedule.backward, planned.backward) if backward else (schedule.forward, planned.forward)
    if not timeline.during:
        return ()
    at = timeline.during.index(max(timeline.during))
    made = {slot: (-1, value) for slot, value in program.inputs}
    made |= {i.slot: (p, i.value) for p, i in enumerate(program.instructions) if i.value is not None}
    alive = {value for slot, (born, value) in made.items() if born <= at <= program.last_use.get(slot, born)}
    charges = planner.analysis.charges
    roots = {charges[value] for value in alive if charges[value][1]}
    largest = sorted(roots, key=lambda item: -item[1])[:most]
    return tuple(f"{graph.values[root].name} ({format_bytes(size)})" for root, size in largest)
