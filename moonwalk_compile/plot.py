"""A plan's predicted live bytes over one training step, drawn against plain backpropagation's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .units import format_bytes

if TYPE_CHECKING:
    from .bench import Bench
    from .front import Front
    from .report import Plan

SUFFIXES = (".png", ".pdf", ".svg")
_PLAIN, _PLANNED, _BUDGET, _TEXT = "#9aa3ad", "#1f6fb4", "#c8372d", "#333333"
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))


def check_plot_path(path: str | Path) -> None:
    """Raise UsageError now for what would make `plot_plan` fail later: suffix, folder, matplotlib missing."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise _cannot_plot(f"{str(path)!r} does not end in {', '.join(SUFFIXES)}", "choose one of these formats")
    if not path.parent.is_dir():
        raise _cannot_plot(f"there is no folder {str(path.parent)!r}", "create it, or write somewhere else")
    if path.is_dir():
        raise _cannot_plot(f"{str(path)!r} is a folder", "name a file")
    _figure_class()


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Draw `plan` to `path`. Raises UsageError where that cannot be done."""
    check_plot_path(path)
    if not plan.timeline or not plan.plain_timeline:
        todo = "plot the plan itself, or write it with to_json(timelines=True)"
        raise _cannot_plot("this plan carries no timelines", todo)
    _save(_draw, plan, path)


def plot_front(front: Front, path: str | Path) -> None:
    """Draw `front` to `path`. Raises UsageError where that cannot be done."""
    check_plot_path(path)
    _save(_draw_front, front, path)


def plot_bench(bench: Bench, path: str | Path) -> None:
    """Draw what was measured to `path`. Raises UsageError where that cannot be done."""
    check_plot_path(path)
    _save(_draw_bench, bench, path)


def _save(draw: Callable[[Any, Any], None], subject: Any, path: str | Path) -> None:
    figure = _figure_class()(figsize=(8.5, 4.6), layout="constrained")
    draw(figure.add_subplot(), subject)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise _cannot_plot(f"{path}: {error.strerror or error}", "write somewhere else") from None


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no window and no global state
    except ImportError:
        todo = 'install it: pip install "moonwalk-compile[plot]"'
        raise _cannot_plot("matplotlib is not installed", todo) from None
    return Figure


def _cannot_plot(what: str, todo: str) -> UsageError:
    return UsageError("The plan cannot be plotted", what, todo)


def _draw(axes: Any, plan: Plan) -> None:
    top = max(*plan.timeline, *plan.plain_timeline, plan.peak_bytes, plan.plain_peak_bytes)
    scale, unit = next((s, u) for s, u in _UNITS if top >= s or s == 1)
    _draw_timeline(axes, plan.plain_timeline, plan.plain_forward_length, scale, _PLAIN)
    _draw_timeline(axes, plan.timeline, plan.forward_length, scale, _PLANNED)
    _label_peak(axes, plan.plain_timeline, (plan.plain_peak_bytes, plan.plain_peak_bytes), scale, "plain", _PLAIN)
    _label_peak(axes, plan.timeline, (plan.peak_bytes, _clear_of_budget(plan, top)), scale, "planned", _PLANNED)
    if plan.budget_bytes is not None and plan.budget_bytes <= 1.2 * top:
        axes.axhline(plan.budget_bytes / scale, color=_BUDGET, linewidth=1.2, linestyle=(0, (5, 3)), zorder=4)
    _legend(axes, plan)
    _style(axes, plan, unit, 1.18 * top / scale)


def _draw_timeline(axes: Any, timeline: Sequence[int], forward: int, scale: int, color: str) -> None:
    """A filled staircase over [0, 1], and a dotted line where its backward pass begins."""
    edges = [i / len(timeline) for i in range(len(timeline) + 1)]
    heights = [value / scale for value in timeline]
    axes.stairs(heights, edges, fill=True, color=color, alpha=0.22, linewidth=0)
    axes.stairs(heights, edges, color=color, linewidth=1.6, baseline=None, zorder=3)
    if 0 < forward < len(timeline):
        axes.axvline(forward / len(timeline), color=color, linewidth=1.2, linestyle=":", zorder=2)


def _clear_of_budget(plan: Plan, top: int) -> int:
    """Height in bytes at which the planned peak's label does not sit on the budget line."""
    budget = plan.budget_bytes
    return budget if budget is not None and 0 <= budget - plan.peak_bytes < 0.09 * top else plan.peak_bytes


