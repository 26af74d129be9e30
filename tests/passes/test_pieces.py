"""Cutting programs into pieces, each distinct one to be compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moonwalk_compile.passes.analysis import Analysis
from moonwalk_compile.passes.emit import Segment, emit
from moonwalk_compile.passes.inductor import Lowered, OutputStorage
from moonwalk_compile.passes.liveness import simulate
from moonwalk_compile.passes.lower import Ownership
from moonwalk_compile.passes.pieces import Piece, cut_group, cut_pieces, group_by_block, released
from moonwalk_compile.passes.program import Instruction, Program
from moonwalk_compile.passes.solutions import Facts

from .hand import Layer, chain


def pieces_of(analysis: Analysis) -> tuple[Program, list[Piece], Program, list[Piece]]:
    keeps = [Segment(b.index, b.index, "keep", frozenset(b.demanded)) for b in analysis.blocks]
    schedule = emit(Facts(analysis), keeps)
    forward, backward = schedule.forward, schedule.backward
    return (
        forward,
        cut_pieces(analysis, forward, group_by_block(forward)),
        backward,
        cut_pieces(analysis, backward, group_by_block(backward)),
    )


def another(groups: list[list[Instruction]], number: int) -> list[list[Instruction]]:
    """The same with another first operation in one group."""
    first, *rest = groups[number]
    changed = first._replace(operation=replace(first.operation, target="bmm"))
    return [*groups[:number], [changed, *rest], *groups[number + 1 :]]


def test_one_group_for_each_run_of_a_block():
    program, pieces, backward, _ = pieces_of(chain([Layer()] * 4))
    assert [[i.block for i in group] for group in group_by_block(program)] == [[b, b] for b in range(4)]
    assert [group[0].block for group in group_by_block(backward)] == [3, 2, 1, 0]
    assert sum(len(piece.program.instructions) for piece in pieces) == len(program.instructions)


def test_identical_blocks_share_a_key():
    _, forward, _, backward = pieces_of(chain([Layer()] * 5))
    assert len({piece.key for piece in forward[1:4]}) == 1
    assert len({piece.key for piece in backward[1:4]}) == 1
    assert not {piece.key for piece in forward} & {piece.key for piece in backward}


def test_other_sizes_have_another_key():
    _, forward, _, backward = pieces_of(chain([Layer(), Layer(), Layer(inner=16), Layer(), Layer()]))
    assert forward[1].key == forward[3].key
    assert backward[1].key == backward[3].key != backward[2].key


def test_another_layout_of_an_input_has_another_key():
    analysis = chain([Layer()] * 4)
    program, pieces, _, _ = pieces_of(analysis)
    fakes = {**analysis.fakes, pieces[2].program.inputs[1][1]: "float32[2], strided"}
    changed = cut_pieces(replace(analysis, fakes=fakes), program, group_by_block(program))
    assert changed[1].key == pieces[1].key and changed[2].key != pieces[2].key


def test_other_operations_have_another_key():
    analysis = chain([Layer()] * 4)
    program, pieces, _, _ = pieces_of(analysis)
    groups = another(group_by_block(program), 2)
    assert cut_pieces(analysis, program, groups)[2].key != pieces[1].key
    assert pieces[2].key == pieces[1].key


def test_other_wiring_has_another_key():
    analysis = chain([Layer()] * 4)
    program, pieces, _, _ = pieces_of(analysis)
    groups = group_by_block(program)
    first, *rest = groups[2]
    groups[2] = [first._replace(slots=first.slots[::-1]), *rest]
    assert cut_pieces(analysis, program, groups)[2].key != pieces[1].key


def test_a_piece_is_cut_behind_what_frees_most():
    analysis = chain([Layer()] * 4)
    program, _, _, _ = pieces_of(analysis)
    groups = another(group_by_block(program), 0)
    groups = [[*groups[0], *groups[1]], [*groups[2], *groups[3]]]
    pieces = cut_pieces(analysis, program, groups)
    freed = [0, 1, 4, 0] * 2
    finer = cut_group(groups, pieces, 1, freed)
    assert finer is not None and [len(group) for group in finer] == [4, 3, 1]
    assert cut_group(groups, pieces, 1, [0] * 8) is None
    assert cut_group([group[:1] for group in groups], pieces, 1, [5, 5]) is None  # one instruction each


def test_equal_pieces_are_cut_alike():
    analysis = chain([Layer()] * 5)
    program, _, _, _ = pieces_of(analysis)
    groups = another(another(group_by_block(program), 0), 4)
    finer = cut_group(groups, cut_pieces(analysis, program, groups), 2, [1] * len(program.instructions))
    assert finer is not None and [len(group) for group in finer] == [2, 1, 1, 1, 1, 1, 1, 2]
    assert len({piece.key for piece in cut_pieces(analysis, program, finer)[1:7]}) == 2


def test_no_cut_between_a_tuple_and_its_items():
    analysis = chain([Layer()] * 4)
    program, pieces, _, _ = pieces_of(analysis)
    group = list(group_by_block(program)[1])
    group[0] = group[0]._replace(value=None)
    assert cut_group([group], pieces[:1], 0, [5, 5]) is None


def test_what_is_freed_by_simulation():
    analysis = chain([Layer()] * 3)
    program, _, _, _ = pieces_of(analysis)
    timeline = simulate(program, analysis.charges)
    freed = released(program, timeline.during)
    made = [sum(i.operation.new) for i in program.instructions]
    live = timeline.during[0]
    for now, new, before in zip(timeline.during[1:], made[1:], freed, strict=False):
        live += new - before
        assert live == now


def test_pieces_hand_over_what_later_ones_read():
    program, pieces, _, _ = pieces_of(chain([Layer()] * 3))
    made = {slot for slot, _ in program.inputs}
    for piece in pieces:
        assert made.issuperset(piece.arguments)
        made.update(piece.results)
    assert made.issuperset(ref.slot for ref in program.outputs)


def test_arguments_die_in_the_last_piece_that_reads_them() -> None:
    """A checkpoint: what is recomputed in the first pieces is read again in the last ones."""
    analysis = chain([Layer()] * 3)
    program = emit(Facts(analysis), [Segment(0, 2, "checkpoint", frozenset())]).backward
    pieces = cut_pieces(analysis, program, group_by_block(program))
    outputs = {ref.slot for ref in program.outputs}
    last = {slot: position for position, piece in enumerate(pieces) for slot in piece.arguments}
    assert any(slot in pieces[0].arguments and position > 0 for slot, position in last.items())
    for position, piece in enumerate(pieces):
        dying = {piece.arguments[place] for place in piece.dying}
        assert dying == {slot for slot in piece.arguments if last[slot] == position} - outputs


def piece_of(arguments: Sequence[int], results: Sequence[int], dying: Sequence[int]) -> Piece:
    return Piece(Program((), (), ()), tuple(arguments), tuple(results), tuple(dying), None)


def made(*outputs: OutputStorage) -> Lowered:
    return Lowered(lambda arguments: (), (), outputs, "")


def test_only_memory_of_earlier_pieces_may_be_written_over():
    """Slot 0 comes from outside; 1 and 2 are new, 3 is a view of 2, 4 a view of what came from outside."""
    ownership = Ownership()
    fakes = {slot: torch.empty(4) for slot in range(8)} | {1: torch.empty(8)[4:]}
    first = piece_of([0], [1, 2, 3, 4, 5], [])
    fresh = OutputStorage(bytes=16)
    ownership.update(0, first, made(fresh, fresh, OutputStorage(output=1), OutputStorage(argument=0), fresh))
    assert ownership.owned(piece_of([0, 5], [], [0, 1]), fakes) == (1,)
    assert ownership.owned(piece_of([5, 0], [], []), fakes) == (), "it is read again later"
    assert ownership.owned(piece_of([2], [], [0]), fakes) == (), "a view of it lives on"
    assert ownership.owned(piece_of([2, 3], [], [0, 1]), fakes) == (), "both are read in the same piece"
    assert ownership.owned(piece_of([4], [], [0]), fakes) == (), "its memory came from outside"
    assert ownership.owned(piece_of([1], [], [0]), fakes) == (), "a part of something larger"


def test_ownership_passes_on_with_the_memory():
    ownership = Ownership()
    fakes = {slot: torch.empty(4) for slot in range(8)}
    ownership.update(0, piece_of([], [1], []), made(OutputStorage(bytes=16)))
    ownership.update(1, piece_of([1], [2], [0]), made(OutputStorage(argument=0)))
    assert ownership.owned(piece_of([2], [], [0]), fakes) == (0,)
    assert 1 not in ownership.storage
