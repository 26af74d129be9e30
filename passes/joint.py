"""Both programs of a step as one, with each parameter updated as soon as nobody reads it any more.

Nothing is handed from a forward to a backward pass then: what is kept simply stays alive. An update reads a parameter
and its gradient and writes the parameter in place, so it stands behind the last instruction that reads the parameter
or what may be a view of it; behind it the gradient is freed, and gradients do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .analysis import Analysis
from .emit import Schedule, Segment
from .fusion import program_seconds
from .graph import Operation, Ref, map_refs, refs_in
from .liveness import Timeline, simulate
from .planned import Planned
from .program import Instruction, Program
from .reuse import is_fresh, written_over
from .solutions import Facts, waiting_seconds
from .verify import VerificationError


class UpdateImpossible(Exception):
    """A parameter cannot be updated within the step, for the reason given."""


@dataclass(frozen=True)
class Updates:
    """Which parameters are updated within the step, and how.

    Attributes:
        target: `target(number, parameter, gradient)` updates in place and returns nothing.
        numbers: the number of each such parameter, by its value in the graph.
        workspace: bytes that the update of each number holds within its call.
    """

    target: Callable[[int, Tensor, Tensor], None]
    numbers: Mapping[int, int] = field(default_factory=dict)
    workspace: Mapping[int, int] = field(default_factory=dict)

    def gradients(self, analysis: Analysis) -> dict[int, int]:
        """The parameter of each gradient that is used up within the step, by its position among the gradients."""
        graph = analysis.graph
        return {
            place: parameter
            for place, (parameter, gradient) in enumerate(zip(graph.primals, graph.gradients, strict=True))
            if parameter in self.numbers and isinstance(gradient, Ref)
        }

    def freed(self, analysis: Analysis) -> frozenset[int]:
        """The values of gradients that nobody but an update wants."""
        places, graph = self.gradients(analysis), analysis.graph
        lasting = {ref.slot for place, ref in enumerate(graph.gradients) if place not in places and ref is not None}
        return frozenset(graph.gradients[place].slot for place in places) - lasting - {*graph.output_values}

    def is_update(self, operation: Operation) -> bool:
        return operation.target is self.target


# -- one program -------------------------------------------------------------------------------------------------------


def join(analysis: Analysis, schedule: Schedule) -> Program:
    """The forward program, the gradient of the loss (one), the backward program; outputs and gradients come out."""
    forward, backward, graph = schedule.forward, schedule.backward, analysis.graph
    outputs = forward.outputs[: len(graph.outputs)]
    handed = forward.outputs[len(graph.outputs) :]
    free = 1 + max((i.slot for i in forward.instructions), default=-1)
    free = max(free, 1 + max((slot for slot, _ in forward.inputs), default=-1))
    slots: dict[int, int] = {}
    for (slot, _), ref in zip(backward.inputs, handed, strict=False):
        slots[slot] = ref.slot
    ones = _ones(analysis, outputs, free)
    slots[backward.inputs[-1][0]] = ones.slot
    moved = []
    for number, instruction in enumerate(backward.instructions, start=free + 1):
        slots[instruction.slot] = number
        moved.append(instruction._replace(slot=number, slots=tuple(slots[slot] for slot in instruction.slots)))
    gradients = map_refs(tuple(backward.outputs), lambda ref: Ref(slots[ref.slot]))
    return Program(forward.inputs, (*forward.instructions, ones, *moved), (*outputs, *gradients))


def _ones(analysis: Analysis, outputs: Sequence[Any], slot: int) -> Instruction:
    """The gradient that `loss.backward()` starts from."""
    (tangent,) = analysis.graph.tangents
    loss = outputs[analysis.graph.differentiated[0]]
    size = analysis.graph.values[tangent].bytes
    operation = Operation(torch.ops.aten.ones_like.default, (Ref(0),), {}, (size,), ((-1, 0),))
    return Instruction(slot, operation, (loss.slot,), tangent, len(analysis.blocks) - 1)


def with_updates(analysis: Analysis, program: Program, updates: Updates) -> Program:
    """The joint program with its updates in place; gradients that they use up are no outputs any more."""
    count = len(analysis.graph.outputs)
    outputs, gradients = program.outputs[:count], list(program.outputs[count:])
    slot_of = {value: slot for slot, value in program.inputs}
    behind = _aliases(program)
    last = _last_readers(program, behind)
    born = {instruction.slot: position for position, instruction in enumerate(program.instructions)}
    owned = {slot_of[parameter] for parameter in updates.numbers}
    due: dict[int, list[Instruction]] = {}
    free = 1 + max(instruction.slot for instruction in program.instructions)
    for place, parameter in updates.gradients(analysis).items():
        gradient, own = gradients[place].slot, slot_of[parameter]
        if behind[gradient] & owned:
            raise UpdateImpossible(f"the gradient of {analysis.graph.values[parameter].name} is a view of a parameter")
        position = max(last.get(own, -1), born.get(gradient, -1))
        block = program.instructions[position].block
        due.setdefault(position, []).append(_update(updates, updates.numbers[parameter], own, gradient, free, block))
        free += 1
        gradients[place] = None
    instructions = []
    for position, instruction in enumerate(program.instructions):
        instructions += [instruction, *due.get(position, ())]
    return Program(program.inputs, tuple(instructions), (*outputs, *gradients))


def _update(updates: Updates, number: int, parameter: int, gradient: int, slot: int, block: int) -> Instruction:
    operation = Operation(updates.target, (number, Ref(0), Ref(1)))
    return Instruction(slot, operation, (parameter, gradient), None, block)


def _aliases(program: Program) -> dict[int, frozenset[int]]:
    """For each slot, the inputs of the program whose memory it may share."""
    none: frozenset[int] = frozenset()
    behind = {slot: frozenset([slot]) for slot, _ in program.inputs}
    for instruction in program.instructions:
        fresh = is_fresh(instruction.operation)
        behind[instruction.slot] = none if fresh else none.union(*(behind[slot] for slot in instruction.reads))
    return behind


def _last_readers(program: Program, behind: Mapping[int, frozenset[int]]) -> dict[int, int]:
    last: dict[int, int] = {}
    for position, instruction in enumerate(program.instructions):
        for slot in instruction.reads:
            last.update(dict.fromkeys(behind[slot], position))
    return last


def verify_updates(program: Program, updates: Updates) -> None:
    """Raise unless each parameter is updated once, and neither read nor seen through a view after that."""
    behind = _aliases(program)
    written: set[int] = set()
    for instruction in program.instructions:
        touched = frozenset().union(*(behind[slot] for slot in instruction.reads))
        if touched & written:
            raise VerificationError(f"{instruction.operation.target} reads a parameter that was updated before it")
        if updates.is_update(instruction.operation):
            written.add(instruction.slots[0])
    for ref in refs_in(program.outputs):
        if behind[ref.slot] & written:
            raise VerificationError("a result of the step is a view of a parameter that was updated")


# -- its memory --------------------------------------------------------------------------------------------------------


class JointMeasure:
    """How the planner measures a schedule whose two programs run as one, with updates."""

    def __init__(self, updates: Updates) -> None:
        self.updates = updates

    def program(self, facts: Facts, schedule: Schedule) -> Program:
        """The step as it will be lowered."""
        program = self.joined(facts, schedule)
        return written_over(facts.analysis, program) if facts.reuse else program

    def joined(self, facts: Facts, schedule: Schedule) -> Program:
        return with_updates(facts.analysis, join(facts.analysis, schedule), self.updates)

    def __call__(self, facts: Facts, segments: tuple[Segment, ...], schedule: Schedule, error: float = 0.0) -> Planned:
        program, analysis = self.program(facts, schedule), facts.analysis
        whole = simulate(program, analysis.charges, workspace=lambda operation: self._workspace(facts, operation))
        forward, backward = self._halves(program, whole, len(schedule.forward.instructions))
        seconds = program_seconds(program, analysis.graph, analysis.device)
        seconds += waiting_seconds(analysis, schedule.kept)
        return Planned(segments, schedule, forward, backward, seconds, error)

    def _workspace(self, facts: Facts, operation: Operation) -> int:
        if self.updates.is_update(operation):
            return self.updates.workspace.get(operation.args[0], 0)
        return facts.workspace(operation) if facts.workspace else 0

    def _halves(self, program: Program, whole: Timeline, forward: int) -> tuple[Timeline, Timeline]:
        """As many entries as the schedule's programs have; an update counts with the instruction before it."""
        during: list[int] = []
        for instruction, live in zip(program.instructions, whole.during, strict=True):
            if self.updates.is_update(instruction.operation) and during:
                during[-1] = max(during[-1], live)
            else:
                during.append(live)
        first, rest = during[:forward], during[forward + 1 :]
        first[-1] = max(first[-1], during[forward])  # the gradient of the loss
        return Timeline(tuple(first), whole.start, 0), Timeline(tuple(rest), 0, whole.final)


