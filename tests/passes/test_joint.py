"""An update stands behind the last reader of its parameter, views of it included, and the verifier sees to that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moonwalk_compile.passes.graph import Operation, Ref
from moonwalk_compile.passes.joint import Updates, verify_updates
from moonwalk_compile.passes.program import Instruction, Program
from moonwalk_compile.passes.verify import VerificationError

aten = torch.ops.aten
WEIGHT, X = 0, 1


def update(number: int, parameter: Any, gradient: Any) -> None:
    raise AssertionError("nothing runs here")


UPDATES = Updates(update, {WEIGHT: 0})


def call(slot: int, target: Any, *reads: int, new: bool = True) -> Instruction:
    holds = ((-1, 0),) if new else ((0, 0),)
    references = tuple(Ref(place) for place in range(len(reads)))
    return Instruction(slot, Operation(target, references, {}, (8,) if new else (), holds), reads, slot)


def updating(slot: int, parameter: int, gradient: int) -> Instruction:
    return Instruction(slot, Operation(update, (0, Ref(0), Ref(1))), (parameter, gradient))


VIEW = call(2, aten.t.default, WEIGHT, new=False)
OUTPUT = call(3, aten.mm.default, X, 2)
GRADIENT = call(4, aten.mm.default, X, 3)
COTANGENT = call(5, aten.mm.default, 4, 2)  # reads the weight through its view
UPDATE = updating(6, WEIGHT, 4)


def program(*instructions: Instruction, outputs: tuple[int, ...] = (5,)) -> Program:
    return Program(((WEIGHT, WEIGHT), (X, X)), instructions, tuple(map(Ref, outputs)))


def test_an_update_behind_all_readers_passes():
    verify_updates(program(VIEW, OUTPUT, GRADIENT, COTANGENT, UPDATE), UPDATES)


WRONG = {
    "a view is read later": program(VIEW, OUTPUT, GRADIENT, UPDATE, COTANGENT),
    "the parameter is read later": program(VIEW, OUTPUT, GRADIENT, UPDATE, COTANGENT._replace(slots=(4, WEIGHT))),
    "it is updated twice": program(VIEW, OUTPUT, GRADIENT, COTANGENT, UPDATE, updating(7, WEIGHT, 4)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_reader_behind_the_update_is_a_bug(case: str):
    with pytest.raises(VerificationError, match="reads a parameter that was updated before it"):
        verify_updates(WRONG[case], UPDATES)


def test_a_result_in_the_memory_of_an_updated_parameter_is_a_bug():
    wrong = program(VIEW, OUTPUT, GRADIENT, COTANGENT, UPDATE, outputs=(5, 2))
    with pytest.raises(VerificationError, match="is a view of a parameter"):
        verify_updates(wrong, UPDATES)
