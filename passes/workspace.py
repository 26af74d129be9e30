"""What an ATen operation allocates and frees within its own call, measured by running it once.

A convolution on CPU copies its operands into the library's layout, attention keeps a buffer per thread: tens of
percent of a block's peak, written in no graph and known to no fake tensor. Each distinct call (operation, shapes,
strides, types) runs once on made-up values, in memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import torch

from ._torch_compat_inductor import (
    ExperimentalConfig,
    ProfilerConfig,
    ProfilerState,
    disable_current_modes,
    profiler_enabled,
    start_profiler,
    stop_profiler,
    tree_leaves,
)
from .graph import Call, Operation
from .layout import laid_out
from .liveness import simulate
from .opaque import OPAQUE, Piece, piece_of
from .sizes import allocated
from .trials import Like, frozen_call, made_up, may_be_tried, shortened
from .wrapper_memory import ProfileUnknown


@dataclass
class Workspaces:
    """The workspace of operations by trial, for the planner. What cannot be tried, or has more than `limit` bytes of
    operands, counts as 0. With `fused` (Inductor) calls are made as they are laid out there, `as_plain` as by
    plain `torch.compile`."""

    limit: float = math.inf
    fused: bool = False
    as_plain: bool = False
    found: dict[object, int] = field(default_factory=dict)
    known: dict[int, tuple[Operation, int]] = field(default_factory=dict)  # by the object: calls take long to compare

    def __call__(self, operation: Operation) -> int:
        if operation.call is None or not operation.borrows:
            return 0
        if id(operation) not in self.known and operation.target is OPAQUE:
            self.known[id(operation)] = operation, self._within(piece_of(operation.args))
        if id(operation) not in self.known:
            call = laid_out(operation.call, self.as_plain) if self.fused else operation.call
            self.known[id(operation)] = operation, self._of(*call) + copied_bytes(operation.call, call)
        return self.known[id(operation)][1]

    def _within(self, piece: Piece) -> int:
        """What a piece of a graph holds beside what goes in and comes out, called as captured."""
        outside = {value: (value, 0) for _, value in piece.program.inputs}
        timeline = simulate(piece.program, outside, workspace=replace(self, fused=False, known={}))
        return max(0, timeline.peak - sum(like.bytes for like in piece.results))

    @property
    def plain(self) -> Workspaces:
        """Those of plain backpropagation."""
        return replace(self, as_plain=True, known={})

    def of_call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        """Of a call in a generated wrapper: a `wrapper_memory.Workspace`."""
        if target is OPAQUE:
            return self._within(piece_of(args))
        return self._of(target, *frozen_call(args, kwargs))

    def _of(self, target: Any, args: Any, kwargs: Any) -> int:
        key = (target, args, kwargs)
        if key not in self.found:
            self.found[key] = self._try(target, args, kwargs)
        return self.found[key]

    def _try(self, target: Any, args: Any, kwargs: Any) -> int:
        if not may_be_tried(target):
            return 0
        likes = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Like)]
        try:
            if sum(like.bytes for like in likes) > self.limit:
                raise ProfileUnknown("too large to be tried")
            return _measure(target, shortened(target, args), kwargs, torch.get_num_threads()) if likes else 0
        except ProfileUnknown:
            return 0


def copied_bytes(captured: Call, called: Call) -> int:
    """What is copied for another layout though it has none of its own: parts of images, and expanded ones."""
    images = zip(captured[1], called[1], strict=True)
    return sum(new.bytes for old, new in images if isinstance(old, Like) and old.elements != new.elements)


def measured_workspace(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The most bytes that one call holds beyond its arguments and its outputs. Raises `ProfileUnknown`."""
    if not any(isinstance(t, torch.Tensor) for t in tree_leaves((args, kwargs))):
        return 0
    return _measure(operation, *frozen_call(args, kwargs), torch.get_num_threads())


@cache
def _measure(operation: Any, args: Any, kwargs: Any, threads: int) -> int:
    with disable_current_modes(), torch.no_grad(), torch.random.fork_rng():
        try:
            real, named = made_up(operation, args, kwargs)
            device = next(t.device for t in tree_leaves((real, named)) if isinstance(t, torch.Tensor))
            operation(*real, **named)  # once beforehand: libraries keep what they set up at first use
            result, top, end = watched(lambda: operation(*real, **named), device)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ProfileUnknown(f"cannot measure the workspace of {operation}: {error}") from error
    # A loss is returned in the memory of the elements that it is the mean of: more than its own bytes.
    own = sum(allocated(t.numel() * t.itemsize, t.device) for t in tree_leaves(result) if isinstance(t, torch.Tensor))
    return top - min(end, own)


class ProfilerBusy(RuntimeError):
    """There can be one profiler at a time, and another one is running."""


Result = TypeVar("Result")


def watched(run: Callable[[], Result], device: torch.device) -> tuple[Result, int, int]:
    """What `run` returns, the most bytes that it held on the device beyond what was there before, and what remains.

    Raises ProfilerBusy before anything has run.
    """
    if device.type == "cuda":
        return _watched_on_cuda(run, device)
    return _watched_on_cpu(run)


def _watched_on_cpu(run: Callable[[], Result]) -> tuple[Result, int, int]:
    """By the allocator's events, which only a profiler reports. The old one is quiet, where Kineto writes a line at
    each start and stop."""
    if profiler_enabled():
        raise ProfilerBusy("cannot measure memory while a profiler is running")
    start_profiler(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, ExperimentalConfig()))
    try:
        result = run()
    finally:
        threads = stop_profiler()
    live = top = 0
    for event in (event for events in threads for event in events if event.kind() == "memory_alloc"):
        live += event.cpu_memory_usage()
        top = max(top, live)
    return result, top, live


def _watched_on_cuda(run: Callable[[], Result], device: torch.device) -> tuple[Result, int, int]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