# -- what leaves it ----------------------------------------------------------------------------------------------------


def lasting(analysis: Analysis, program: Program) -> tuple[int, ...]:
    """The slots of the gradients that nothing in the step uses up."""
    gradients = program.outputs[len(analysis.graph.outputs) :]
    return tuple(dict.fromkeys(ref.slot for ref in refs_in(gradients)))


def handing_over(analysis: Analysis, program: Program) -> Program:
    """The joint program as a forward half: its outputs, then the gradients that are left."""
    kept = (Ref(slot) for slot in lasting(analysis, program))
    return replace(program, outputs=(*program.outputs[: len(analysis.graph.outputs)], *kept))


def handing_back(analysis: Analysis, program: Program) -> Program:
    """The backward half that is left then: the gradients in AOTAutograd's order."""
    values = _values(program)
    kept = [(slot, values[slot]) for slot in lasting(analysis, program)]
    free = 1 + max(values, default=-1)
    tangents = [(free + place, value) for place, value in enumerate(analysis.graph.tangents)]
    return Program((*kept, *tangents), (), program.outputs[len(analysis.graph.outputs) :])


def _values(program: Program) -> dict[int, int]:
    found = dict(program.inputs)
    found |= {i.slot: i.value for i in program.instructions if i.value is not None}
    return found
