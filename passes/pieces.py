"""Cutting a program into pieces that are lowered one by one, each distinct piece once.

The blocks of a deep network repeat, and so do the pieces of its programs: compile time stops growing with depth, and
nothing is reordered across pieces, so the peak stays what was planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .analysis import Analysis
from .graph import Ref, refs_in
from .program import Instruction, Program


@dataclass(frozen=True)
class Piece:
    """A run of instructions: a program of its own over local slots, and where these stand in the whole.

    `program.inputs` name values only where they have one; `arguments` and `results` are slots of the whole program,
    `dying` the positions of arguments that nobody reads afterwards.
    """

    program: Program
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    dying: tuple[int, ...]
    key: object


def group_by_block(program: Program) -> list[list[Instruction]]:
    groups: list[list[Instruction]] = []
    for instruction in program.instructions:
        if not groups or groups[-1][-1].block != instruction.block:
            groups.append([])
        groups[-1].append(instruction)
    return groups


def released(program: Program, during: Sequence[int]) -> list[int]:
    """Bytes that are freed behind each instruction; `during` is what is live while each runs."""
    made = [sum(instruction.operation.new) for instruction in program.instructions]
    return [now + new - then for now, then, new in zip(during, during[1:], made[1:], strict=False)] + [0]


def cut_group(
    groups: Sequence[Sequence[Instruction]], pieces: Sequence[Piece], number: int, freed: Sequence[int]
) -> list[Sequence[Instruction]] | None:
    """The groups with one of them, and all that are equal, cut behind where it frees most; None if it never does.

    What a piece frees early stays alive where Inductor moves its last reader down, to fuse it with a later one.
    """
    group, start = groups[number], sum(map(len, groups[:number]))
    frees = {place: freed[start + place - 1] for place in _places(group)}
    place = max(frees, key=lambda place: frees[place], default=0)
    if not place or frees[place] <= 0:
        return None
    cut: list[Sequence[Instruction]] = []
    for each, piece in zip(groups, pieces, strict=True):
        cut += [each[:place], each[place:]] if piece.key == pieces[number].key else [each]
    return cut


def _places(group: Sequence[Instruction]) -> list[int]:
    """Where a group can be cut: what is no value of the graph, such as a tuple of results, is not handed over."""
    last_read = {slot: place for place, instruction in enumerate(group) for slot in instruction.reads}
    places, end = [], 0
    for place, instruction in enumerate(group[:-1]):
        if instruction.value is None:
            end = max(end, last_read.get(instruction.slot, 0))
        if place >= end:
            places.append(place + 1)
    return places


def cut_pieces(analysis: Analysis, program: Program, groups: Sequence[Sequence[Instruction]]) -> list[Piece]:
    """The pieces in order; what a later piece or the result reads is handed over."""
    value_of = dict(program.inputs)
    value_of |= {i.slot: i.value for group in groups for i in group if i.value is not None}
    last_group: dict[int, int] = {}
    for position, group in enumerate(groups):
        for instruction in group:
            for slot in instruction.reads:
                last_group[slot] = position
    for ref in refs_in(program.outputs):
        last_group[ref.slot] = len(groups)
    return [_piece(analysis, group, position, value_of, last_group) for position, group in enumerate(groups)]


def _piece(
    analysis: Analysis,
    group: Sequence[Instruction],
    position: int,
    value_of: Mapping[int, int],
    last_group: Mapping[int, int],
) -> Piece:
    made = {instruction.slot for instruction in group}
    reads = [slot for instruction in group for slot in instruction.reads if slot not in made]
    arguments = tuple(dict.fromkeys(reads))
    results = tuple(i.slot for i in group if last_group.get(i.slot, -1) > position)
    dying = tuple(place for place, slot in enumerate(arguments) if last_group[slot] == position)
    program = Program(
        tuple((slot, value_of[slot]) for slot in arguments), tuple(group), tuple(Ref(slot) for slot in results)
    )
    return Piece(
        program,
        arguments,
        results,
        dying,
        (_key(program), tuple(metadata(analysis.fakes[value]) for _, value in program.inputs)),
    )


def _key(program: Program) -> object:
    """Equal for pieces that do the same: operations with slots numbered from the piece's start."""
    local = {slot: place for place, (slot, _) in enumerate(program.inputs)}
    for instruction in program.instructions:
        local[instruction.slot] = len(local)
    steps = tuple(
        (str(i.operation.target), repr(i.arguments(lambda slot: Ref(local[slot])))) for i in program.instructions
    )
    return (steps, tuple(local[ref.slot] for ref in refs_in(program.outputs)))


def metadata(fake: object) -> object:
    """What a compiled piece assumes of an argument."""
    if not isinstance(fake, Tensor):
        return repr(fake)
    return (tuple(fake.shape), fake.stride(), fake.dtype, str(fake.device), fake.storage_offset())
