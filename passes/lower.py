"""Making programs run: FX code on ATen kernels ("eager"), or Inductor, as one graph or piece by piece."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.backends import mkldnn

from .analysis import Analysis
from .cost import base_name
from .emit import Schedule
from .graph import Operation, refs_in
from .inductor import Lowered, kernels_in_background, lower
from .liveness import Heap, Timeline, simulate
from .pieces import Piece, cut_group, cut_pieces, group_by_block, metadata, released
from .program import Instruction, Program
from .reuse import written_over
from .rewrite import to_module
from .wrapper_memory import Workspace, no_workspace

Boxed = Callable[[list[Any]], Sequence[Any]]
FEW = 150  # instructions below which a program is lowered whole


@dataclass(frozen=True)
class Half:
    """One half of the step, runnable. `timeline` is the memory use of what was generated (None: as simulated)."""

    call: Boxed
    timeline: Timeline | None = None
    pieces: int = 1
    given: Mapping[int, Any] = field(default_factory=dict)  # by value: the layouts in which results come out

    @property
    def peak(self) -> int:
        """0 if unknown."""
        return 0 if self.timeline is None else self.timeline.peak


@dataclass(frozen=True)
class Aim:
    """The peak above which a half is not lowered whole, and how often its pieces may be cut to get below it.

    Without `channels_last`, images keep the layouts in which they were captured, or that Inductor gives them.
    """

    limit: float
    cuts: int
    channels_last: bool = True


def as_boxed(call: Boxed) -> Boxed:
    """Tell AOTAutograd that a function takes its arguments in one list."""
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def boxed_eager(module: fx.GraphModule) -> Boxed:
    """FX code that takes its arguments in one list and frees each after its last use."""
    module.graph.set_codegen(torch.fx.graph._BoxedCodeGen())
    module.recompile()
    function = module.forward

    def call(arguments: list[Any]) -> Sequence[Any]:
        return function(arguments)

    return as_boxed(call)


@dataclass(frozen=True)
class Call:
    function: Boxed
    arguments: tuple[int, ...]
    dying: tuple[int, ...]
    results: tuple[int, ...]


def boxed_sequence(program: Program, calls: Sequence[Call]) -> Boxed:
    """The straight-line outer program: calls pieces, handing over the last reference to what dies in them."""
    inputs = [slot for slot, _ in program.inputs]
    outputs = tuple(program.outputs)
    live_out = {ref.slot for ref in refs_in(outputs)}
    read = {slot for call in calls for slot in call.arguments} | live_out
    unread = [place for place, slot in enumerate(inputs) if slot not in read]

    def run(arguments: list[Any]) -> Sequence[Any]:
        for place in unread:
            arguments[place] = None
        slots = dict(zip(inputs, arguments, strict=True))
        arguments.clear()
        for call in calls:
            handed = [slots[slot] for slot in call.arguments]
            for slot in call.dying:
                del slots[slot]
            slots.update(zip(call.results, call.function(handed), strict=True))
            del handed
        return tuple(slots[item.slot] if hasattr(item, "slot") else item for item in outputs)

    return as_boxed(run)


class Ownership:
    """Which slots of an outer program stand for memory that one of its pieces has allocated, and that no other shares.

    What came from outside is never among them: saved tensors are read again where a graph is retained.
    """

    def __init__(self) -> None:
        self.storage: dict[int, tuple[int, int]] = {}

    def owned(self, piece: Piece, fakes: Mapping[int, Any]) -> tuple[int, ...]:
        """The arguments of a piece whose memory dies in it."""
        dying = [place for place in piece.dying if piece.arguments[place] in self.storage]
        shared = Counter(self.storage.values())
        alone = [place for place in dying if shared[self.storage[piece.arguments[place]]] == 1]
        return tuple(place for place in alone if fakes[piece.arguments[place]].storage_offset() == 0)

    def update(self, number: int, piece: Piece, done: Lowered) -> None:
        """A piece has run: its results are there, and what died in it is gone."""
        made = {}
        for position, (slot, output) in enumerate(zip(piece.results, done.outputs, strict=True)):
            if output.argument is not None:
                if (owner := self.storage.get(piece.arguments[output.argument])) is not None:
                    made[slot] = owner
            elif output.bytes or output.output is not None:
                made[slot] = (number, position if output.output is None else output.output)
        for place in piece.dying:
            self.storage.pop(piece.arguments[place], None)
        self.storage |= made


def ignores_layout(operation: Operation) -> bool:
    """Whether an operation asks for elements by their indices alone; of a user's own nothing is known."""
    namespace = getattr(operation.target, "namespace", "aten")
    return namespace in ("aten", "prims", "moonwalk_compile") and "strided" not in base_name(operation.target)


