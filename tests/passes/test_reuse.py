"""Writing results over dying operands changes no result, no argument, and never makes the peak higher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moonwalk_compile.passes.analysis import Analysis
from moonwalk_compile.passes.graph import Operation, Ref
from moonwalk_compile.passes.liveness import simulate
from moonwalk_compile.passes.program import Instruction, Program
from moonwalk_compile.passes.reuse import schema_is_fresh, written_over

aten = torch.ops.aten
INPUTS = 2
Step = tuple[str, tuple[int, ...]]
OPERATIONS: dict[str, tuple[Any, int, tuple[Any, ...]]] = {
    "neg": (aten.neg.default, 1, ()),
    "relu": (aten.relu.default, 1, ()),
    "mul": (aten.mul.Tensor, 2, ()),
    "add": (aten.add.Tensor, 2, ()),
    "gelu_backward": (aten.gelu_backward.default, 2, ()),
    "leaky_relu_backward": (aten.leaky_relu_backward.default, 2, (-1.0, False)),
    "mm": (aten.mm.default, 2, ()),
    "t": (aten.t.default, 1, ()),
    "view": (aten.view.default, 1, ([6, 6],)),
    "reshape": (aten.reshape.default, 1, ([6, 6],)),
    "unsafe_view": (aten._unsafe_view.default, 1, ([6, 6],)),  # a view that its schema denies
    "slice": (aten.slice.Tensor, 1, (0, 0, 6)),
    "expand": (aten.expand.default, 1, ([6, 6],)),
    "comparison": (aten.gt.Tensor, 2, ()),
}


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 6, generator=generator) for _ in range(INPUTS)]


def run(program: Program, arguments: list[Tensor]) -> dict[int, Tensor]:
    slots = dict(enumerate(arguments))
    for instruction in program.instructions:
        args, kwargs = instruction.arguments(slots.__getitem__)
        slots[instruction.slot] = instruction.operation.target(*args, **kwargs)
    return slots


def build(steps: list[Step], outputs: list[int]) -> tuple[Analysis, Program]:
    """A program whose k-th step makes slot INPUTS + k, and what the pass asks of an analysis."""
    tensors: list[Tensor] = inputs()
    instructions = []
    for position, (name, reads) in enumerate(steps, start=INPUTS):
        target, count, rest = OPERATIONS[name]
        result = target(*(tensors[slot] for slot in reads[:count]), *rest)
        owner = next((s for s in reads[:count] if tensors[s].data_ptr() == result.data_ptr()), None)
        new = (result.untyped_storage().nbytes(),) if owner is None else ()
        holds = (((-1, 0) if owner is None else (reads.index(owner), 0)),)
        args = (*(Ref(local) for local in range(count)), *rest)
        operation = Operation(target, args, new=new, holds=holds)
        instructions.append(Instruction(position, operation, tuple(reads[:count]), position))
        tensors.append(result)
    bytes_of = [SimpleNamespace(bytes=tensor.untyped_storage().nbytes()) for tensor in tensors]
    analysis = SimpleNamespace(graph=SimpleNamespace(values=bytes_of), fakes=dict(enumerate(tensors)))
    program = Program(tuple((i, i) for i in range(INPUTS)), tuple(instructions), tuple(Ref(slot) for slot in outputs))
    return cast(Analysis, analysis), program


def over(steps: list[Step], outputs: list[int]) -> list[bool]:
    """For each step, whether its result is written over an operand."""
    analysis, program = build(steps, outputs)
    after = written_over(analysis, program)
    return [a.operation != b.operation for a, b in zip(after.instructions, program.instructions, strict=True)]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], list[int]]:
    steps: list[Step] = []
    floats = list(range(INPUTS))
    for position in range(INPUTS, INPUTS + draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(OPERATIONS)))
        recent = st.sampled_from(floats[-4:])
        steps.append((name, (draw(recent), draw(recent))[: OPERATIONS[name][1]]))
        if name != "comparison":
            floats.append(position)
    last = INPUTS + len(steps) - 1
    return steps, sorted({last, *draw(st.lists(st.sampled_from(floats), max_size=2))})


@settings(deadline=None, max_examples=300)
@given(programs())
def test_nothing_changes_but_the_peak(case: tuple[list[Step], list[int]]):
    steps, outputs = case
    analysis, program = build(steps, outputs)
    after = written_over(analysis, program)
    given_inputs, untouched = inputs(), inputs()
    expected, seen = run(program, inputs()), run(after, given_inputs)
    for slot in outputs:
        assert torch.equal(seen[slot], expected[slot])
        assert seen[slot].stride() == expected[slot].stride()
    assert all(torch.equal(a, b) for a, b in zip(given_inputs, untouched, strict=True))
    storages = {slot: (slot, 144) for slot in range(INPUTS)}
    assert simulate(after, storages).peak <= simulate(program, storages).peak


def test_a_chain_stays_in_one_place():
    steps = [("mm", (0, 1)), ("neg", (2,)), ("gelu_backward", (3, 0)), ("add", (0, 4)), ("relu", (5,))]
    assert over(steps, [6]) == [False, True, True, True, True]
    analysis, program = build(steps, [6])
    assert simulate(written_over(analysis, program), {0: (0, 0), 1: (1, 0)}).peak == 144


@pytest.mark.parametrize(
    ("why", "steps", "outputs", "untouched"),
    [
        ("an input", [("neg", (0,))], [2], 0),
        ("read later", [("mm", (0, 1)), ("neg", (2,)), ("mm", (2, 3))], [4], 1),
        ("an output", [("mm", (0, 1)), ("neg", (2,))], [2, 3], 1),
        ("a view is read later", [("mm", (0, 1)), ("t", (2,)), ("neg", (2,)), ("mm", (3, 4))], [5], 2),
        ("a silent view", [("mm", (0, 1)), ("unsafe_view", (2,)), ("neg", (2,)), ("mm", (3, 4))], [5], 2),
        ("it may be a view", [("mm", (0, 1)), ("reshape", (2,)), ("neg", (2,)), ("mm", (3, 4))], [5], 2),
        ("two operands share it", [("mm", (0, 1)), ("t", (2,)), ("add", (2, 3))], [4], 2),
        ("another layout", [("mm", (0, 1)), ("t", (2,)), ("add", (0, 3))], [4], 2),
        ("another type", [("mm", (0, 1)), ("comparison", (2, 0))], [3], 1),
        ("a view of an input", [("t", (0,)), ("neg", (2,))], [3], 1),
    ],
)
def test_what_is_not_written_over(why: str, steps: list[Step], outputs: list[int], untouched: int):
    assert not over(steps, outputs)[untouched], why


def test_composites_and_views_may_alias():
    assert schema_is_fresh(aten.mm.default) and schema_is_fresh(aten.native_layer_norm.default)
    assert not schema_is_fresh(aten.reshape.default)
    assert not schema_is_fresh(aten.t.default)
    assert not schema_is_fresh(len)
