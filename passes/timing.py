"""Operations timed on the device at hand: all with `profile="measure"`, otherwise large convolutions on a CPU.

Each distinct call (operation, shapes, strides, types) runs a few times on made-up values. With `profile="measure"` what
was found is remembered on disk, by device and torch release, so that the next plan of the same blocks is made without
running anything. Large convolutions are always timed: their times depend on layouts, groups and the sizes of images in
ways that no rate describes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ._torch_compat_inductor import disable_current_modes, tree_leaves
from .graph import Call, Operation
from .layout import CONVOLUTIONS, laid_out
from .trials import Like, made_up, may_be_tried

SPENT_S = 0.05  # on one call, after a first run that does not count;
SPENT_IN_ALL_S = 4.0  # where nobody asked for measurements, all calls: further ones then run twice
MOST_RUNS = 7
METHOD = 2  # raised where what is measured changes: earlier figures on disk are then not read
IN_A_ROW_S, MOST_IN_A_ROW = 2e-3, 50  # runs between two looks at a device that works on its own
# Floating-point operations. What takes less is mostly the call's overhead, and that would decide about memory: of the
# ways through a block's spine one is chosen, and bytes that wait for the sweep have a fixed price in seconds.
WORTH_TIMING = 1e7
OURS = ("aten", "prims", "moonwalk_compile")  # others may do more than compute


class Clock:
    """Seconds of an operation, by trial; None for what is not tried, which then counts by the device's table.

    With `fused` (Inductor) pointwise operations are not timed: alone they would take several times what they take
    in a fused loop. And images are laid out as there. `limit` bounds the bytes of the operands of what is tried. What
    was found is remembered in `folder`; without one only convolutions of some size are timed.
    """

    def __init__(self, *, fused: bool, limit: float = math.inf, folder: Path | None = None) -> None:
        self.fused, self.limit, self.folder = fused, limit, folder
        self.found: dict[str, float | None] = {}
        self.known: dict[tuple[int, bool], tuple[Call, float | None]] = {}
        self.new, self.spent_s = 0, 0.0
        self.bar = tqdm(desc="timing operations", unit="", leave=False, disable=None if folder else True)
        self.loaded = False

    def __call__(self, operation: Operation, as_plain: bool = False) -> float | None:
        """With `as_plain` as plain `torch.compile` lays it out."""
        call = operation.call
        if call is None or getattr(call[0], "namespace", None) not in OURS:
            return None
        if self.folder is None and (call[0] not in CONVOLUTIONS or operation.flops < WORTH_TIMING):
            return None
        if self.fused and torch.Tag.pointwise in call[0].tags:
            return None
        if (id(call), as_plain) not in self.known:
            called = laid_out(call, as_plain) if self.fused else call
            self.known[id(call), as_plain] = (call, self._look_up(called))
        return self.known[id(call), as_plain][1]

    def save(self) -> None:
        """Write what was measured to disk; where that is not possible it is measured again next time."""
        self.bar.close()
        if not self.new or self.folder is None:
            return
        path, self.new = self._path(self.folder), 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            merged = {**read(path), **{key: value for key, value in self.found.items() if value is not None}}
            with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
                json.dump(merged, file)
            os.replace(file.name, path)
        except OSError:
            return

    def _look_up(self, call: Call) -> float | None:
        if self.folder is not None and not self.loaded:
            self.found, self.loaded = dict(read(self._path(self.folder))), True
        key = hashlib.sha256(repr((str(call[0]), *call[1:])).encode()).hexdigest()[:32]
        if key not in self.found:
            hurried = self.folder is None and self.spent_s > SPENT_IN_ALL_S
            started = time.perf_counter()
            self.found[key] = measured_seconds(call, self.limit, hurried)
            self.spent_s += time.perf_counter() - started
            self.new += 1
            self.bar.update()
        return self.found[key]

    def _path(self, folder: Path) -> Path:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
        text = f"{name} {torch.get_num_threads()} {torch.__version__} {METHOD}"
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def read(path: Path) -> dict[str, float | None]:
    """What was measured before; nothing, where the file is missing or no good."""
    try:
        values = json.loads(path.read_text())
        return {str(key): float(value) for key, value in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def cache_folder() -> Path:
    """MOONWALK_CACHE_DIR, or the user's cache folder."""
    given = os.environ.get("MOONWALK_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moonwalk_compile"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measured_seconds(call: Call, limit: float = math.inf, hurried: bool = False) -> float | None:
    """The median time of a call on made-up values, or None; if `hurried`, of a single run. Each is timed once in a
    process."""
    likes = [item for item in tree_leaves(call[1:]) if isinstance(item, Like)]
    if not may_be_tried(call[0]) or not likes or sum(like.bytes for like in likes) > limit:
        return None
    return _measured(call, likes[0].device, torch.get_num_threads(), hurried)


@cache
def _measured(call: Call, device: torch.device, threads: int, hurried: bool) -> float | None:
    with disable_current_modes(), torch.no_grad(), torch.random.fork_rng():
        try:
            args, kwargs = made_up(*call)
            run: Callable[[], Any] = lambda: call[0](*args, **kwargs)  # noqa: E731
            timed(run, device)
            first = timed(run, device)
            count = 1 if device.type == "cpu" else max(1, min(MOST_IN_A_ROW, int(IN_A_ROW_S / max(first, 1e-6))))
            more = 0 if hurried else min(MOST_RUNS, int(SPENT_S / max(count * first, 1e-6)))
            runs = [timed(in_a_row(run, count), device) / count for _ in range(more)]
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
    return statistics.median(runs or [first])


def in_a_row(run: Callable[[], Any], count: int) -> Callable[[], None]:
    """A device is waited for once: what it takes to reach it is not what an operation takes within a step."""

    def several() -> None:
        for _ in range(count):
            run()

    return several


def timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
