"""One captured graph on its way to a compiled step: plan it, certify it, lower it, and do so again when need be."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .describe import describe
from .errors import BudgetError, OptionError
from .meter import StepMeter
from .options import Budget, Options
from .passes._torch_compat import FakeTensor, InputMutationAOTOutput, PlainAOTInput, disable_current_modes
from .passes.analysis import Analysis, analyse
from .passes.capture import Capture, read_joint
from .passes.certificates import Certificate, chain_error
from .passes.certify import Certifier
from .passes.cost import Device
from .passes.drift import Drift
from .passes.emit import Segment
from .passes.fusion import unmaterialised
from .passes.graph import Role
from .passes.inverse import INVERTED
from .passes.inverse.constants import Constants, computed, is_candidate
from .passes.liveness import simulate
from .passes.lower import Aim, Boxed, Half, Lowerer, as_boxed
from .passes.plan import NoPlan, Planned, Planner
from .passes.program import Program
from .passes.rewrite import to_halves
from .passes.sizes import left_unused, promised
from .passes.solutions import Facts
from .passes.timing import Clock, cache_folder
from .passes.verify import verify, verify_certified
from .passes.workspace import Workspaces
from .passes.wrapper_memory import ProfileUnknown, Workspace, no_workspace
from .report import Plan
from .units import format_bytes

LOST = 10  # times the tolerance: an error of a chain that is said at once
CUTS = 4  # of pieces of the smallest plan, to bring its peak down; each takes fusion, and so time, away
ROOM = 0.04  # part of a budget that is worth another compilation, if generated code leaves it unused
MORE = 2  # such compilations
SPARE = 0.002  # part of a budget that is taken off in addition where generated code exceeds it; twice as much each time
TRIAL = 2**30  # bytes of the operands of one operation that may be tried while planning on fake tensors

Certificates = dict[tuple[str, int], Certificate]


def role_of(value: Any) -> Role:
    """What an input of the captured graph is to the user. Dynamo marks the tensors that modules own."""
    if isinstance(value, torch.nn.Parameter):
        return "parameter"
    return "buffer" if getattr(value, "_dynamo_static_input_type", None) else "input"


def is_real(values: Sequence[Any]) -> bool:
    return not any(isinstance(value, FakeTensor) for value in values)


@dataclass
class Session:
    """Plans and lowers one graph. `example_inputs` are dropped by the caller once the first plan stands.

    After `partition` has run (AOTAutograd calls it), `plan` is the public plan, and `forward` and `backward` are the
    compiled halves.
    """

    options: Options
    device: Device
    example_inputs: Sequence[Any] | None
    lower: bool = True
    certificates: Certificates = field(default_factory=dict)
    plan: Plan | None = None
    forward: Half | None = None
    backward: Half | None = None
    analysis: Analysis | None = None
    planner: Planner | None = None
    planned: Planned | None = None
    lowering_s: float = 0.0
    cornered: bool = False  # the budget left only the smallest plan
    margin: int = 0  # bytes by which an earlier plan of this step was measured above its prediction
    on_measured: Callable[[int], None] | None = None  # is told the peak of the first steps, as the plan counts it
    meter: StepMeter | None = None
    constants: Constants = field(default_factory=Constants)
    drifted: tuple[Tensor, ...] = ()  # what the last step returned behind its gradients
    facts: Facts = field(init=False)
    lowerer: Lowerer = field(init=False)
    positions: dict[int, int] = field(default_factory=dict)  # primal value -> position among the graph's inputs
    written: frozenset[int] = frozenset()  # the positions of tensors that the step writes to

    # -- AOTAutograd's hooks ---------------------------------------------------------------------------------------

    def partition(
        self, joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's `partition_fn`: the joint graph in, the forward and the backward module out."""
        started = time.perf_counter()
        inputs = self.example_inputs or ()
        clock = self._clock()
        self.device = replace(self.device, clock=clock, fused=self.options.lowering == "inductor")
        places = input_positions(joint)
        roles = {primal: role_of(inputs[flat]) for primal, flat in places.items() if flat < len(inputs)}
        capture = read_joint(joint, num_fwd_outputs, self.device, roles)
        self.positions = {capture.graph.primals[primal]: flat for primal, flat in places.items()}
        self.written = written_positions(joint, capture.graph.mutated, self.positions, inputs)
        options = self.options
        self.analysis = analyse(
            *(capture, self.device, self._read_constants(capture)),
            strategies=options.strategies,
            fixed_sizes=options.lowering == "inductor",
        )
        workspaces = self._workspaces()
        self.facts = self._facts(workspaces)
        self.lowerer = self._lowerer(joint, workspaces.of_call if workspaces else no_workspace)
        planner = self._planner()
        self.planner, plain = planner, planner.plain
        try:
            planned = self._settle(planner, plain)
        except ProfileUnknown as error:
            if clock is not None:
                clock.save()
            self._leave_inductor(error)
            return Session.partition(self, joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        except NoPlan as error:
            raise OptionError(
                "The strategies cannot train this model",
                f"some of its blocks cannot be treated by {error} alone",
                'allow "checkpoint" or "keep" as well',
            ) from None
        self.planned = planned
        halves = (self.forward, self.backward) if self.forward and self.backward else None
        self.plan = describe(self.analysis, planner, planned, plain, self.options, halves)
        if clock is not None:
            clock.save()
        self.meter = self._watch()
        self.plan = replace(self.plan, planning_s=time.perf_counter() - started - self.lowering_s)
        return self._modules(planned, joint)

    def _facts(self, workspaces: Workspaces | None, freed: frozenset[int] = frozenset()) -> Facts:
        assert self.analysis is not None
        return Facts(self.analysis, self.options.lowering == "eager", workspaces, freed)

    def _lowerer(self, joint: fx.GraphModule, workspace: Workspace) -> Lowerer:
        assert self.analysis is not None
        return Lowerer(self.analysis, joint, self.options.lowering, workspace)

    def _planner(self) -> Planner:
        return Planner(self.facts, self.options.strategies, self.certificates, self.options.tolerance)

    def _modules(self, planned: Planned, joint: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.analysis is not None
        return to_halves(self.analysis, planned.schedule, joint)

    def _read_constants(self, capture: Capture) -> Constants:
        """What inverse rules may know of values: those of buffers, and those that are the same at every step."""
        inputs, graph = self.example_inputs or (), capture.graph
        owned = {
            v: inputs[flat] for v, flat in self.positions.items() if graph.values[v].role in ("parameter", "buffer")
        }
        found = {value: tensor for value, tensor in owned.items() if is_candidate(tensor)}
        with disable_current_modes(), torch.no_grad():
            self.constants = Constants.of({**(found if is_real(inputs) else {}), **computed(capture)})
        return self.constants

    @property
    def trusted(self) -> list[int]:
        """The positions among the graph's inputs of the buffers that inverse rules rest on."""
        return [self.positions[value] for value in sorted(self.constants.trusted & self.positions.keys())]

    def places(self, role: Role) -> list[int]:
        """The positions among the graph's inputs of those that have this role."""
        assert self.analysis is not None
        return [flat for value, flat in self.positions.items() if self.analysis.graph.values[value].role == role]

    @property
    def inverts(self) -> bool:
        return self.planned is not None and any(s.strategy in INVERTED for s in self.planned.segments)

    def _at_hand(self) -> bool:
        return not self.device.datasheet or torch.cuda.is_available()

    def _trial_limit(self) -> float:
        """Only small trials where the model may be larger than this machine."""
        return math.inf if is_real(self.example_inputs or ()) else TRIAL

    def _workspaces(self) -> Workspaces | None:
        return Workspaces(limit=self._trial_limit()) if self._at_hand() else None

    def _watch(self) -> StepMeter | None:
        inputs = self.example_inputs or ()
        if self.on_measured is None or not self.lower or not is_real(inputs):
            return None
        assert self.analysis is not None
        device = next((v.device for v in inputs if isinstance(v, Tensor) and v.device.type != "cpu"), None)
        return StepMeter(device or torch.device("cpu"), len(self.analysis.graph.tangents), self.on_measured)

    def _clock(self) -> Clock | None:
        fused, limit = self.options.lowering == "inductor", self._trial_limit()
        if self.options.profile != "measure":
            return None if self.device.datasheet else Clock(fused=fused, limit=limit)
        if not self._at_hand():
            what = f"there is no {self.device.name} on this machine"
            raise OptionError("Nothing can be measured", what, 'leave out profile="measure", or plan for "cpu"')
        return Clock(fused=fused, limit=limit, folder=cache_folder())

    def compile_forward(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        assert self.forward is not None
        return self.meter.forward(self.forward.call) if self.meter else self.forward.call

    def compile_backward(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        assert self.backward is not None
        call = self._without_drifts(self.backward.call)
        return self.meter.backward(call) if self.meter else call

    def _without_drifts(self, call: Boxed) -> Boxed:
        """The results that AOTAutograd expects; how far the chains have drifted stays here."""
        assert self.planned is not None
        count = len(self.planned.schedule.drifts)
        if not count:
            return call

        def run(arguments: list[Any]) -> Sequence[Any]:
            results = call(arguments)
            self.drifted = tuple(results[-count:])
            if self.device.name == "cpu":  # elsewhere, asking would wait for the device
                self._warn_of_drift()
            return results[:-count]

        return as_boxed(run)

    def _warn_of_drift(self) -> None:
        """Weights or inputs may change at once by so much that this very step is lost, before the next is planned."""
        lost = [size for size in map(float, self.drifted) if not size <= LOST * self.options.tolerance]
        if lost:
            warnings.warn(
                f"moonwalk: the gradients of this step may be wrong: inverted values are off by {max(lost):.1e}, "
                "after a sudden change of weights or inputs; skip its update. The next step is planned anew",
                stacklevel=2,
            )

    def drifts(self) -> dict[Drift, float]:
        """How far the values of each chain came back from the true ones in the last step, asked once."""
        sizes, self.drifted = [float(size) for size in self.drifted], ()
        return dict(zip(self.planned.schedule.drifts, sizes, strict=True)) if sizes and self.planned else {}

    # -- certificates ------------------------------------------------------------------------------------------------

    def _certified(self, planner: Planner, plain: Planned, less: int, rounds: int = 6) -> Planned:
        """Plan, measure what the plan inverts, and plan again until nothing is inverted without a certificate."""
        inputs = self.example_inputs or ()
        for _ in range(rounds):
            planned = self._choose(planner, plain, less)
            open_segments = planner.uncertified(planned.segments)
            if not open_segments or not inputs or not is_real(inputs):
                return planned
            found = self.certify(inputs, open_segments)
            self.certificates = {**self.certificates, **found}
            planner.certify(found)
            confirmed = planner.still_holds(planned)
            if confirmed is not None:
                return confirmed
        planner.forbid_inversion()
        return self._choose(planner, plain, less)

    def certify(
        self, inputs: Sequence[Any], segments: Iterable[Segment], known: Certificates | None = None
    ) -> Certificates:
        """Measure certificates on real inputs of the captured graph (parameters included)."""
        assert self.analysis is not None
        primals = {value: inputs[flat] for value, flat in self.positions.items() if isinstance(inputs[flat], Tensor)}
        unknown = len(primals) < len(self.analysis.graph.primals)
        kinds = {value.device.type for value in primals.values()} or {"cpu"}
        with disable_current_modes(), torch.no_grad(), no_autocast(kinds):
            if unknown:
                return {(s.strategy, i): Certificate(math.inf, math.inf) for s in segments for i in s.span}
            return Certifier(self.analysis, self.facts, primals).measure(segments, known)

    def error_under(self, certificates: Certificates) -> float:
        """The predicted gradient error of the present plan under newly measured certificates."""
        assert self.planned is not None
        return max((chain_error(s, certificates) for s in self.planned.segments if s.strategy in INVERTED), default=0.0)

    def contradicted(self, drifts: Iterable[Drift], certificates: Certificates) -> Certificates:
        """Chains that drift though their certificates are good: these are not trusted any more."""
        assert self.planned is not None
        spans = {(drift.strategy, drift.first) for drift in drifts}
        chains = [s for s in self.planned.segments if (s.strategy, s.first) in spans]
        good = [s for s in chains if chain_error(s, certificates) <= self.options.tolerance]
        return {(s.strategy, index): Certificate(math.inf, math.inf) for s in good for index in s.span}

    # -- choosing ------------------------------------------------------------------------------------------------------

    def _settle(self, planner: Planner, plain: Planned) -> Planned:
        """A plan within the budget, or within what the budget came to for other inputs.

        The last batch of an epoch may be too small for its part of plain's peak, most of which is then gradients.
        """
        try:
            return self._settled(planner, plain)
        except BudgetError as error:
            budget = self.options.budget
            if budget is None or budget.granted <= error.budget_bytes:
                raise
            self.options = replace(self.options, budget=Budget(bytes=budget.granted, granted=budget.granted))
            return self._settled(planner, plain)

    def _settled(self, planner: Planner, plain: Planned, rounds: int = 5) -> Planned:
        """A plan that fits as lowered: where the generated code needs more than the budget, take that off and retry.

        Where it needs clearly less than was simulated, another plan may use what is left: planned again, `MORE` times
        at most. Raises BudgetError when even the smallest plan does not fit.
        """
        limit = math.inf if self.options.budget is None else self.options.budget.resolve(plain.peak)
        spare = left_unused(limit, self._places())
        less, most, peak, settled = self.margin + spare - self._fused_away(planner.loose, limit), 0, 0, None
        for attempt in range(rounds):
            last = attempt == rounds - 1 and settled is None
            planned = self._certified(planner, plain, int(limit) if last else less)
            assert self.analysis is not None
            verify(self.analysis, planned.schedule)
            if self.example_inputs and is_real(self.example_inputs):
                verify_certified(planned.segments, planner.certificates)
            peak = (self._lower(planned, limit - self.margin) if self.lower else planned.peak) + self.margin
            if peak <= limit:
                settled, most = (planned, self.forward, self.backward), less
                less = peak - planned.peak + spare
                if self.cornered:  # between this plan and the budget the simulation saw none: look a bit further
                    less = min(less, peak - int(limit))
                if not self._leaves_room(peak, limit) or planned is planner.loose:
                    break
            elif settled is None and self.cornered:
                break
            else:
                less = peak - planned.peak + spare + int(limit * SPARE * 2**attempt)
            if settled is not None and (attempt >= MORE or less >= most):
                break
        if settled is None:
            raise BudgetError(int(limit), promised(peak, self._places()), pinned_tensors(planner, planned))
        planned, self.forward, self.backward = settled
        return planned

    def _fused_away(self, planned: Planned, limit: float) -> int:
        """Bytes at the peak that generated code will hardly need; 0 where no other plan would be chosen for them."""
        if not (self.lower and self.device.fused) or limit == math.inf:
            return 0
        assert self.analysis is not None
        programs = self._programs(planned)
        peaks = [
            max(simulate(way(program), self.analysis.charges, pinned=pinned).peak for program, pinned in programs)
            for way in (lambda program: program, unmaterialised)
        ]
        saved = peaks[0] - peaks[1]
        return saved if saved > ROOM * limit else 0

    def _programs(self, planned: Planned) -> list[tuple[Program, Sequence[int]]]:
        """Each with what the user holds meanwhile."""
        assert self.analysis is not None
        return [(planned.schedule.forward, ()), (planned.schedule.backward, self.analysis.held)]

    def _places(self) -> set[torch.device]:
        assert self.analysis is not None
        return {fake.device for fake in self.analysis.fakes.values() if isinstance(fake, Tensor)}

    def _leaves_room(self, peak: int, limit: float) -> bool:
        """Whether generated code needs so much less than was simulated that another plan may use it."""
        generated = self.backward is not None and self.backward.timeline is not None
        return generated and ROOM * limit < limit - peak < math.inf

    def _choose(self, planner: Planner, plain: Planned, less: int) -> Planned:
        """The plan as simulated; `less` bytes are taken off the budget. What cannot be met gets the smallest plan."""
        if self.options.budget is None:
            limit = self.options.max_slowdown * plain.seconds
            planned = planner.slowed(limit)
            return planner.tidied(planned, planned.peak, limit)
        budget = self.options.budget.resolve(plain.peak) - less
        if plain.peak <= budget and "keep" in self.options.strategies:
            return planner.loose
        found = planner.within(budget)
        self.cornered = found is None
        return planner.smallest() if found is None else planner.tidied(found, budget, math.inf)

    def _lower(self, planned: Planned, limit: float) -> int:
        """Compile both halves; return the peak of what was generated (of the simulation where that is what runs).

        Depthwise kernels are fast on images channels last, but need room there: where it lacks, the smallest plan does
        without.
        """
        assert self.analysis is not None
        started = time.perf_counter()
        aim = Aim(limit, CUTS if self.cornered else 0)
        lowered = [self.lowerer.halves(planned.schedule, self.analysis.held, aim)]
        if self.cornered and _peak(lowered[0]) > limit and self.lowerer.channels_last:
            aim = replace(aim, channels_last=False)
            lowered.append(self.lowerer.halves(planned.schedule, self.analysis.held, aim))
        self.forward, self.backward = min(lowered, key=_peak)
        self.lowering_s += time.perf_counter() - started
        return _peak((self.forward, self.backward)) or planned.peak

    def _leave_inductor(self, reason: ProfileUnknown) -> None:
        """Of code whose memory nobody can tell no peak can be promised: plan again without it."""
        warnings.warn(
            f"moonwalk: the memory of the code that Inductor generated is not known ({reason}): this step runs under "
            'lowering="eager"',
            stacklevel=2,
        )
        self.options = replace(self.options, lowering="eager")


def _peak(halves: tuple[Half, Half]) -> int:
    return max(half.peak for half in halves)


@contextlib.contextmanager
def no_autocast(kinds: Iterable[str]) -> Iterator[None]:
    """The captured graph holds its casts already."""
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def input_positions(joint: fx.GraphModule) -> dict[int, int]:
    """The position in the captured graph's inputs of each primal, by AOTAutograd's descriptions."""
    found, primal = {}, 0
    for node in joint.graph.find_nodes(op="placeholder"):
        if "tangents" in str(node.target):
            continue
        description = node.meta.get("desc")
        if isinstance(description, PlainAOTInput):  # not an effect token, a base of views or a seed
            found[primal] = description.idx
        primal += 1
    return found


def written_positions(
    joint: fx.GraphModule, mutated: Iterable[int], positions: Mapping[int, int], inputs: Sequence[Any]
) -> frozenset[int]:
    """Inputs that the graph writes to, or AOTAutograd behind it. Where inputs share memory and one of them is written
    to, AOTAutograd merges them, and they have no position."""
    described = joint.graph.output_node().meta.get("desc") or ()
    behind = [d.mutated_input for d in described if isinstance(d, InputMutationAOTOutput)]
    found = {positions[value] for value in mutated if value in positions}
    found |= {source.idx for source in behind if isinstance(source, PlainAOTInput)}
    tensors = {place for place, value in enumerate(inputs) if isinstance(value, Tensor)}
    return frozenset(found | (tensors - set(positions.values())))


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
