"""How long a program takes where pointwise operations are fused, as Inductor does.

A fused loop reads what comes from outside of it and writes what is needed outside of it. Normalizations join it: what
they add are passes over whole images for their statistics.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from .cost import IMAGES, Device, base_name, fused_arithmetic, is_fused, operation_seconds
from .graph import Edge, Graph, Ref, refs_in
from .program import Builder, Instruction, Program

Storage = tuple[int, int]


@dataclass
class _Loop:
    """Fused operations between two that are not."""

    reads: set[Storage] = field(default_factory=set)
    written: int = 0  # bytes
    again: int = 0  # bytes read for statistics
    arithmetic: float = 0.0  # seconds


@dataclass
class _Loops:
    """The loops of a program by number: of which loop each storage is a result, and which are needed `outside` of it.

    `steps` are the instructions that make something, with the storages that they read and their loop, if any.
    """

    steps: list[tuple[Instruction, set[Storage], int | None]] = field(default_factory=list)
    maker: dict[Storage, int] = field(default_factory=dict)
    outside: set[Storage] = field(default_factory=set)


def _loops_of(program: Program) -> _Loops:
    loops, number = _Loops(), 0
    held: dict[int, list[Storage]] = {slot: [(-1, value)] for slot, value in program.inputs}
    for instruction in program.instructions:
        operation, slot = instruction.operation, instruction.slot
        held[slot] = [(slot, item) if source < 0 else held[source][item] for source, item in instruction.holds]
        if not operation.new:
            continue
        read = {storage for each in instruction.reads for storage in held[each]}
        if is_fused(operation):
            loops.steps.append((instruction, read, number))
            loops.outside |= {storage for storage in read if loops.maker.get(storage) != number}
            loops.maker |= {(slot, item): number for item in range(len(operation.new))}
        else:
            loops.steps.append((instruction, read, None))
            loops.outside |= read
            number += 1
    loops.outside |= {storage for ref in refs_in(program.outputs) for storage in held[ref.slot]}
    return loops


def program_seconds(program: Program, graph: Graph, device: Device) -> float:
    if not device.fused:
        return sum(operation_seconds(instruction.operation, device) for instruction in program.instructions)
    found, seconds = _loops_of(program), 0.0
    size = {(-1, value): graph.values[value].bytes for _, value in program.inputs}
    loops: dict[int, _Loop] = {}
    for instruction, read, number in found.steps:
        operation = instruction.operation
        size |= {(instruction.slot, item): new for item, new in enumerate(operation.new)}
        if number is None:
            seconds += operation_seconds(operation, device)
            continue
        loop = loops.setdefault(number, _Loop())
        loop.reads |= {storage for storage in read if found.maker.get(storage) != number}
        loop.again += sum(size[storage] for storage in read) if base_name(operation.target) in IMAGES else 0
        loop.arithmetic += fused_arithmetic(operation, device)
    for storage in found.outside & found.maker.keys():
        loops[found.maker[storage]].written += size[storage]
    for each in loops.values():
        moved = sum(size[storage] for storage in each.reads) + each.again + each.written
        seconds += device.overhead * bool(moved) + max(moved / device.bandwidth, each.arithmetic)
    return seconds


def unmaterialised(program: Program) -> Program:
    """The same program, with no memory for what only the loop that makes it reads."""
    loops = _loops_of(program)
    inside = loops.maker.keys() - loops.outside

    def thinned(instruction: Instruction) -> Instruction:
        operation, slot = instruction.operation, instruction.slot
        new = tuple(0 if (slot, item) in inside else size for item, size in enumerate(operation.new))
        return instruction if new == operation.new else instruction._replace(operation=replace(operation, new=new))

    return program.rewritten(map(thinned, program.instructions))


def edges_seconds(edges: Iterable[Edge], wanted: Collection[int], graph: Graph, device: Device) -> float:
    """These edges one behind the other; the `wanted` values are what is needed of them."""
    if not device.fused:
        return sum(edge.seconds for edge in edges)
    builder = Builder(graph)
    for edge in edges:
        for value in edge.needs:
            if value not in builder.environment:
                builder.input(value)
        builder.emit(edge)
    leaving = [Ref(builder.environment[value]) for value in wanted if value in builder.environment]
    return program_seconds(builder.finish(leaving), graph, device)
