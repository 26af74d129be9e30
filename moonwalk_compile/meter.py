"""What a compiled step really holds: its first steps are measured, so that a budget that was broken is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .passes.workspace import ProfilerBusy, watched

Boxed = Callable[[list[Any]], Sequence[Any]]
STEPS = 2  # libraries set themselves up in the first one: only what is held twice counts


class StepMeter:
    """Wraps the two halves of a step, and measures their first `STEPS` runs; then it calls them as they are.

    The halves are watched one by one: what the user's loss allocates between them is not counted, as in the plan.
    """

    def __init__(self, device: torch.device, tangent_bytes: int, on_measured: Callable[[int], None]) -> None:
        self.device, self.tangent_bytes, self.on_measured = device, tangent_bytes, on_measured
        self.forward_peak = self.held = 0
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
            result, self.forward_peak, self.held = self._watch(run, arguments)
            self.began = True
            return result

        return _boxed(call)

    def backward(self, run: Boxed) -> Boxed:
        def call(arguments: list[Any]) -> Sequence[Any]:
            if self.done or not self.began:
                return run(arguments)
            result, peak, _ = self._watch(run, arguments)
            self.began = False
            if not self.busy:
                self.peaks.append(max(self.forward_peak, self.held + self.tangent_bytes + peak))
                if self.done:
                    self.on_measured(min(self.peaks))
            return result

        return _boxed(call)

    def _watch(self, run: Boxed, arguments: list[Any]) -> tuple[Sequence[Any], int, int]:
        """Where the user's own profiler runs, nothing is measured."""
        try:
            return watched(lambda: run(arguments), self.device)
        except ProfilerBusy:
            self.busy = True
            return run(arguments), 0, 0


def _boxed(call: Boxed) -> Boxed:
    call._boxed_call = True  # type: ignore[attr-defined]
    return call