class Lowerer:
    """Lowers programs; every distinct piece is compiled once, also across plans of the same step."""

    def __init__(
        self, analysis: Analysis, root: torch.nn.Module, lowering: str, workspace: Workspace = no_workspace
    ) -> None:
        self.analysis, self.root, self.lowering, self.workspace = analysis, root, lowering, workspace
        self.compiled: dict[object, Lowered] = {}
        self.given: Mapping[int, Any] = {}  # what the forward half hands over in a layout of its own
        drawn_like = {value for edge in analysis.graph.edges if edge.random for value in edge.needs}
        self.exact = {*analysis.graph.output_values, *analysis.graph.gradient_values, *drawn_like}
        operations = [operation for edge in analysis.graph.edges for operation in edge.operations]
        self.free = all(map(ignores_layout, operations))
        self.on_cpu = all(fake.device.type == "cpu" for fake in analysis.fakes.values() if isinstance(fake, Tensor))
        convolves = any("convolution" in base_name(operation.target) for operation in operations)
        onednn = mkldnn.is_available() and bool(mkldnn.enabled)
        self.channels_last = self.laid_out = convolves and self.free and self.on_cpu and onednn
        self.too_large: set[tuple[bool, bool]] = set()  # halves that were when lowered whole: is_backward, laid_out

    def halves(self, schedule: Schedule, pinned: Sequence[int], aim: Aim) -> tuple[Half, Half]:
        self.given, self.laid_out = {}, self.channels_last and aim.channels_last
        with kernels_in_background() if self.on_cpu else contextlib.nullcontext():
            forward = self.half(schedule.forward, False, (), aim)
            self.given = forward.given
            return forward, self.half(schedule.backward, True, pinned, aim)

    def half(self, program: Program, is_backward: bool, pinned: Sequence[int], aim: Aim) -> Half:
        """Whole if it is small or if its blocks hardly repeat, and fits; or block by block, or these cut up.

        Inductor reorders within a piece, never across.
        """
        if self.lowering == "eager":
            program = written_over(self.analysis, program)
            return Half(boxed_eager(to_module(self.analysis, program, self.root, "Moonwalk")))
        groups: Sequence[Sequence[Instruction]] = group_by_block(program)
        pieces = cut_pieces(self.analysis, program, groups)
        whole = len(program.instructions) <= FEW or 2 * len({piece.key for piece in pieces}) > len(pieces)
        kind = (is_backward, self.laid_out)
        if whole and kind not in self.too_large:
            one = cut_pieces(self.analysis, program, [program.instructions])
            half, _ = self._in_pieces(program, one, is_backward, pinned)
            if half.peak <= aim.limit:
                return half
            self.too_large.add(kind)
        best, worst = self._in_pieces(program, pieces, is_backward, pinned)
        if best.peak <= aim.limit or not aim.cuts:
            return best
        freed = released(program, simulate(program, self.analysis.charges).during)
        for _ in range(aim.cuts):
            finer = cut_group(groups, pieces, worst, freed)
            if finer is None:
                break
            groups, pieces = finer, cut_pieces(self.analysis, program, finer)
            half, worst = self._in_pieces(program, pieces, is_backward, pinned)
            best = min(best, half, key=lambda half: half.peak)
            if half.peak <= aim.limit:
                break
        return best

    def _in_pieces(
        self, program: Program, pieces: Sequence[Piece], is_backward: bool, pinned: Sequence[int]
    ) -> tuple[Half, int]:
        """With the number of the piece that has the peak."""
        calls, lowered, fakes = self.calls(program, pieces, 0 if is_backward else len(pieces))
        timeline = replay_pieces(self.analysis, program, pieces, lowered, pinned)
        values = {i.slot: i.value for i in program.instructions if i.value is not None}
        given = {values[ref.slot]: fakes[ref.slot] for ref in refs_in(program.outputs) if ref.slot in values}
        half = Half(boxed_sequence(program, calls), timeline, len({piece.key for piece in pieces}), given)
        ends = list(accumulate(len(done.profile) + 1 for done in lowered))
        return half, bisect_right(ends, timeline.during.index(max(timeline.during)))

    def calls(
        self, program: Program, pieces: Sequence[Piece], backward: int
    ) -> tuple[list[Call], list[Lowered], dict[int, Any]]:
        """Lower pieces, those from number `backward` on as parts of a backward pass; with the layout of each slot."""
        calls, lowered = [], []
        fakes = {slot: self.given.get(value, self.analysis.fakes[value]) for slot, value in program.inputs}
        ownership = Ownership()
        for number, piece in enumerate(pieces):
            is_backward = number >= backward
            donated = ownership.owned(piece, fakes) if is_backward else ()
            done = self._compile(piece, is_backward, fakes, donated)
            lowered.append(done)
            fakes.update(self._results(piece, done))
            ownership.update(number, piece, done)
            dying = tuple(piece.arguments[place] for place in piece.dying)
            calls.append(Call(done.call, piece.arguments, dying, piece.results))
        return calls, lowered, fakes

    def _is_exact(self, value: int | None) -> bool:
        """Whether a result must have the layout that was planned: all but images that stay inside of the step.

        Inductor computes these in the order of channels last. To be stored in another order, and read back in it, would
        cost a pass over memory each time.
        """
        item = self.analysis.graph.values[value] if value is not None else None
        if item is None or not self.free or value in self.exact:
            return True
        return item.storage != value or len(item.shape) < 4

    def _compile(self, piece: Piece, is_backward: bool, fakes: Mapping[int, Any], donated: tuple[int, ...]) -> Lowered:
        arguments = {slot: fakes[slot] for slot in piece.arguments}
        roles = [self.analysis.graph.values[value].role for _, value in piece.program.inputs]
        values = {i.slot: i.value for i in piece.program.instructions}
        exact = tuple(place for place, slot in enumerate(piece.results) if self._is_exact(values[slot]))
        layouts = (tuple(map(metadata, arguments.values())), exact, self.laid_out)
        key = (is_backward, piece.key, layouts, tuple(roles), donated)
        if key not in self.compiled:
            module = to_module(self.analysis, piece.program, self.root, "MoonwalkPiece", arguments)
            static = [place for place, role in enumerate(roles) if role in ("parameter", "buffer")]
            self.compiled[key] = lower(
                module,
                is_backward=is_backward,
                static_inputs=static,
                donated=donated,
                exact_strides=exact,
                channels_last=self.laid_out,
                workspace=self.workspace,
            )
        return self.compiled[key]

    def _results(self, piece: Piece, done: Lowered) -> dict[int, Any]:
        """Fake tensors in the layout that the compiled piece returns: a solved value need not have its original's."""
        values = {i.slot: i.value for i in piece.program.instructions}
        found = {}
        for slot, output in zip(piece.results, done.outputs, strict=True):
            value = values[slot]
            assert value is not None
            fake = self.analysis.fakes[value]
            if output.stride is not None and output.stride != fake.stride():
                with fake.fake_mode:
                    fake = torch.empty_strided(fake.shape, output.stride, dtype=fake.dtype, device=fake.device)
            found[slot] = fake
        return found


