"""Pointwise results written over an operand that dies there: one tensor less at the peak, and no fresh memory.

Only under `lowering="eager"`; Inductor does it by itself. A result counts as a view of an operand if the operator's
schema allows it, or if it shared memory when it was traced: schemas may keep quiet about it (`_unsafe_view`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ._torch_compat import OpOverload, is_composite
from .analysis import Analysis
from .graph import Operation, Ref
from .liveness import Timeline, simulate
from .program import Instruction, Program
from .sizes import exact_bytes
from .solutions import Facts
from .trials import Like

# Elementwise, and not tagged so by torch.
ELEMENTWISE = {"elu_backward", "hardsigmoid_backward", "hardtanh_backward", "leaky_relu_backward", "softplus_backward"}


@dataclass(frozen=True)
class Writer:
    """The variant of an operation that writes over an operand: any operand for `out`, the first for in-place."""

    target: OpOverload
    keyword: str | None


def simulated(facts: Facts, program: Program, pinned: Sequence[int] = ()) -> Timeline:
    """The live bytes of a program as it will be lowered."""
    lowered = written_over(facts.analysis, program) if facts.reuse else program
    return simulate(lowered, facts.analysis.charges, pinned=pinned, workspace=facts.workspace)


def written_over(analysis: Analysis, program: Program) -> Program:
    """The same program, with every pointwise result that can be in the place of a dying operand."""
    owners = _owners(program)
    last = _last_uses(program, owners)
    values = dict(program.inputs)
    values |= {i.slot: i.value for i in program.instructions if i.value is not None}
    instructions = []
    for position, instruction in enumerate(program.instructions):
        place = next(_places(analysis, instruction, position, owners, last, values), None)
        instructions.append(instruction if place is None else _over(instruction, place))
    return program.rewritten(instructions)


def is_fresh(operation: Operation) -> bool:
    """Whether no result shares memory with an argument, neither when traced nor for any other arguments."""
    own = bool(operation.new) and all(source == -1 for source, _ in operation.holds)
    return own and schema_is_fresh(operation.target)


@lru_cache(maxsize=4096)
def schema_is_fresh(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return False
    return not is_composite(target) and all(item.alias_info is None for item in target._schema.returns)


def _owners(program: Program) -> dict[int, int | None]:
    """For each slot the slot that allocated its memory; None for what is not the program's own, or not known."""
    owners: dict[int, int | None] = {slot: None for slot, _ in program.inputs}
    for instruction in program.instructions:
        if is_fresh(instruction.operation):
            owners[instruction.slot] = instruction.slot
            continue
        behind = {owners[slot] for slot in instruction.reads}
        owners[instruction.slot] = behind.pop() if len(behind) == 1 else None
        if lost := behind - {None}:  # may be a view of any of them: none is written over from here on
            owners = {slot: None if owner in lost else owner for slot, owner in owners.items()}
    return owners


def _last_uses(program: Program, owners: dict[int, int | None]) -> dict[int, int]:
    """For each owner, the last position at which any slot on its memory is read."""
    last: dict[int, int] = {}
    for slot, position in program.last_use.items():
        owner = owners[slot]
        if owner is not None:
            last[owner] = max(last.get(owner, -1), position)
    return last


def _places(
    analysis: Analysis,
    instruction: Instruction,
    position: int,
    owners: dict[int, int | None],
    last: dict[int, int],
    values: dict[int, int],
) -> Iterator[int]:
    """The operands (slots of the operation) that the result of an instruction can be written over."""
    operation = instruction.operation
    writer = _writer(operation.target)
    if writer is None or instruction.value is None or len(operation.new) != 1:
        return
    operands = operation.reads if writer.keyword else operation.reads[:1]
    if not writer.keyword and not (operation.args and isinstance(operation.args[0], Ref)):
        return
    used = [owners[slot] for slot in instruction.reads]
    for local in operands:
        slot = instruction.slots[local]
        owner = owners[slot]
        if owner is None or used.count(owner) > 1 or last[owner] != position or slot not in values:
            continue
        fake = analysis.fakes[values[slot]]
        if analysis.graph.values[values[slot]].bytes != operation.new[0] or exact_bytes(fake) != _extent(fake):
            continue  # a piece of something larger
        if _layout(fake) == _layout(analysis.fakes[instruction.value]):
            yield local


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return Like.of(tensor).bytes


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tuple(tensor.shape), tuple(tensor.stride())


def _over(instruction: Instruction, local: int) -> Instruction:
    operation = instruction.operation
    writer = _writer(operation.target)
    assert writer is not None
    kwargs = {**operation.kwargs, writer.keyword: Ref(local)} if writer.keyword else operation.kwargs
    written: Operation = replace(operation, target=writer.target, kwargs=kwargs, new=(), holds=((local, 0),))
    return instruction._replace(operation=written)


@lru_cache(maxsize=4096)
def _writer(target: Any) -> Writer | None:
    if not isinstance(target, OpOverload):
        return None
    packet = target.overloadpacket
    if torch.Tag.pointwise not in target.tags and not (target.namespace == "aten" and packet.__name__ in ELEMENTWISE):
        return None
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments]
    for name in packet.overloads():
        overload = getattr(packet, name)
        given = overload._schema.arguments
        out = [a.name for a in given if a.is_out]
        if len(out) == 1 and _is_real(overload) and [(a.name, str(a.type)) for a in given if not a.is_out] == wanted:
            return Writer(overload, out[0])
    twin = getattr(getattr(torch.ops, target.namespace), f"{packet.__name__}_", None)
    if twin is None or target._overloadname not in twin.overloads():
        return None
    overload = getattr(twin, target._overloadname)
    return Writer(overload, None) if _is_real(overload) else None


def _is_real(overload: OpOverload) -> bool:
    """Generated variants compute aside and copy: nothing is gained by them."""
    return torch.Tag.generated not in overload.tags
