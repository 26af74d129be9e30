"""What a compiled step really holds: its first steps are measured, so that a budget that was broken is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .passes._torch_compat import TANGENTS_ARE_FREED, is_retained
from .passes.lower import Boxed, as_boxed
from .passes.sizes import storage_bytes
from .passes.workspace import ProfilerBusy, watched

STEPS = 2  # libraries set themselves up in the first one: only what is held twice counts


class StepMeter:
    """Wraps the two halves of a step, and measures their first `STEPS` runs; then it calls them as they are.

    The halves are watched one by one: what the user's loss allocates between them is not counted, as in the plan.
    A CPU's profiler knows nothing of memory from before it was started, and says so on stderr when that is freed. So
    inputs are held until it has stopped, and `tangents` (the last arguments of the backward half) are copied under it.
    A backward pass after which the graph is retained frees nothing, and is not measured.
    """

    def __init__(self, device: torch.device, tangents: int, on_measured: Callable[[int], None]) -> None:
        self.device, self.tangents, self.on_measured = device, tangents, on_measured
        self.forward_peak = self.held = 0
        self.inputs: set[int] = set()  # addresses
        self.peaks: list[int] = []
        self.busy = False
        self.began = False

    @property
    def done(self) -> bool:
        return self.busy or len(self.peaks) >= STEPS

    def forward(self, run: Boxed) -> Boxed:
        def call(arguments: list[Any]) -> Sequence[Any]:
            if self.done:
                return run(arguments)
            inputs = list(arguments)
            self.inputs = {address(value) for value in inputs}
            result, self.forward_peak, self.held = self._watch(lambda: run(arguments))
            self.began = True
            return result

        return as_boxed(call)

    def backward(self, run: Boxed) -> Boxed:
        def call(arguments: list[Any]) -> Sequence[Any]:
            if self.done or not self.began or is_retained():
                return run(arguments)
            inputs = [value for value in arguments if address(value) in self.inputs]
            tangents = arguments[len(arguments) - self.tangents :]
            if self.device.type == "cpu":
                result, peak, _ = self._watch(lambda: self._on_copies(run, arguments))
            else:
                peak = sum({address(value): storage_bytes(value) for value in tangents}.values())
                del tangents[:], inputs[:]
                result, more, _ = self._watch(lambda: run(arguments))
                peak += more
            self.began = False
            if not self.busy:
                self.peaks.append(max(self.forward_peak, self.held + peak))
                if self.done:
                    self.on_measured(min(self.peaks))
            return result

        return as_boxed(call)

    def _on_copies(self, run: Boxed, arguments: list[Any]) -> Sequence[Any]:
        moved = with_copies(arguments, self.tangents)
        held = [] if TANGENTS_ARE_FREED else moved[len(moved) - self.tangents :]
        result = run(moved)
        del held
        return result

    def _watch(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], int, int]:
        """Where the user's own profiler runs, nothing is measured."""
        try:
            return watched(run, self.device)
        except ProfilerBusy:
            self.busy = True
            return run(), 0, 0


class WholeMeter(StepMeter):
    """For a step whose forward half is all of it. The first step makes the optimizer's state, and counts that."""

    def forward(self, run: Boxed) -> Boxed:
        def call(arguments: list[Any]) -> Sequence[Any]:
            if self.done:
                return run(arguments)
            inputs = list(arguments)
            result, peak, _ = self._watch(lambda: run(arguments))
            del inputs
            if not self.busy:
                self.peaks.append(peak)
                if self.done:
                    self.on_measured(min(self.peaks))
            return result

        return as_boxed(call)


def address(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


def with_copies(arguments: list[Any], last: int) -> list[Any]:
    """The arguments, emptied out of their list, the last ones in storages of their own and laid out as they were."""
    first = len(arguments) - last
    moved = [*arguments[:first], *(map(_copy, arguments[first:]))]
    arguments.clear()
    return moved


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    place = (value.storage_offset(), value.size(), value.stride())
    return value.new_empty(0).set_(value.untyped_storage().clone(), *place)
