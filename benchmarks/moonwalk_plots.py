"""Peak and time against depth, one picture for each case that has several depths or several algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from moonwalk_cases import OURS, PLAIN, Point, Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_results(results: Mapping[str, Result], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        if len({point.depth for point in result.points}) > 1:
            plot_depths(name, result, folder / f"{name}.png")
        elif name.startswith("algorithms"):
            plot_algorithms(name, result, folder / f"{name}.png")


def plot_depths(name: str, result: Result, path: Path) -> None:
    """Peak, time and, where it was measured, the gradients' error."""
    plain = [point for point in result.points if point.variant == PLAIN]
    ours = [point for point in result.points if point.variant == OURS]
    known = [point for point in ours if point.error is not None]
    figure, panels = plt.subplots(1, 3 if known else 2, figsize=(14 if known else 10, 4.5), layout="constrained")
    peaks, times = panels[:2]
    depths = [point.depth for point in ours]
    peaks.plot(depths, [_mib(point) for point in ours], "o-", label="moonwalk_compile")
    peaks.plot(depths, [(point.gradients or 0) / 2**20 for point in ours], ":", label="of it gradients, at least")
    times.plot(depths, [point.seconds for point in ours], "o-", label="moonwalk_compile")
    for point in plain:
        peaks.axhline(_mib(point), color="tab:gray", ls="--", label=f"plain at depth {point.depth}")
        per_layer = (point.seconds or 0) / point.depth
        label = f"plain's at depth {point.depth}, in proportion"
        times.plot(depths, [per_layer * depth for depth in depths], color="tab:gray", ls="--", label=label)
    if known:
        panels[2].plot([point.depth for point in known], [max(point.error or 0, 1e-9) for point in known], "o-")
        panels[2].set_yscale("log")
        panels[2].set_ylabel("relative gradient error")
    peaks.set_ylabel("measured peak (MiB)")
    times.set_ylabel("seconds of one step")
    for axes in panels:
        axes.set_xlabel("depth")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    times.set_yscale("log")
    peaks.set_ylim(bottom=0)
    for axes in (peaks, times):
        axes.legend(frameon=False)
    figure.suptitle(name)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_algorithms(name: str, result: Result, path: Path) -> None:
    points = [point for point in result.points if point.seconds is not None]
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    bars = axes.barh([point.variant for point in points], [1000 * (point.seconds or 0) for point in points])
    labels = ["" if point.peak is None else f" {_mib(point):.1f} MiB" for point in points]
    axes.bar_label(bars, labels)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds of one gradient, and the measured peak")
    axes.invert_yaxis()
    axes.set_title(name)
    axes.margins(x=0.2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _mib(point: Point) -> float:
    return (point.peak or 0) / 2**20
