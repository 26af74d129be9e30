"""What a plan says about itself: `Plan` and its `Segment`s, as JSON and as a table. Drawing is in `plot.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import UsageError
from .table import format_plan

_CONTRACT = ("peak_bytes", "plain_peak_bytes", "time_s", "plain_time_s", "segments", "budget_bytes")
_TIMELINES = ("timeline", "plain_timeline")


@dataclass(frozen=True)
class Segment:
    """A run of blocks of the model that is treated by one strategy.

    Attributes:
        name: what the user can recognise, such as the module's path.
        strategy: "keep", "checkpoint", "invert" or "moonwalk".
        first, last: names of its first and last operation in the joint graph.
        kept_bytes: what it keeps from the forward pass for the backward pass.
        time_s: predicted seconds of its forward and backward.
        error: predicted relative error of its parameter gradients; 0.0 is exact, None is not known yet.
        reason: why this strategy.
        blocks: how many blocks it spans.
        provisional: True while `error`, or the choice itself, awaits calibration on real values.
    """

    name: str
    strategy: str
    first: str
    last: str
    kept_bytes: int
    time_s: float
    error: float | None
    reason: str
    blocks: int = 1
    provisional: bool = False


@dataclass(frozen=True)
class Plan:
    """The memory plan of one training step. All bytes exclude parameters, buffers, inputs and optimizer state.

    Attributes:
        peak_bytes, plain_peak_bytes: predicted peak of the plan, and of plain backpropagation.
        time_s, plain_time_s: predicted seconds per step.
        segments: in forward order.
        budget_bytes: the bound on the peak, or None.
        device, lowering: what the prediction is for.
        parameter_bytes, buffer_bytes, input_bytes: what is there before the step, outside the peak.
        notes: warnings and remarks.
        timeline, plain_timeline: bytes alive after each operation of a step.
        forward_length, plain_forward_length: index in the timelines where backward begins.
        planning_s: seconds that planning took.
        profile: how times were predicted, "model" or "measure".
        measured_peak_bytes: what the first two steps held (the smaller of both), once they have run.
    """

    peak_bytes: int
    plain_peak_bytes: int
    time_s: float
    plain_time_s: float
    segments: tuple[Segment, ...]
    budget_bytes: int | None = None
    device: str = "cpu"
    lowering: str = "inductor"
    parameter_bytes: int = 0
    buffer_bytes: int = 0
    input_bytes: int = 0
    notes: tuple[str, ...] = ()
    timeline: tuple[int, ...] = ()
    plain_timeline: tuple[int, ...] = ()
    forward_length: int = 0
    plain_forward_length: int = 0
    planning_s: float = 0.0
    profile: str = "model"
    measured_peak_bytes: int | None = None

    def __str__(self) -> str:
        return format_plan(self)

    def to_json(self, *, timelines: bool = False, indent: int | None = 2) -> str:
        """The plan under the names of its attributes; the (long) timelines only on request."""
        values = asdict(self)
        if not timelines:
            values = {key: value for key, value in values.items() if key not in _TIMELINES}
        return json.dumps(_finite(values), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`; unknown keys are ignored. Raises UsageError if `text` is not a plan."""
        try:
            values = json.loads(text)
            missing = [key for key in _CONTRACT if key not in values]
            if missing:
                raise ValueError(f"without {', '.join(missing)}")
            segments = tuple(Segment(**_known(Segment, segment)) for segment in values["segments"])
            return cls(**{**_known(cls, values), "segments": segments})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError("Not a plan", str(error), "pass what Plan.to_json() returned") from None

    def plot(self, path: str | Path) -> None:
        """Draw predicted live bytes over the step, plain and planned, to `path` (.png, .pdf or .svg).

        Raises UsageError if matplotlib is missing, the path cannot be written, or the plan carries no timelines.
        """
        from .plot import plot_plan

        plot_plan(self, path)


def _known(cls: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in names}


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null there."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
