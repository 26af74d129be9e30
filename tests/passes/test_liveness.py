"""Live bytes, to the byte."""

from __future__ import annotations

from moonwalk_compile.passes.graph import Operation, Ref
from moonwalk_compile.passes.liveness import simulate
from moonwalk_compile.passes.program import Instruction, Program

OWN = ((-1, 0),)


def step(slot: int, slots: tuple[int, ...], new: tuple[int, ...] = (), holds: tuple[tuple[int, int], ...] = OWN):
    """An instruction that reads all of `slots`; `holds` counts in its own slots."""
    return Instruction(slot, Operation("op", tuple(Ref(i) for i in range(len(slots))), new=new, holds=holds), slots)


def program(inputs: list[int], instructions: list[Instruction], outputs: list[int]) -> Program:
    """Input slot i stands for value i."""
    return Program(tuple((i, i) for i in inputs), tuple(instructions), tuple(Ref(slot) for slot in outputs))


def test_arguments_and_results_overlap_and_then_die():
    found = simulate(
        program([0], [step(1, (0,), (10,)), step(2, (1,), (20,)), step(3, (2,), (5,))], [3]), {0: (0, 100)}
    )
    assert found.during == (110, 30, 25)  # the argument is freed after its last reader
    assert (found.start, found.final, found.peak) == (100, 5, 110)


def test_inputs_from_before_the_step_cost_nothing():
    found = simulate(program([0], [step(1, (0,), (10,))], [1, 0]), {0: (0, 0)})
    assert (found.start, found.during, found.final) == (0, (10,), 10)


def test_a_view_costs_nothing_and_keeps_its_base_alive():
    view = step(2, (1,), holds=((0, 0),))
    found = simulate(
        program([0], [step(1, (0,), (10,)), view, step(3, (0,), (7,)), step(4, (2, 3), (1,))], [4]), {0: (0, 0)}
    )
    assert found.during == (10, 10, 17, 18)
    assert found.final == 1


def test_without_the_view_the_base_would_have_died():
    found = simulate(program([0], [step(1, (0,), (10,)), step(3, (0,), (7,))], [3]), {0: (0, 0)})
    assert found.during == (10, 7)  # nobody reads slot 1: it dies at once


def test_items_of_a_tuple_die_one_by_one():
    whole = step(1, (0,), (10, 20), holds=((-1, 0), (-1, 1)))
    first, second = step(2, (1,), holds=((0, 0),)), step(3, (1,), holds=((0, 1),))
    found = simulate(program([0], [whole, first, second, step(4, (2,), (1,)), step(5, (3, 4), (2,))], [5]), {0: (0, 0)})
    assert found.during == (30, 30, 30, 31, 23)
    assert found.final == 2


def test_an_item_that_nobody_reads_dies_with_the_tuple():
    whole = step(1, (0,), (10, 20), holds=((-1, 0), (-1, 1)))
    found = simulate(program([0], [whole, step(2, (1,), holds=((0, 1),)), step(3, (2,), (1,))], [3]), {0: (0, 0)})
    assert found.during == (30, 30, 21)


def test_inputs_that_share_a_storage_are_counted_once():
    aliased = {0: (7, 100), 1: (7, 100), 2: (8, 50)}
    found = simulate(program([0, 1, 2], [step(3, (0,), (1,)), step(4, (1, 2), (2,))], [4]), aliased)
    assert found.start == 150
    assert found.during == (151, 152)  # value 1 still holds the storage of value 0; nobody reads slot 3
    assert found.final == 2


def test_pinned_values_stay_alive_to_the_end():
    found = simulate(program([0], [step(1, (0,), (10,))], [1]), {0: (0, 100), 5: (5, 30)}, pinned=[0, 5])
    assert (found.start, found.during, found.final) == (130, (140,), 140)


def test_arguments_that_nobody_reads_are_freed_at_once():
    found = simulate(program([0, 1], [step(2, (0,), (10,))], [2]), {0: (0, 4), 1: (1, 100)})
    assert (found.start, found.during, found.final) == (104, (14,), 10)


def test_base_bytes_are_added_throughout():
    found = simulate(program([0], [step(1, (0,), (10,))], [1]), {0: (0, 4)}, base=1000)
    assert (found.start, found.during, found.final) == (1004, (1014,), 1010)


def test_an_output_that_is_an_input():
    found = simulate(program([0, 1], [step(2, (0,), (10,))], [1, 2]), {0: (0, 4), 1: (1, 6)})
    assert (found.during, found.final) == ((20,), 16)


def test_an_empty_program_peaks_at_its_arguments():
    assert simulate(program([0], [], []), {0: (0, 9)}).peak == 9
