"""A plan as it was emitted and simulated: its peak and its seconds are those of the whole step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .cost import Device, operations_seconds
from .emit import Schedule, Segment
from .fusion import program_seconds
from .liveness import Timeline
from .opaque import OPAQUE, Piece, piece_of
from .program import Instruction
from .reuse import simulated
from .solutions import Facts, waiting_seconds


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


Measure = Callable[[Facts, tuple[Segment, ...], Schedule, float], Planned]  # of an emitted plan


def without_pieces(planned: Planned, device: Device) -> Planned:
    """As if nothing were computed again for having sizes that depend on data, but kept."""
    schedule, during, kept = planned.schedule, list(planned.backward.during), 0
    for place in reversed(range(len(during))):
        during[place] += kept
        kept += sum(piece.kept for piece in _pieces(schedule.backward.instructions[place : place + 1]))
    again = [
        piece.program.instructions[place].operation
        for piece in _pieces((*schedule.forward.instructions, *schedule.backward.instructions))
        for place in piece.again
    ]
    backward = Timeline(tuple(during), planned.backward.start + kept, planned.backward.final)
    seconds = planned.seconds - operations_seconds(again, replace(device, fused=False))
    return replace(planned, backward=backward, seconds=seconds)


def _pieces(instructions: Iterable[Instruction]) -> list[Piece]:
    return [piece_of(i.operation.args) for i in instructions if i.operation.target is OPAQUE]


def measure_schedule(
    facts: Facts, segments: tuple[Segment, ...], schedule: Schedule, error: float = 0.0, device: Device | None = None
) -> Planned:
    """Simulate both programs: what the user holds (the outputs) stays alive through the backward pass."""
    forward = simulated(facts, schedule.forward)
    backward = simulated(facts, schedule.backward, pinned=facts.analysis.held)
    graph, device = facts.analysis.graph, device or facts.analysis.device
    seconds = sum(program_seconds(program, graph, device) for program in (schedule.forward, schedule.backward))
    seconds += waiting_seconds(facts.analysis, schedule.kept)
    return Planned(segments, schedule, forward, backward, seconds, error)