def _label_peak(
    axes: Any, timeline: Sequence[int], heights: tuple[int, int], scale: int, name: str, color: str
) -> None:
    """A dot at the peak, which may lie within an operation and so above the staircase, and its size above it.

    `heights` are the bytes at the dot and at the foot of the label.
    """
    at = (timeline.index(max(timeline)) + 0.5) / len(timeline)
    axes.plot([at], [heights[0] / scale], "o", color=color, markersize=4.5, zorder=5)
    axes.annotate(
        f"{name} {format_bytes(heights[0])}",
        (at, heights[1] / scale),
        xytext=(0, 7),
        textcoords="offset points",
        ha="right" if at > 0.75 else "left" if at < 0.25 else "center",
        color=_TEXT,
        fontsize=9,
        bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1.5},
        zorder=6,
    )


def _legend(axes: Any, plan: Plan) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=_PLAIN, label="plain backpropagation"), Patch(color=_PLANNED, label="this plan")]
    handles.append(Line2D([], [], color=_TEXT, linestyle=":", label="backward begins"))
    if plan.budget_bytes is not None:
        label = f"budget {format_bytes(plan.budget_bytes)}"
        handles.append(Line2D([], [], color=_BUDGET, linestyle=(0, (5, 3)), label=label))
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _style(axes: Any, plan: Plan, unit: str, top: float) -> None:
    slowdown = f", {plan.time_s / plan.plain_time_s:.2f}x its time" if plan.plain_time_s > 0 else ""
    share = f"{plan.peak_bytes / plan.plain_peak_bytes:.0%} of plain's peak{slowdown}" if plan.plain_peak_bytes else ""
    axes.set_title(f"Predicted memory of one training step: {share}", fontsize=11, loc="left", color=_TEXT)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(top, 1e-9))
    axes.set_xlabel("part of the step's operations", color=_TEXT)
    axes.set_ylabel(f"live memory ({unit})", color=_TEXT)
    axes.grid(axis="y", color="#e3e6e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT)


def _draw_bench(axes: Any, bench: Bench) -> None:
    top = max(max(row.peak_bytes, row.predicted_peak_bytes or 0) for row in bench.rows)
    scale, unit = next((s, u) for s, u in _UNITS if top >= s or s == 1)
    for row, color in zip(bench.rows, _WAYS, strict=False):
        label = f"{row.name}, {format_bytes(row.peak_bytes)}"
        axes.plot(row.peak_bytes / scale, row.time_ratio, "o", color=color, markersize=8, label=label, zorder=4)
        if row.predicted_peak_bytes is not None and row.predicted_time_ratio is not None:
            place = (row.predicted_peak_bytes / scale, row.predicted_time_ratio)
            axes.plot(*place, "o", color=color, markersize=11, fillstyle="none", zorder=3)
    axes.plot([], [], "o", color=_TEXT, markersize=11, fillstyle="none", label="predicted")
    _mark_budget(axes, bench.budget_bytes, top, scale)
    _style_scatter(axes, "Measured peak and time of one training step", top / scale, unit)


def _mark_budget(axes: Any, budget: int | None, top: int, scale: int) -> None:
    if budget is not None and budget <= 1.2 * top:
        label = f"budget {format_bytes(budget)}"
        axes.axvline(budget / scale, color=_BUDGET, linewidth=1.2, linestyle=(0, (5, 3)), label=label)


def _style_scatter(axes: Any, title: str, right: float, unit: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=_TEXT)
    axes.set_xlim(0, 1.08 * right)
    axes.set_xlabel(f"peak memory ({unit})", color=_TEXT)
    axes.set_ylabel("time / plain backpropagation", color=_TEXT)
    axes.grid(color="#e3e6e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _draw_front(axes: Any, front: Front) -> None:
    from .front import CHECKPOINT, MARKS  # with it comes the planner, which the command line loads late

    top = max(point.peak_bytes for point in front.points)
    scale, unit = next((s, u) for s, u in _UNITS if top >= s or s == 1)
    ours = [point for point in front.points if point.label != CHECKPOINT]
    times = [point.time_s / front.plain_time_s for point in ours]
    axes.step(
        [p.peak_bytes / scale for p in ours], times, "o-", where="pre", color=_PLANNED, markersize=4, label="plans"
    )
    for point in front.points:
        if point.label:
            marker, color = _MARKERS[point.label]
            place = (point.peak_bytes / scale, point.time_s / front.plain_time_s)
            text = f"{MARKS[point.label]}, {format_bytes(point.peak_bytes)}"
            axes.plot(*place, marker, color=color, markersize=9, label=text, linestyle="none", zorder=4)
    _mark_budget(axes, front.budget_bytes, top, scale)
    _style_scatter(axes, "Predicted peak and time of one training step", top / scale, unit)


_MARKERS = {"plain": ("s", _PLAIN), "checkpoint": ("^", "#d98b1f"), "budget": ("D", _BUDGET)}
_WAYS = (_PLAIN, "#d98b1f", "#8c6bb1", "#4d9a6a", _PLANNED)
