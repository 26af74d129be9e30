"""The whole front of a model: predicted peak against predicted time, as a table, JSON and a picture."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from .describe import module_path
from .units import format_bytes, format_seconds

if TYPE_CHECKING:
    from .passes.emit import Segment
    from .passes.plan import Planner
    from .passes.planned import Planned

PLAIN, CHECKPOINT, BUDGET = "plain", "checkpoint", "budget"
MARKS = {PLAIN: "plain backpropagation", CHECKPOINT: "each block checkpointed", BUDGET: "the budget"}


@dataclass(frozen=True)
class Point:
    """One plan: bytes, seconds, and how many segments each strategy has. `label` is of MARKS, or None."""

    peak_bytes: int
    time_s: float
    strategies: Mapping[str, int]
    label: str | None = None


@dataclass(frozen=True)
class Front:
    """The plans of one model from plain backpropagation down to the smallest reachable peak.

    `points` fall in peak and rise in time, but for those that carry a label.
    """

    device: str
    lowering: str
    plain_peak_bytes: int
    plain_time_s: float
    points: tuple[Point, ...]
    budget_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        headers = ("peak", "/ plain", "time", "/ plain", "segments", "")
        table = tabulate(
            [self._row(point) for point in self.points],
            headers,
            disable_numparse=True,
            colalign=("right", "right", "right", "right", "left", "left"),
        )
        footer = [f"predicted for {self.device}, {self.lowering} lowering", *self.notes]
        return "\n\n".join([table, "\n".join(footer)])

    def _row(self, point: Point) -> tuple[str, ...]:
        return (
            format_bytes(point.peak_bytes),
            f"{point.peak_bytes / self.plain_peak_bytes:.2f}",
            format_seconds(point.time_s),
            f"{point.time_s / self.plain_time_s:.2f}",
            ", ".join(f"{strategy} {count}" for strategy, count in point.strategies.items()),
            MARKS[point.label] if point.label else "",
        )

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(asdict(self), indent=indent, allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draw the front to `path` (.png, .pdf or .svg). Raises UsageError where that cannot be done."""
        from .plot import plot_front

        plot_front(self, path)


def points_of(planners: Sequence[Planner], count: int, budget: int | None = None) -> Iterator[Point]:
    """At least plain and the smallest; `count` budgets in even ratios between them, each met by the fastest plan.

    The first planner is that of the graph as it was captured; others are of the same step.
    """
    plain, smallest = planners[0].plain, min((p.smallest() for p in planners), key=lambda planned: planned.peak)
    yield as_point(plain, PLAIN)
    by_hand = checkpoint_by_hand(planners[0])
    if by_hand is not None:
        yield as_point(by_hand, CHECKPOINT)
    if budget is not None and (chosen := fastest_within(planners, budget)) is not None:
        yield as_point(chosen, BUDGET)
    ratio = smallest.peak / plain.peak
    for position in range(1, count - 1):
        planned = fastest_within(planners, plain.peak * ratio ** (position / (count - 1)))
        if planned is not None:
            yield as_point(planned)
    yield as_point(smallest)


def fastest_within(planners: Sequence[Planner], budget: float) -> Planned | None:
    found = [planned for planner in planners if (planned := planner.within(budget)) is not None]
    return min(found, key=lambda planned: planned.seconds, default=None)


def as_point(planned: Planned, label: str | None = None) -> Point:
    counts = Counter(segment.strategy for segment in planned.segments)
    return Point(planned.peak, planned.seconds, dict(sorted(counts.items())), label)


def undominated(points: Iterable[Point]) -> tuple[Point, ...]:
    """In falling peak; without what is neither smaller nor faster than another, but for labelled points."""
    ordered = sorted(set_of(points), key=lambda point: (point.peak_bytes, point.time_s))
    kept, fastest = [], float("inf")
    for point in ordered:
        if point.label or point.time_s < fastest:
            kept.append(point)
        if point.label != CHECKPOINT:
            fastest = min(fastest, point.time_s)
    return tuple(reversed(kept))


def set_of(points: Iterable[Point]) -> list[Point]:
    """Each plan once; the labelled one of equals."""
    best: dict[tuple[int, float], Point] = {}
    for point in sorted(points, key=lambda point: point.label or "", reverse=True):
        best.setdefault((point.peak_bytes, point.time_s), point)
    return list(best.values())


def checkpoint_by_hand(planner: Planner) -> Planned | None:
    """What torch.utils.checkpoint around each repeated module (`blocks.3`) would do; None if no module repeats."""
    groups = [repeated_module(module_path(planner.analysis, index)) for index in range(len(planner.analysis.blocks))]
    if not any(groups):
        return None
    return planner.arranged(_by_group(planner, groups))


def repeated_module(path: str) -> str:
    """The path up to its first number: "model.layers.3.mlp" -> "model.layers.3"; empty without a number."""
    found = re.match(r"(?:.*?\.)?[0-9]+(?=\.|$)", path)
    return found[0] if found else ""


def _by_group(planner: Planner, groups: Sequence[str]) -> Iterator[Segment]:
    first = 0
    for index, group in enumerate(groups):
        if index + 1 < len(groups) and group and groups[index + 1] == group:
            continue
        if group:
            yield planner.maker.checkpoints.segment(first, index)
        else:
            yield from (planner.maker.keeping.plain(block) for block in range(first, index + 1))
        first = index + 1
