"""The table that a plan prints: one row per run of identical segments, then the totals."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from tabulate import tabulate

from .units import format_bytes, format_seconds

if TYPE_CHECKING:
    from .report import Plan, Segment

_HEADERS = ("segment", "blocks", "strategy", "kept", "time", "error", "reason")
_ALIGN = ("left", "left", "left", "right", "right", "right", "left")
_REASON_WIDTH = 44


def format_plan(plan: Plan) -> str:
    """The whole report as text, without a newline at its end."""
    parts = [_segment_table(plan.segments), _totals(plan), _footer(plan)]
    return "\n\n".join(part for part in parts if part)


def _segment_table(segments: tuple[Segment, ...]) -> str:
    if not segments:
        return "no segments"
    rows = []
    block = 0
    for _, group in itertools.groupby(segments, key=_looks):
        run = list(group)
        count = sum(segment.blocks for segment in run)
        rows.append(_row(run, block, block + count - 1))
        block += count
    widths = [None] * (len(_HEADERS) - 1) + [_REASON_WIDTH]
    return tabulate(rows, _HEADERS, disable_numparse=True, colalign=_ALIGN, maxcolwidths=widths)


def _looks(segment: Segment) -> tuple[object, ...]:
    """Neighbours that agree in this are one row."""
    provisional = segment.provisional or segment.error is None
    return segment.strategy, segment.kept_bytes, segment.reason, segment.blocks, provisional


def _row(run: list[Segment], first_block: int, last_block: int) -> tuple[str, ...]:
    """Bytes and seconds are the run's sums; the error is its largest."""
    name = run[0].name if len(run) == 1 else f"{fold_names(run[0].name, run[-1].name)}  x{len(run)}"
    return (
        name,
        str(first_block) if first_block >= last_block else f"{first_block}-{last_block}",
        run[0].strategy,
        format_bytes(sum(segment.kept_bytes for segment in run)),
        format_seconds(sum(segment.time_s for segment in run)),
        _format_error(run),
        run[0].reason,
    )


def fold_names(first: str, last: str) -> str:
    """One name for a run: ("layers.3.mlp", "layers.62.mlp") -> "layers.3-62.mlp", ("a", "b") -> "a .. b"."""
    a, b = (re.split(r"([0-9]+)", name) for name in (first, last))
    if len(a) == len(b):
        differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        if len(differing) == 1 and differing[0] % 2 == 1:  # odd places hold the numbers
            i = differing[0]
            return "".join([*a[:i], f"{a[i]}-{b[i]}", *a[i + 1 :]])
    return first if first == last else f"{first} .. {last}"


def _format_error(run: list[Segment]) -> str:
    errors = [segment.error for segment in run if segment.error is not None]
    if len(errors) < len(run):
        return "provisional"
    text = f"{max(errors):.1e}" if any(errors) else "exact"
    return f"{text} (provisional)" if run[0].provisional else text


def _totals(plan: Plan) -> str:
    rows = [
        ("peak", format_bytes(plan.plain_peak_bytes), format_bytes(plan.peak_bytes)),
        ("step time", format_seconds(plan.plain_time_s), format_seconds(plan.time_s)),
    ]
    ratios = [_ratio(plan.peak_bytes, plan.plain_peak_bytes), _ratio(plan.time_s, plan.plain_time_s)]
    table = [(*row, ratio) for row, ratio in zip(rows, ratios, strict=True)]
    return tabulate(
        table, ("", "plain", "planned", "planned / plain"), disable_numparse=True, colalign=("left", *["right"] * 3)
    )


def _ratio(planned: float, plain: float) -> str:
    return f"{planned / plain:.2f}" if plain > 0 else "-"


def _footer(plan: Plan) -> str:
    rows = [
        ("budget", _budget(plan)),
        ("not in the peak", _standing(plan)),
        ("predicted for", _circumstances(plan)),
        *([("measured", _measured(plan))] if plan.measured_peak_bytes is not None else []),
        *(("note", note) for note in plan.notes),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _budget(plan: Plan) -> str:
    if plan.budget_bytes is None:
        return "none (the smallest peak within the allowed slowdown)"
    spare = plan.budget_bytes - plan.peak_bytes
    verdict = f"met, {format_bytes(spare)} to spare" if spare >= 0 else f"EXCEEDED by {format_bytes(-spare)}"
    return f"{format_bytes(plan.budget_bytes)}: {verdict}"


def _circumstances(plan: Plan) -> str:
    timed = ", operations timed" if plan.profile == "measure" else ""
    return f"{plan.device}, {plan.lowering} lowering{timed}; planned in {format_seconds(plan.planning_s)}"


def _measured(plan: Plan) -> str:
    assert plan.measured_peak_bytes is not None
    return f"a peak of {format_bytes(plan.measured_peak_bytes)} in the first steps"


def _standing(plan: Plan) -> str:
    sizes = {"parameters": plan.parameter_bytes, "buffers": plan.buffer_bytes, "inputs": plan.input_bytes}
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