def replay_pieces(
    analysis: Analysis, program: Program, pieces: Sequence[Piece], lowered: Sequence[Lowered], pinned: Sequence[int]
) -> Timeline:
    """Live bytes through the generated code: each piece's own events, inside the outer program."""
    heap = Heap()
    held: dict[int, tuple[int, int]] = {}
    for slot, value in program.inputs:
        storage, size = analysis.charges[value]
        held[slot] = (-1, storage)
        heap.take(held[slot], size)
    for value in pinned:
        storage, size = analysis.charges[value]
        heap.take((-1, storage), size)
    start, during = heap.live, []
    read = {slot for piece in pieces for slot in piece.arguments} | {ref.slot for ref in refs_in(program.outputs)}
    for slot, _ in program.inputs:
        if slot not in read:
            heap.drop(held.pop(slot))
    for number, (piece, done) in enumerate(zip(pieces, lowered, strict=True)):
        during += _replay_piece(heap, held, number, piece, done)
    return Timeline(tuple(during), start, heap.live)


def _replay_piece(heap: Heap, held: dict[int, tuple[int, int]], number: int, piece: Piece, done: Lowered) -> list[int]:
    during = []
    dying = set(piece.dying)
    dropped: set[int] = set()
    for slot, output in zip(piece.results, done.outputs, strict=True):
        if output.argument is not None:  # a view of an argument: holds it from before the argument is dropped
            held[slot] = held[piece.arguments[output.argument]]
            heap.take(held[slot], heap.size[held[slot]])
    for event in done.profile:
        if event.argument is None:
            heap.live += event.bytes
        elif event.argument in dying:
            dropped.add(event.argument)
            heap.drop(held[piece.arguments[event.argument]])
        during.append(heap.live)
    for place, (slot, output) in enumerate(zip(piece.results, done.outputs, strict=True)):
        if output.argument is not None:
            continue
        held[slot] = held[piece.results[output.output]] if output.output is not None else (number, place)
        heap.live -= output.bytes  # allocated by an event; from here on it is counted by its holders
        heap.take(held[slot], output.bytes)
    for place in dying - dropped:
        heap.drop(held[piece.arguments[place]])
    return [*during, heap.live]
