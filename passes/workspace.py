"""What an ATen operation allocates and frees within its own call, measured by running it once.

A convolution on CPU copies its operands into the library's layout, attention keeps a buffer per thread: tens of
percent of a block's peak, written in no graph and known to no fake tensor. Each distinct call (operation, shapes,
strides, types) runs once on made-up values, in memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    tree_map,
)
from .graph import Operation
from .wrapper_memory import ProfileUnknown

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")  # other processes would wait
PICKY = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")  # they crash on a buffer that no forward pass has written


def may_be_tried(target: Any) -> bool:
    """Whether an operation can be run on made-up values without harm."""
    name = getattr(getattr(target, "_schema", None), "name", "").removeprefix("aten::")
    return getattr(target, "namespace", "") not in COLLECTIVES and not name.startswith(PICKY)


@dataclass(frozen=True)
class Like:
    """Everything about a tensor argument that can matter for memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> torch.Tensor:
        """Small positive numbers; zeros (a valid index, a valid mask) for integers and truth values."""
        new = torch.empty(self.elements, dtype=self.dtype, device=self.device)
        filled = new.uniform_(0.1, 1) if self.dtype.is_floating_point else new.zero_()
        return filled.as_strided(self.size, self.stride)  # strides of expanded tensors are zero

    @property
    def elements(self) -> int:
        if 0 in self.size:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass
class Workspaces:
    """The workspace of operations by trial, for the planner. What cannot be tried, or has more than `limit` bytes of
    operands, counts as 0."""

    limit: float = math.inf
    found: dict[object, int] = field(default_factory=dict)

    def __call__(self, operation: Operation) -> int:
        return self._of(*operation.call) if operation.borrows and operation.call is not None else 0

    def of_call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
        """Of a call in a generated wrapper: a `wrapper_memory.Workspace`."""
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
            return _measure(target, args, kwargs, torch.get_num_threads()) if likes else 0
        except ProfileUnknown:
            return 0


def measured_workspace(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The most bytes that one call holds beyond its arguments and its outputs. Raises `ProfileUnknown`."""
    if not any(isinstance(t, torch.Tensor) for t in tree_leaves((args, kwargs))):
        return 0
    return _measure(operation, *frozen_call(args, kwargs), torch.get_num_threads())


def made_up(args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Real arguments for a frozen call."""
    real, named = tree_map(lambda x: x.make() if isinstance(x, Like) else x, (args, dict(kwargs)))
    return real, named


def frozen_call(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of a call as a hashable description."""
    return _frozen(tuple(args)), tuple((name, _frozen(value)) for name, value in kwargs.items())


def _frozen(value: Any) -> Any:
    """A hashable copy, with tensors as `Like`."""
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, torch.Tensor):
        return Like(tuple(value.size()), tuple(value.stride()), value.dtype, value.device)
    return value


@cache
def _measure(operation: Any, args: Any, kwargs: Any, threads: int) -> int:
    with disable_current_modes(), torch.no_grad(), torch.random.fork_rng():
        real, named = made_up(args, kwargs)
        device = next(t.device for t in tree_leaves((real, named)) if isinstance(t, torch.Tensor))
        try:
            operation(*real, **named)  # once beforehand: libraries keep what they set up at first use
            result, top, end = watched(lambda: operation(*real, **named), device)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ProfileUnknown(f"cannot measure the workspace of {operation}: {error}") from error
    # A loss is returned in the memory of the elements that it is the mean of: more than its own bytes.
    own = sum(t.numel() * t.itemsize for t in tree_leaves(result) if isinstance(t, torch.Tensor))
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
