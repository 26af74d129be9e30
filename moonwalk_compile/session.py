"""One captured graph on its way to a compiled step: plan it, certify it, lower it, and do so again when need be."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .choice import Certificates, Chooser, Known, LoweredPlan
from .describe import OUTPUTS_TODO, describe, spare_output
from .errors import BudgetError, OptionError, advised
from .inputs import input_positions, is_real, role_of, written_positions
from .meter import StepMeter
from .options import Options
from .passes._torch_compat import disable_current_modes
from .passes.analysis import Analysis, analyse
from .passes.capture import Capture, read_joint
from .passes.certificates import Certificate, chain_error
from .passes.certify import Certifier
from .passes.cost import Device
from .passes.drift import Drift
from .passes.emit import Segment
from .passes.graph import Role
from .passes.inverse import INVERTED
from .passes.inverse.constants import Constants, computed, is_candidate
from .passes.lower import Aim, Boxed, Half, Lowerer, as_boxed
from .passes.plan import NoPlan, Planner
from .passes.planned import Planned
from .passes.program import Program
from .passes.rewrite import to_halves
from .passes.solutions import Facts
from .passes.split import Region, find_region, split
from .passes.timing import Clock, cache_folder
from .passes.workspace import Workspaces
from .passes.wrapper_memory import ProfileUnknown, Workspace
from .pause import collector_paused
from .report import Plan

LOST = 10  # times the tolerance: an error of a chain that is said at once
CUTS = 4  # of pieces of the smallest plan, to bring its peak down; each takes fusion, and so time, away
SPLIT_TODO = 'add the strategy "split", which computes the largest tensors in parts (sums are then of another order)'
TRIAL = 2**30  # bytes of the operands of one operation that may be tried while planning on fake tensors


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
    known: Known = field(default_factory=dict)  # certificates
    plan: Plan | None = None
    forward: Half | None = None
    backward: Half | None = None
    analysis: Analysis | None = None
    planner: Planner | None = None
    planned: Planned | None = None
    lowering_s: float = 0.0
    margin: int = 0  # bytes by which an earlier plan of this step was measured above its prediction
    on_measured: Callable[[int], None] | None = None  # is told the peak of the first steps, as the plan counts it
    meter: StepMeter | None = None
    constants: Constants = field(default_factory=Constants)
    drifted: tuple[Tensor, ...] = ()  # what the last step returned behind its gradients
    facts: Facts = field(init=False)
    lowerer: Lowerer = field(init=False)
    positions: dict[int, int] = field(default_factory=dict)  # primal value -> position among the graph's inputs
    written: frozenset[int] = frozenset()  # the positions of tensors that the step writes to
    region: Region | None = None  # large tensors of the graph whose rows can be computed apart
    in_parts: bool = False  # whether they are
    invertible: bool = True  # whether rules lead back through any block of the graph as it was captured
    captured: tuple[fx.GraphModule, int] | None = None  # of a session that only plans: the joint graph, forward outputs

    # -- AOTAutograd's hooks ---------------------------------------------------------------------------------------

    @collector_paused()
    def partition(
        self, joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's `partition_fn`: the joint graph in, the forward and the backward module out."""
        started = time.perf_counter()
        clock = self._clock()
        self.device = replace(self.device, clock=clock, fused=self.options.lowering == "inductor")
        self.captured = None if self.lower else (joint, num_fwd_outputs)
        self._prepare(joint, num_fwd_outputs)
        try:
            with advised(*self._advice()):
                chooser, chosen = self._settled(joint, num_fwd_outputs)
        except ProfileUnknown as error:
            if clock is not None:
                clock.save()
            self._leave_inductor(error)
            return Session.partition(self, joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        except NoPlan as error:
            others = [f'"{name}"' for name in ("checkpoint", "keep") if name not in self.options.strategies]
            raise OptionError(
                "The strategies cannot train this model",
                f"some of its blocks cannot be treated by {error} alone",
                f"allow {' or '.join(others)} as well",
            ) from None
        planner = chooser.planner
        assert self.analysis is not None
        self.options, self.planned = chooser.options, chosen.planned
        self.forward, self.backward = chosen.forward, chosen.backward
        halves = (self.forward, self.backward) if self.forward and self.backward else None
        self.plan = describe(self.analysis, planner, self.planned, planner.plain, self.options, halves)
        if clock is not None:
            clock.save()
        self.meter = self._watch()
        if self.in_parts and self.region is not None:
            self.plan = replace(self.plan, notes=(*self.plan.notes, self.region.note))
        self.plan = replace(self.plan, planning_s=time.perf_counter() - started - self.lowering_s)
        return self._modules(self.planned, joint)

    def _settled(self, joint: fx.GraphModule, forward_outputs: int) -> tuple[Chooser, LoweredPlan]:
        """The choice for the graph as it was captured, or with its largest tensors in parts where that is better."""
        whole = self._chooser()
        if self.region is None or not self.options.splits or whole.is_easy():
            return whole, whole.settle()
        parts = self._in_parts(joint, forward_outputs)
        if parts is None:
            return whole, whole.settle()
        if not parts._chooser().is_better_than(whole):
            with contextlib.suppress(BudgetError):  # generated code may need more than was simulated
                return whole, whole.settle()
        vars(self).update(vars(parts))
        chooser = self._chooser()
        return chooser, chooser.settle()

    def _advice(self) -> list[str]:
        """What else there is to do about a budget that cannot be met."""
        assert self.planner is not None
        advice = [OUTPUTS_TODO] if spare_output(self.planner) else []
        return [SPLIT_TODO, *advice] if self.region is not None and not self.options.splits else advice

    def _in_parts(self, joint: fx.GraphModule, forward_outputs: int) -> Session | None:
        """Another session for the same graph, with its largest tensors in parts."""
        assert self.planner is not None
        parts = copy.copy(self)
        parts.invertible = self.planner.inverts
        parts._prepare(joint, forward_outputs, in_parts=True)
        assert parts.planner is not None
        parts.planner.plain = self.planner.plain
        return parts if parts.in_parts else None

    @property
    def planner_in_parts(self) -> Planner | None:
        """Of a session that only plans: the planner of its graph in parts, if there is one and it may be used."""
        if self.captured is None or self.region is None or not self.options.splits:
            return None
        parts = self._in_parts(*self.captured)
        return None if parts is None else parts.planner

    def _chooser(self) -> Chooser:
        assert self.planner is not None
        certify = self._certificates_of if self.example_inputs and is_real(self.example_inputs) else None
        lower = self._lowered if self.lower else None
        return Chooser(self.planner, self.options, self.margin, lower, self._programs, certify)

    def _prepare(self, joint: fx.GraphModule, forward_outputs: int, in_parts: bool = False) -> None:
        """Read the joint graph and analyse it."""
        inputs, options = self.example_inputs or (), self.options
        places = input_positions(joint)
        roles = {primal: role_of(inputs[flat]) for primal, flat in places.items() if flat < len(inputs)}
        self.in_parts, self.invertible = in_parts, self.invertible or not in_parts
        capture = read_joint(joint, forward_outputs, self.device, roles, partial(self._rewritten, forward_outputs))
        self.positions = {capture.graph.primals[primal]: flat for primal, flat in places.items()}
        self.written = written_positions(joint, capture.graph.mutated, self.positions, inputs)
        self.analysis = analyse(
            *(capture, self.device, self._read_constants(capture)),
            strategies=self._strategies,
            fixed_sizes=options.lowering == "inductor",
        )
        workspaces = self._workspaces()
        self.facts = self._facts(workspaces)
        self.lowerer = self._lowerer(joint, workspaces.of_call)
        self.planner = self._planner()

    def _rewritten(self, forward_outputs: int, graph: fx.Graph) -> fx.Graph:
        self.region = find_region(graph, forward_outputs)
        done = split(graph, self.region) if self.in_parts and self.region else None
        self.in_parts = done is not None
        return done or graph

    @property
    def _strategies(self) -> tuple[str, ...]:
        """What the planner may use. Rules that lead nowhere are not looked for a second time."""
        unfit = {"split"} if self.invertible else {"split", *INVERTED}
        return tuple(strategy for strategy in self.options.strategies if strategy not in unfit)

    def _facts(self, workspaces: Workspaces, freed: frozenset[int] = frozenset()) -> Facts:
        assert self.analysis is not None
        return Facts(self.analysis, self.options.lowering == "eager", workspaces, freed)

    def _lowerer(self, joint: fx.GraphModule, workspace: Workspace) -> Lowerer:
        assert self.analysis is not None
        return Lowerer(self.analysis, joint, self.options.lowering, workspace)

    def _planner(self) -> Planner:
        return Planner(self.facts, self._strategies, self.certificates, self.options.tolerance)

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

    def _workspaces(self) -> Workspaces:
        """For a device that is not at hand nothing is tried, and only pieces of the graph have a workspace."""
        if not self._at_hand():
            return Workspaces(limit=-1)
        return Workspaces(limit=self._trial_limit(), fused=self.options.lowering == "inductor")

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

    @property
    def certificates(self) -> Certificates:
        """Those of the blocks of the graph as it is planned: in parts it has others."""
        return self.known.get(self.in_parts, {})

    def _certificates_of(self, segments: Sequence[Segment]) -> Certificates:
        """Certificates of what a plan inverts, on the example inputs."""
        assert self.example_inputs is not None
        found = self.certify(self.example_inputs, segments)
        self.known = {**self.known, self.in_parts: {**self.certificates, **found}}
        return found

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

    # -- lowering ------------------------------------------------------------------------------------------------------

    def _programs(self, planned: Planned) -> list[tuple[Program, Sequence[int]]]:
        """What a plan runs, each with what the user holds meanwhile."""
        assert self.analysis is not None
        return [(planned.schedule.forward, ()), (planned.schedule.backward, self.analysis.held)]

    def _lowered(self, planned: Planned, limit: float, smallest: bool) -> LoweredPlan:
        """Compile both halves.

        Depthwise kernels are fast on images channels last, but need room there: where it lacks, the smallest plan does
        without.
        """
        assert self.analysis is not None
        started = time.perf_counter()
        aim = Aim(limit, CUTS if smallest else 0)
        lowered = [self.lowerer.halves(planned.schedule, self.analysis.held, aim)]
        if smallest and _peak(lowered[0]) > limit and self.lowerer.channels_last:
            aim = replace(aim, channels_last=False)
            lowered.append(self.lowerer.halves(planned.schedule, self.analysis.held, aim))
        halves = min(lowered, key=_peak)
        self.lowering_s += time.perf_counter() - started
        return LoweredPlan(planned, _peak(halves) or planned.peak, *halves)

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
