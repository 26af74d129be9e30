"""A whole step through Inductor: its blocks are compiled piece by piece, its updates are calls between the pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .inductor import Lowered, MemoryEvent, kernels_in_background
from .joint import Updates
from .liveness import Timeline
from .lower import FEW, Half, Lowerer, boxed_sequence, replay_pieces
from .pieces import Piece, cut_pieces, group_by_block
from .program import Instruction, Program


class JointLowerer(Lowerer):
    """Lowers joint programs. An update waits for the end of its block, so that equal blocks stay equal pieces."""

    updates: Updates

    def whole(self, program: Program, forward: int) -> tuple[Half, Half]:
        """The step, and its memory as two timelines; the first `forward` instructions are those of the forward pass."""
        ahead, behind = program.instructions[:forward], program.instructions[forward:]
        first = [list(ahead)] if forward <= FEW else group_by_block(Program((), ahead, ()))
        pieces = cut_pieces(self.analysis, program, [*first, *self._groups(behind)])
        fakes = (fake for fake in self.analysis.fakes.values() if isinstance(fake, Tensor))
        on_cpu = all(fake.device.type == "cpu" for fake in fakes)
        with kernels_in_background() if on_cpu else contextlib.nullcontext():
            calls, lowered, _ = self.calls(program, pieces, len(first))
        whole = replay_pieces(self.analysis, program, pieces, lowered, ())
        border = len(replay_pieces(self.analysis, program, pieces[: len(first)], lowered[: len(first)], ()).during)
        distinct = len({piece.key for piece in pieces})
        step = Half(boxed_sequence(program, calls), Timeline(whole.during[:border], whole.start, 0), distinct)
        return step, Half(step.call, Timeline(whole.during[border:], 0, whole.final), distinct)

    def _groups(self, instructions: Sequence[Instruction]) -> list[list[Instruction]]:
        """By block; each update is a group by itself, so that its gradient is freed behind it."""
        groups: list[list[Instruction]] = []
        for run in group_by_block(Program((), tuple(instructions), ())):
            plain = [i for i in run if not self.updates.is_update(i.operation)]
            groups += [plain] if plain else []
            groups += [[i] for i in run if self.updates.is_update(i.operation)]
        return groups

    def _compile(self, piece: Piece, is_backward: bool, fakes: Mapping[int, Any], donated: tuple[int, ...]) -> Lowered:
        first = piece.program.instructions[0]
        if self.updates.is_update(first.operation):
            return self._update(first)
        return super()._compile(piece, is_backward, fakes, donated)

    def _update(self, instruction: Instruction) -> Lowered:
        number = instruction.operation.args[0]
        held = self.updates.workspace.get(number, 0)

        def call(arguments: list[Any]) -> Sequence[Any]:
            parameter, gradient = arguments
            arguments.clear()
            self.updates.target(number, parameter, gradient)
            return ()

        return Lowered(call, (MemoryEvent(held), MemoryEvent(-held)), (), "")
