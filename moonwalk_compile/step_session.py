"""How a whole training step is planned and lowered: as one program, inside AOTAutograd's forward half.

AOTAutograd still looks after duplicate inputs, overwritten buffers and the like; its backward half only hands on the
gradients that the step has not used up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from .choice import LoweredPlan
from .errors import UsageError
from .meter import StepMeter, WholeMeter
from .passes.graph import Ref
from .passes.joint import JointMeasure, UpdateImpossible, Updates, handing_back, handing_over, verify_updates
from .passes.joint_lower import JointLowerer
from .passes.lower import Boxed, Half, as_boxed, boxed_eager
from .passes.plan import Planner
from .passes.planned import Planned
from .passes.program import Program
from .passes.rewrite import to_module
from .passes.solutions import Facts
from .passes.workspace import Workspaces
from .passes.wrapper_memory import Workspace
from .report import Plan
from .session import Session
from .updates import Updater

TITLE = "This step cannot be generated"


class PlanOnly(Exception):
    """Ends a compilation when the plan stands and nothing is to run."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.plan = plan


@dataclass
class StepSession(Session):
    """Plans and lowers a step; `module` is the whole of it once it is lowered."""

    updater: Updater | None = None
    note: str = ""
    module: fx.GraphModule | None = None
    numbers: dict[int, int] = field(default_factory=dict)  # of the optimizer's parameters, by their value in the graph
    measure: JointMeasure = field(init=False)

    def partition(
        self, joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            modules = super().partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        except UpdateImpossible as error:
            raise UsageError(TITLE, str(error), "leave the optimizer out, and call its step() yourself") from None
        assert self.plan is not None
        self.plan = replace(self.plan, notes=(*self.plan.notes, self._note()))
        return modules

    def _note(self) -> str:
        if self.updater is None:
            return self.note or "the gradients of all parameters remain"
        assert self.analysis is not None
        done = len(self.measure.updates.gradients(self.analysis))
        left = sum(isinstance(gradient, Ref) for gradient in self.analysis.graph.gradients) - done
        return f"{done} parameters are updated within the step, {left or 'no'} gradients remain"

    def _facts(self, workspaces: Workspaces, freed: frozenset[int] = frozenset()) -> Facts:
        assert self.analysis is not None
        self._check_loss()
        updates = Updates(nothing)
        if self.updater is not None:
            self.numbers = self._numbers(self.updater)
            tried = self.updater.workspaces(list(self.numbers.values()))
            updates = Updates(self.updater.update, self.numbers, tried)
        self.measure = JointMeasure(updates)
        return super()._facts(workspaces, updates.freed(self.analysis))

    def _numbers(self, updater: Updater) -> dict[int, int]:
        place = {id(owned.parameter): number for number, owned in enumerate(updater.owned)}
        inputs = self.example_inputs or ()
        found = {value: id(inputs[flat]) for value, flat in self.positions.items()}
        return {value: place[key] for value, key in found.items() if key in place}

    def _check_loss(self) -> None:
        """The step starts backward from one number, and knows of nothing else that needs a gradient."""
        assert self.analysis is not None
        graph = self.analysis.graph
        values = graph.values
        if len(graph.tangents) != 1 or len(graph.differentiated) != 1:
            what = "beside the loss, an input that requires a gradient is overwritten, or something computed is stored"
            raise UsageError(TITLE, what, "detach what the model stores, or use moonwalk_compile")
        loss = values[graph.outputs[graph.differentiated[0]].slot]
        if loss.shape or values[graph.tangents[0]].shape:
            what = f"the loss has the shape {tuple(values[graph.tangents[0]].shape)}"
            raise UsageError(TITLE, what, "return one number, such as loss.mean()")

    def _planner(self) -> Planner:
        return Planner(self.facts, self._strategies, self.certificates, self.options.tolerance, self.measure)

    # -- lowering ------------------------------------------------------------------------------------------------------

    def _lowerer(self, joint: fx.GraphModule, workspace: Workspace) -> JointLowerer:
        assert self.analysis is not None
        lowerer = JointLowerer(self.analysis, joint, self.options.lowering, workspace)
        lowerer.updates = self.measure.updates
        return lowerer

    def _lowered(self, planned: Planned, limit: float, smallest: bool) -> LoweredPlan:
        """Compile the step."""
        assert self.analysis is not None and isinstance(self.lowerer, JointLowerer)
        verify_updates(self.measure.joined(self.facts, planned.schedule), self.measure.updates)
        program = self.measure.program(self.facts, planned.schedule)
        left = Half(boxed_eager(self._module(handing_back(self.analysis, program), "MoonwalkGradients")))
        program = handing_over(self.analysis, program)
        if self.options.lowering == "eager":
            module = self._module(program, "MoonwalkStep")
            return LoweredPlan(planned, planned.peak, Half(boxed_eager(module)), left)
        started = time.perf_counter()
        forward, rest = self.lowerer.whole(program, len(planned.schedule.forward.instructions))
        self.lowering_s += time.perf_counter() - started
        return LoweredPlan(planned, max(forward.peak, rest.peak), forward, replace(left, timeline=rest.timeline))

    def _programs(self, planned: Planned) -> list[tuple[Program, Sequence[int]]]:
        return [(self.measure.joined(self.facts, planned.schedule), ())]

    def _module(self, program: Program, name: str) -> fx.GraphModule:
        assert self.analysis is not None
        return to_module(self.analysis, program, self.lowerer.root, name)

    def _modules(self, planned: Planned, joint: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self.analysis is not None
        program = self.measure.program(self.facts, planned.schedule)
        forward, backward = handing_over(self.analysis, program), handing_back(self.analysis, program)
        backward = replace(backward, outputs=backward.outputs[: len(self.analysis.graph.gradients)])
        self.module = self._module(forward, "MoonwalkStep")
        return self.module, self._module(backward, "MoonwalkGradients")

    def _watch(self) -> StepMeter | None:
        meter = super()._watch()
        return None if meter is None else WholeMeter(meter.device, meter.tangents, meter.on_measured)

    def compile_forward(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        assert self.plan is not None
        if not self.lower:
            raise PlanOnly(self.plan)
        assert self.forward is not None
        run = self._guarded(self.forward.call)
        return self.meter.forward(run) if self.meter else run

    def compile_backward(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        assert self.backward is not None
        return self._without_drifts(self.backward.call)

    def _guarded(self, run: Boxed) -> Boxed:
        """Before each step: the parameters are the optimizer's own, and nothing else lies in their memory."""
        if self.updater is None:
            return run
        assert self.analysis is not None
        updater = self.updater
        primals = self.analysis.graph.primals
        places = {place: self.numbers[value] for place, value in enumerate(primals) if value in self.numbers}

        def call(arguments: list[Any]) -> Sequence[Any]:
            updater.begin()
            check_memory(updater, places, arguments)
            return run(arguments)

        return as_boxed(call)


def nothing(number: int, parameter: Tensor, gradient: Tensor) -> None:
    """The update of a step without an optimizer: never called, as there is no parameter to call it for."""
    raise AssertionError("there is no optimizer")


def check_memory(updater: Updater, places: Mapping[int, int], arguments: Sequence[Any]) -> None:
    """Raise UsageError where updating a parameter early would change what another argument holds."""
    found = [value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0 for value in arguments]
    owned: dict[int, int] = {}
    for place, number in places.items():
        address = found[place]
        if address and address in owned:
            raise _shared("two parameters of the optimizer share memory, and are not one parameter")
        owned[address] = place
        if address != updater.owned[number].parameter.untyped_storage().data_ptr():
            raise _shared("a parameter was replaced by another one within the step")
    for place, address in enumerate(found):
        if address and place not in places and address in owned:
            raise _shared("an input, a buffer or another parameter shares memory with a parameter of the optimizer")


def _shared(what: str) -> UsageError:
    return UsageError(TITLE, what, "tie parameters by assigning the same nn.Parameter, and pass copies as inputs")
