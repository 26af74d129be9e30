"""Peaks, times and errors of real training steps: what a plan promises is checked with these.

A step is a function without arguments that runs forward and backward. Before a step is measured, the gradients must be
`None` (`model.zero_grad(set_to_none=True)`): gradients that are already there are added to in place, and the bytes of
the new ones would be missing from the peak. A compiled model must have run before, or its compilation is measured too.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from .passes.timing import timed

__all__ = [
    "Measured",
    "Timing",
    "Comparison",
    "measure_step",
    "time_interleaved",
    "gradient_error",
    "gradients",
    "compare_steps",
]

_TINY_SHARE = 1e-3


@dataclass(frozen=True)
class Measured:
    """What one run of a step took.

    Attributes:
        peak_bytes: most bytes held at any moment beyond what was there before the step.
        seconds: wall time of this one run. On CPU the profiler is running: compare times by `time_interleaved` instead.
        timeline: live bytes beyond what was there before, after each allocation and each free; empty on CUDA.
    """

    peak_bytes: int
    seconds: float
    timeline: tuple[int, ...]


@dataclass(frozen=True)
class Timing:
    """Repeated runs of one step.

    Attributes:
        seconds: median of the samples.
        ratio: median of the pairwise ratios to the first step of the same call.
        samples: seconds of each run, in order.
    """

    seconds: float
    ratio: float
    samples: tuple[float, ...]

    def ratio_to(self, other: Timing) -> float:
        """Median of the pairwise ratios to another step that was timed by the same call."""
        return _median_ratio(self.samples, other.samples)

    def interval_to(self, other: Timing) -> tuple[float, float]:
        """Where that ratio lies with a probability of 95%, whatever the noise is like; the extremes of few samples.

        The median of n independent samples lies between the k-th smallest and the k-th largest of them unless fewer
        than k fell on one of its sides.
        """
        ratios = sorted(a / b for a, b in zip(self.samples, other.samples, strict=True))
        count = len(ratios)
        fewer = accumulate(math.comb(count, k) / 2**count for k in range(count))  # than k + 1 on one side
        rank = max(sum(chance <= 0.025 for chance in fewer), 1)
        return ratios[rank - 1], ratios[-rank]


@dataclass(frozen=True)
class Comparison:
    """One step of a model beside the same step of a reference.

    Attributes:
        loss, reference_loss: their losses.
        gradient_error: as `gradient_error` of this module.
        exact: losses and gradients are equal, bit by bit.
    """

    loss: float
    reference_loss: float
    gradient_error: float
    exact: bool

    @property
    def loss_error(self) -> float:
        """Relative to the reference loss; infinity if either loss is not a number."""
        return _relative(abs(self.loss - self.reference_loss), abs(self.reference_loss))


def measure_step(step: Callable[[], Any], *, device: str | torch.device = "cpu") -> Measured:
    """Run `step` once and measure the memory it holds on `device`.

    CPU: exact bytes, from the allocator's own events; a tensor that was there before and is freed by the step is not
    counted, neither up nor down. CUDA: the caching allocator's peak; tensors freed by the step lower it.
    Gradients must be `None` before (see above).
    """
    gc.collect()
    return _measure_cuda(step, torch.device(device)) if torch.device(device).type == "cuda" else _measure_cpu(step)


def _measure_cpu(step: Callable[[], Any]) -> Measured:
    watched = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    )
    with watched as profile:
        seconds = timed(step, torch.device("cpu"))
    timeline = _live_bytes(_allocator_events(profile))
    return Measured(max(timeline, default=0), seconds, timeline)


def _measure_cuda(step: Callable[[], Any], device: torch.device) -> Measured:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = timed(step, device)
    return Measured(max(0, torch.cuda.max_memory_allocated(device) - before), seconds, ())


def _allocator_events(profile: torch.profiler.profile) -> list[tuple[int, int, int]]:
    """(nanoseconds, address, bytes) of each CPU allocation (> 0) and free (< 0), in order of time.

    The flat list of events has no addresses, so they are read from the tree.
    """
    results = profile.profiler.kineto_results if profile.profiler else None
    pending: list[Any] = list(results.experimental_event_tree()) if results else []
    found = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]" and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return sorted(found, key=lambda event: event[0])


def _live_bytes(events: Iterable[tuple[int, int, int]]) -> tuple[int, ...]:
    """Running sum of what was allocated since the start.

    Frees are matched with allocations by address: the profiler also reports frees of blocks of earlier profiles, with
    the size of whatever it last saw at that address, and misses frees on threads that it does not watch.
    """
    held: dict[int, int] = {}
    live, timeline = 0, []
    for _, address, size in events:
        change = max(size, 0) - held.pop(address, 0)
        if size > 0:
            held[address] = size
        if change or size > 0:
            live += change
            timeline.append(live)
    return tuple(timeline)


def time_interleaved(
    steps: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, Timing]:
    """Time the steps in turns (A B C A B C ...), so that a busy moment of the machine hits all of them.

    `warmup` turns come first and do not count. Raises ValueError if there is no step or no repeat.
    """
    if not steps or repeats < 1:
        raise ValueError("time_interleaved needs at least one step and one repeat")
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with _old_objects_left_alone():
        for turn in range(warmup + repeats):
            for name, step in steps.items():
                gc.collect()
                seconds = timed(step, torch.device(device))
                if turn >= warmup:
                    samples[name].append(seconds)
    first = next(iter(samples.values()))
    return {
        name: Timing(statistics.median(own), _median_ratio(own, first), tuple(own)) for name, own in samples.items()
    }


@contextlib.contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """The collector passes over what exists by now: compiled models hold millions of objects, and to walk through them
    between the steps would take longer than a step and empty the caches."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _median_ratio(own: Iterable[float], other: Iterable[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def gradient_error(actual: Mapping[str, Tensor | None], reference: Mapping[str, Tensor | None]) -> float:
    """The largest relative error of any tensor in `actual`.

    The error of one tensor is |g - g_ref| / max(|g_ref|, 1e-3 share), in the Euclidean norm, where share is
    sqrt(its elements / all elements) x the norm of the whole reference gradient: a gradient that is zero in theory
    (attention's key bias) is then not compared with its own rounding noise. Infinity if a tensor is missing or `None`
    on one side only, if shapes differ, or if anything is not finite.
    """
    norms = {name: _norm(g) for name, g in reference.items() if g is not None}
    elements = sum(g.numel() for g in reference.values() if g is not None)
    per_element = math.hypot(*norms.values()) / math.sqrt(max(elements, 1))
    worst = 0.0
    for name in {*actual, *reference}:
        ours, theirs = actual.get(name), reference.get(name)
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return math.inf
        floor = _TINY_SHARE * per_element * math.sqrt(theirs.numel())
        distance = _norm(_wide(ours) - _wide(theirs))
        worst = max(worst, _relative(distance, max(norms[name], floor)))
    return worst


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(tensor)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _relative(distance: float, scale: float) -> float:
    if not (math.isfinite(distance) and math.isfinite(scale)):
        return math.inf
    if distance == 0:
        return 0.0
    return distance / scale if scale > 0 else math.inf


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients by parameter name; not copied, so `zero_grad(set_to_none=False)` would clear them."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare_steps(
    model: nn.Module,
    reference: nn.Module,
    loss: Callable[..., Tensor],
    inputs: Iterable[Any],
    *,
    seed: int = 0,
) -> Comparison:
    """Run `loss(model, *inputs)` and its backward on both models, and compare losses and parameter gradients.

    Both start from the same random state, which is put back afterwards, and both end without gradients. Buffers
    (BatchNorm) move by one step. The models must have the same parameter names, or the gradient error is infinite.

    >>> compare_steps(compiled, plain, lambda net, x: net(x).square().mean(), [x]).gradient_error
    """
    batch = tuple(inputs)
    ours, ours_loss = _gradient_step(model, loss, batch, seed)
    theirs, theirs_loss = _gradient_step(reference, loss, batch, seed)
    exact = ours_loss.equal(theirs_loss) and all(_equal(ours.get(name), theirs.get(name)) for name in {*ours, *theirs})
    return Comparison(ours_loss.item(), theirs_loss.item(), gradient_error(ours, theirs), exact)


def _gradient_step(
    model: nn.Module, loss: Callable[..., Tensor], batch: tuple[Any, ...], seed: int
) -> tuple[dict[str, Tensor | None], Tensor]:
    model.zero_grad(set_to_none=True)
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        value = loss(model, *batch)
        value.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found, value.detach()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
