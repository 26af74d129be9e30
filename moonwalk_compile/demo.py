"""`moonwalk demo`: the main job on an unmodified model, measured against what the plan predicted."""

from __future__ import annotations

import copy
import os
import shutil
import time
from typing import cast

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .api import moonwalk_compile
from .measure import gradient_error, gradients, measure_step, time_interleaved
from .report import Plan
from .units import format_bytes, format_seconds


class Half(nn.Module):
    """LayerNorm, Linear, GELU, Linear: one half of a coupling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class Coupled(nn.Module):
    """An ordinary reversible residual network: it returns its loss and knows nothing of this package."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.left = nn.ModuleList(Half(width) for _ in range(depth))
        self.right = nn.ModuleList(Half(width) for _ in range(depth))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        for left, right in zip(self.left, self.right, strict=True):
            a = a + left(b)
            b = b + right(a)
        return nn.functional.mse_loss(torch.cat([a, b], dim=-1), target)


def main() -> int:
    """Compile, compare with plain training, print the plan. Returns the exit status: 0 when all of it holds."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler reports its own starting and stopping
    torch.manual_seed(0)
    lowering = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "eager"
    plain = Coupled(depth=16, width=128)
    inputs = (torch.randn(8, 256, 256), torch.randn(8, 256, 256))
    model = copy.deepcopy(plain)
    print(f"A reversible network of 32 halves, unmodified, {lowering} lowering. Compiling ...\n")
    started = time.perf_counter()
    model = moonwalk_compile(model, lowering=lowering)
    plain.compile(backend=lowering if lowering == "inductor" else "aot_eager")
    _step(model, inputs)
    compiled = time.perf_counter() - started
    _step(plain, inputs)
    print(model.plan, "\n")
    return _report(plain, model, inputs, compiled)


def _step(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model(*inputs).backward()


def _report(plain: nn.Module, model: nn.Module, inputs: tuple[Tensor, Tensor], compiled: float) -> int:
    error = gradient_error(gradients(model), gradients(plain))
    timings = time_interleaved({"plain": lambda: _step(plain, inputs), "ours": lambda: _step(model, inputs)})
    peaks = {}
    for name, module in (("plain", plain), ("ours", model)):
        module.zero_grad(set_to_none=True)
        peaks[name] = measure_step(lambda module=module: _step(module, inputs)).peak_bytes  # type: ignore[misc]
    plan = cast(Plan, model.plan)
    rows = [
        ["peak, plain", format_bytes(peaks["plain"]), format_bytes(plan.plain_peak_bytes)],
        ["peak, compiled", format_bytes(peaks["ours"]), format_bytes(plan.peak_bytes)],
        [
            "peak, plain / compiled",
            f"{peaks['plain'] / peaks['ours']:.1f}",
            f"{plan.plain_peak_bytes / plan.peak_bytes:.1f}",
        ],
        ["step time, plain", format_seconds(timings["plain"].seconds), format_seconds(plan.plain_time_s)],
        ["step time, compiled / plain", f"{timings['ours'].ratio:.2f}", f"{plan.time_s / plan.plain_time_s:.2f}"],
        ["gradient error", f"{error:.1e}", f"{max((s.error or 0.0) for s in plan.segments):.1e}"],
    ]
    print(tabulate(rows, headers=["", "measured", "predicted"], disable_numparse=True))
    print(f"\ncompiled in {compiled:.0f} s")
    good = peaks["ours"] < peaks["plain"] / 4 and error < 1e-5
    print("The demo holds." if good else "The demo does NOT hold: please report this output.")
    return 0 if good else 1
