"""Straight-line programs: what the planner simulates and the rewriter turns into FX.

A program is a list of instructions over slots. Slots are names, not positions: a value that is obtained twice in a
step (a cotangent in the spine and again in the sweep) has two slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from .graph import Edge, Graph, Operation, map_refs, refs_in


class Instruction(NamedTuple):
    """An operation of an edge; `slots[i]` is the program's slot for its slot i, `value` what it stands for.

    A named tuple, as planning makes hundreds of thousands of them.
    """

    slot: int
    operation: Operation
    slots: tuple[int, ...]
    value: int | None = None
    block: int = 0

    @property
    def reads(self) -> list[int]:
        slots = self.slots
        return [slots[local] for local in self.operation.reads]

    @property
    def holds(self) -> list[tuple[int, int]]:
        """As `Operation.holds`, in the program's slots."""
        slots = self.slots
        return [(source if source < 0 else slots[source], item) for source, item in self.operation.holds]

    def arguments(self, function: Callable[[int], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, each slot of the program replaced by `function(slot)`."""
        operation, slots = self.operation, self.slots
        args = map_refs(tuple(operation.args), lambda ref: function(slots[ref.slot]))
        return args, map_refs(dict(operation.kwargs), lambda ref: function(slots[ref.slot]))


@dataclass(frozen=True)
class Program:
    """`inputs` are (slot, value) pairs; `outputs` may hold `Ref`s to slots and constants."""

    inputs: tuple[tuple[int, int], ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[Any, ...]

    @cached_property
    def last_use(self) -> dict[int, int]:
        """For each slot, the position of the last instruction that reads it; outputs live to the end."""
        last = {}
        for position, instruction in enumerate(self.instructions):
            for slot in instruction.reads:
                last[slot] = position
        for ref in refs_in(self.outputs):
            last[ref.slot] = len(self.instructions)
        return last

    def rewritten(self, instructions: Iterable[Instruction]) -> Program:
        """The same program of other instructions, each of which reads what the one in its place did."""
        program = Program(self.inputs, tuple(instructions), self.outputs)
        program.__dict__["last_use"] = self.last_use
        return program


class Builder:
    """Emits edges; an edge is emitted once per environment, and inputs are declared when first read."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.environment: dict[int, int] = {}
        self.inputs: dict[int, int] = {}
        self.instructions: list[Instruction] = []
        self._slots = 0

    def _new_slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def input(self, value: int) -> int:
        """Declare `value` as an argument of the program."""
        if value not in self.inputs:
            self.inputs[value] = self._new_slot()
        self.environment[value] = self.inputs[value]
        return self.inputs[value]

    def emit(self, edge: Edge, block: int = 0) -> None:
        slots = tuple(self.environment[value] for value in edge.needs)
        wanted = dict(zip(edge.results, edge.gives, strict=True))
        for position, operation in enumerate(edge.operations, start=len(edge.needs)):
            slot = self._new_slot()
            self.instructions.append(Instruction(slot, operation, slots, wanted.get(position), block))
            slots = (*slots, slot)
        for result, value in zip(edge.results, edge.gives, strict=True):
            self.environment[value] = slots[result]

    def forget(self, values: Iterable[int]) -> None:
        """Drop values from the environment, so that they are obtained anew when wanted again."""
        for value in values:
            self.environment.pop(value, None)

    def read_inputs(self, outputs: Iterable[Any]) -> list[int]:
        """The inputs that an instruction or an output reads, in the order in which they were declared."""
        read = {slot for instruction in self.instructions for slot in instruction.reads}
        read |= {ref.slot for ref in refs_in(tuple(outputs))}
        return [value for value, slot in self.inputs.items() if slot in read]

    def finish(self, outputs: Iterable[Any], order: Iterable[int] = ()) -> Program:
        """Close the program. `order` names the inputs that come first, declared even when never read; others that
        nobody reads are left out."""
        outputs, first = tuple(outputs), list(order)
        for value in first:
            if value not in self.inputs:
                self.inputs[value] = self._new_slot()
        named = set(first)
        rest = [value for value in self.read_inputs(outputs) if value not in named]
        inputs = tuple((self.inputs[value], value) for value in [*first, *rest])
        return Program(inputs, tuple(self.instructions), tuple(outputs))
