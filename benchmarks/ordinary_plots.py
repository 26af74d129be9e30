"""Peak against time, one picture for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from ordinary_runs import Figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = {"plain": ("s", "tab:gray"), "checkpoint": ("^", "tab:orange"), "selective": ("v", "tab:green")}


def plot_models(figures: Sequence[Figure], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(figure.model for figure in figures):
        rows = [figure for figure in figures if figure.model == name]
        plot_model(rows, folder / f"{name}-{rows[0].lowering}.png")


def plot_model(rows: Sequence[Figure], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    ours = sorted((row for row in rows if row.budget is not None and not row.against), key=lambda row: row.peak)
    axes.plot([r.peak / 2**20 for r in ours], [r.time_ratio for r in ours], "o-", label="moonwalk_compile", zorder=3)
    budgets = sorted((row for row in rows if row.name.startswith("torch ")), key=lambda row: row.name)
    axes.plot(
        *([r.peak / 2**20 for r in budgets], [r.time_ratio for r in budgets], "x--"),
        label="torch's activation_memory_budget 0.1 to 0.7",
        color="tab:red",
    )
    for row in rows:
        if row.name in MARKERS:
            marker, color = MARKERS[row.name]
            place = (row.peak / 2**20, row.time_ratio)
            axes.plot(*place, marker, color=color, label=row.name, markersize=9, linestyle="none")
    axes.set_xlabel("measured peak (MiB)")
    axes.set_ylabel("time of a step / plain")
    axes.set_title(f"{rows[0].model}, {rows[0].lowering} lowering")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
