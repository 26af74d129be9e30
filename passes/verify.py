"""Checks on emitted programs, run after emission and before anything is lowered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

from .analysis import Analysis
from .emit import Schedule, Segment
from .graph import refs_in
from .inverse import INVERTED
from .program import Program


class VerificationError(AssertionError):
    """A program of ours is wrong: a bug of the compiler, never of the user."""


def verify(analysis: Analysis, schedule: Schedule) -> None:
    """Raise unless both programs are in order, complete, and emit no random or mutating operation twice."""
    for name, program in (("forward", schedule.forward), ("backward", schedule.backward)):
        _in_order(name, program)
    _complete(analysis, schedule)
    _once(analysis, schedule)


def _in_order(name: str, program: Program) -> None:
    known = {slot for slot, _ in program.inputs}
    for position, instruction in enumerate(program.instructions):
        missing = [slot for slot in instruction.reads if slot not in known]
        if missing:
            raise VerificationError(
                f"{name} program: instruction {position} reads slots {missing} before they are made"
            )
        if instruction.slot in known:
            raise VerificationError(f"{name} program: slot {instruction.slot} is made twice")
        known.add(instruction.slot)
    for ref in refs_in(program.outputs):
        if ref.slot not in known:
            raise VerificationError(f"{name} program: output slot {ref.slot} is never made")


def _complete(analysis: Analysis, schedule: Schedule) -> None:
    graph = analysis.graph
    given = len(schedule.backward.outputs) - len(schedule.drifts)
    if len(graph.gradients) != given:
        raise VerificationError(f"{len(graph.gradients)} gradients are wanted, {given} are produced")
    if len(schedule.forward.outputs) != len(graph.outputs) + len(schedule.kept):
        raise VerificationError("the forward program does not hand over what the backward program takes")
    tangents = [value for _, value in schedule.backward.inputs[len(schedule.kept) :]]
    if tuple(tangents) != graph.tangents:
        raise VerificationError("the tangents are not the last inputs of the backward program")


def _once(analysis: Analysis, schedule: Schedule) -> None:
    found = Counter(
        id(instruction.operation)
        for program in (schedule.forward, schedule.backward)
        for instruction in program.instructions
    )
    for edge in analysis.graph.edges:
        operation = edge.operations[0]
        count = found[id(operation)]
        if (edge.random or edge.effect) and count > 1:
            raise VerificationError(f"{operation.target} is random or mutating and is emitted {count} times, not 1")
        if edge.effect and count < 1:
            raise VerificationError(f"{operation.target} is a mutation and is never emitted")


def verify_certified(segments: Sequence[Segment], certified: Container[tuple[str, int]]) -> None:
    """Raise unless every inverted block has a certificate."""
    for segment in segments:
        for block in segment.span:
            if segment.strategy in INVERTED and (segment.strategy, block) not in certified:
                raise VerificationError(f"block {block} is inverted ({segment.strategy}) without a certificate")
