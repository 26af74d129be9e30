"""The verifier: a right schedule passes, and each way of spoiling it is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moonwalk_compile.passes.analysis import Analysis
from moonwalk_compile.passes.emit import Schedule, Segment, emit
from moonwalk_compile.passes.graph import Ref
from moonwalk_compile.passes.program import Program
from moonwalk_compile.passes.solutions import Facts
from moonwalk_compile.passes.verify import VerificationError, verify, verify_certified

from .hand import Hand, Layer, analysis_of, chain


@pytest.fixture
def analysis() -> Analysis:
    return chain([Layer()] * 2)


@pytest.fixture
def schedule(analysis: Analysis) -> Schedule:
    return emit(Facts(analysis), [Segment(0, 1, "checkpoint", frozenset())])


def rejects(analysis: Analysis, schedule: Schedule, match: str) -> None:
    with pytest.raises(VerificationError, match=match):
        verify(analysis, schedule)


def with_instructions(program: Program, *positions: int) -> Program:
    return replace(program, instructions=tuple(program.instructions[position] for position in positions))


def test_a_right_schedule_passes(analysis: Analysis, schedule: Schedule) -> None:
    verify(analysis, schedule)


def test_a_slot_read_before_it_is_made(analysis: Analysis, schedule: Schedule) -> None:
    swapped = with_instructions(schedule.forward, 1, 0, 2, 3)
    rejects(analysis, replace(schedule, forward=swapped), "forward program: instruction 0 reads slots .* before")


def test_the_backward_program_is_checked_too(analysis: Analysis, schedule: Schedule) -> None:
    count = len(schedule.backward.instructions)
    backwards = with_instructions(schedule.backward, *reversed(range(count)))
    rejects(analysis, replace(schedule, backward=backwards), "backward program: instruction 0")


def test_a_slot_made_twice(analysis: Analysis, schedule: Schedule) -> None:
    twice = with_instructions(schedule.forward, 0, 0, 1, 2, 3)
    rejects(analysis, replace(schedule, forward=twice), "made twice")


def test_an_instruction_that_overwrites_an_argument(analysis: Analysis, schedule: Schedule) -> None:
    first, *rest = schedule.forward.instructions
    clash = first._replace(slot=schedule.forward.inputs[0][0])
    rejects(analysis, replace(schedule, forward=replace(schedule.forward, instructions=(clash, *rest))), "made twice")


def test_an_output_that_is_never_made(analysis: Analysis, schedule: Schedule) -> None:
    outputs = (Ref(999), *schedule.forward.outputs[1:])
    rejects(analysis, replace(schedule, forward=replace(schedule.forward, outputs=outputs)), "output slot 999")


def test_a_gradient_that_is_lost(analysis: Analysis, schedule: Schedule) -> None:
    short = replace(schedule.backward, outputs=schedule.backward.outputs[:-1])
    rejects(analysis, replace(schedule, backward=short), "3 gradients are wanted, 2 are produced")


def test_a_kept_value_that_is_not_handed_over(analysis: Analysis, schedule: Schedule) -> None:
    short = replace(schedule.forward, outputs=schedule.forward.outputs[:-1])
    rejects(analysis, replace(schedule, forward=short), "does not hand over")


def test_tangents_that_are_not_last(analysis: Analysis, schedule: Schedule) -> None:
    turned = replace(schedule.backward, inputs=schedule.backward.inputs[::-1])
    rejects(analysis, replace(schedule, backward=turned), "tangents are not the last inputs")


@pytest.mark.parametrize("kind", ["random", "effect"])
def test_a_random_or_mutating_operation_that_runs_twice(kind: str) -> None:
    hand = Hand()
    x, tangent = hand.input("x", 4), hand.input("h", 4, "tangent")
    mask = hand.call("bernoulli", [x], 4, random=kind == "random", effect=kind == "effect")
    y = hand.call("mul", [x, x if kind == "effect" else mask], 4, expensive=True)
    gradient = hand.call("mul", [tangent, x], 4, stage="backward")
    analysis = analysis_of(hand.graph([y], [gradient]))
    schedule = emit(Facts(analysis), [Segment(0, len(analysis.blocks) - 1, "keep", frozenset())])
    verify(analysis, schedule)
    backward = schedule.backward
    again = next(i for i in schedule.forward.instructions if i.operation.target == "bernoulli")
    x_slot = next(slot for slot, value in backward.inputs if value == x)
    again = again._replace(slot=1000, slots=(x_slot,))
    spoilt = replace(backward, instructions=(again, *backward.instructions))
    rejects(
        analysis, replace(schedule, backward=spoilt), "bernoulli is random or mutating and is emitted 2 times, not 1"
    )


def test_a_block_is_covered_by_its_certificate() -> None:
    segments = [Segment(0, 0, "keep", frozenset()), Segment(1, 2, "invert", frozenset())]
    verify_certified(segments, {("invert", 1), ("invert", 2)})
    for certified in ({("invert", 1)}, {("moonwalk", 1), ("moonwalk", 2)}):
        with pytest.raises(VerificationError, match="without a certificate"):
            verify_certified(segments, certified)
