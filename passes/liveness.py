"""Live bytes of a program, operation by operation: storages, not names, are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .graph import Operation
from .program import Program


@dataclass(frozen=True)
class Timeline:
    """`during[i]` is what is live while instruction i runs (its arguments and results); `final` what is left."""

    during: tuple[int, ...]
    start: int
    final: int

    @property
    def peak(self) -> int:
        return max((self.start, self.final, *self.during))


@dataclass
class Heap:
    """Reference counts of storages."""

    size: dict[tuple[int, int], int] = field(default_factory=dict)
    holders: dict[tuple[int, int], int] = field(default_factory=dict)
    live: int = 0

    def take(self, storage: tuple[int, int], size: int) -> None:
        if self.holders.get(storage, 0) == 0:
            self.size[storage] = size
            self.live += size
        self.holders[storage] = self.holders.get(storage, 0) + 1

    def drop(self, storage: tuple[int, int]) -> None:
        self.holders[storage] -= 1
        if self.holders[storage] == 0:
            self.live -= self.size[storage]


def simulate(
    program: Program,
    storages: Mapping[int, tuple[int, int]],
    pinned: Sequence[int] = (),
    base: int = 0,
    workspace: Callable[[Operation], int] | None = None,
) -> Timeline:
    """Replay `program`, freeing every slot after its last use.

    `storages` gives (storage, bytes) of each input value, bytes being zero for what existed before the step.
    `pinned` values (the outputs that the user holds) stay alive to the end; `base` bytes are added throughout, and
    `workspace` says what an operation holds within its call.
    """
    heap = Heap(live=base)
    held: dict[int, list[tuple[int, int]]] = {}
    for slot, value in program.inputs:
        storage, size = storages[value]
        held[slot] = [(-1, storage)]
        heap.take((-1, storage), size)
    for value in pinned:
        storage, size = storages[value]
        heap.take((-1, storage), size)
    start = heap.live
    for slot, _ in program.inputs:
        if slot not in program.last_use:
            for storage_id in held[slot]:
                heap.drop(storage_id)
    dying: dict[int, list[int]] = {}
    for slot, position in program.last_use.items():
        dying.setdefault(position, []).append(slot)
    during = []
    for position, instruction in enumerate(program.instructions):
        operation, own = instruction.operation, instruction.slot
        mine = [(own, item) if source < 0 else held[source][item] for source, item in instruction.holds]
        for storage_id in mine:
            heap.take(storage_id, operation.new[storage_id[1]] if storage_id[0] == own else heap.size[storage_id])
        held[own] = mine
        during.append(heap.live + (workspace(operation) if workspace else 0))
        for slot in dying.get(position, ()):
            for storage_id in held[slot]:
                heap.drop(storage_id)
        if own not in program.last_use:
            for storage_id in mine:
                heap.drop(storage_id)
    return Timeline(tuple(during), start, heap.live)
