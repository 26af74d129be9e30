"""`moonwalk bench`: a model's training step as planned, measured beside plain, checkpoints and torch's own budget."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from . import peers
from .api import Build, first_line, moonwalk_compile, planned_session
from .errors import UsageError
from .front import checkpoint_by_hand
from .inputs import Arguments
from .measure import Comparison, compare_steps, measure_step, time_interleaved
from .options import Options
from .outputs import Wanted, loss_in
from .passes._torch_compat import tree_flatten
from .units import format_bytes, format_seconds

TORCH_BUDGETS = (0.5, 0.1)


@dataclass(frozen=True)
class Row:
    """One way of training: bytes and seconds of a step, measured and (where a plan says it) predicted.

    `time_ratio` and `predicted_time_ratio` are relative to plain; `gradient_error` too.
    """

    name: str
    peak_bytes: int
    predicted_peak_bytes: int | None
    time_s: float
    time_ratio: float
    predicted_time_ratio: float | None
    gradient_error: float


@dataclass(frozen=True)
class Bench:
    device: str
    lowering: str
    rows: tuple[Row, ...]
    budget_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        headers = ("", "peak", "predicted", "off by", "step time", "/ plain", "predicted", "gradient error")
        table = tabulate(
            [self._row(row) for row in self.rows], headers, disable_numparse=True, colalign=("left", *["right"] * 7)
        )
        budget = [] if self.budget_bytes is None else [f"budget {format_bytes(self.budget_bytes)}"]
        footer = [*budget, f"measured on {self.device}, {self.lowering} lowering", *self.notes]
        return "\n\n".join([table, "\n".join(footer)])

    def _row(self, row: Row) -> tuple[str, ...]:
        predicted, ratio = row.predicted_peak_bytes, row.predicted_time_ratio
        return (
            row.name,
            format_bytes(row.peak_bytes),
            "-" if predicted is None else format_bytes(predicted),
            "-" if predicted is None else f"{predicted / max(row.peak_bytes, 1) - 1:+.1%}",
            format_seconds(row.time_s),
            f"{row.time_ratio:.2f}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row.gradient_error:.1e}" if row.gradient_error else "exact",
        )

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(asdict(self), indent=indent)

    def plot(self, path: str | Path) -> None:
        """Draw peaks and times to `path` (.png, .pdf or .svg). Raises UsageError where that cannot be done."""
        from .plot import plot_bench

        plot_bench(self, path)


@dataclass(frozen=True)
class _Way:
    name: str
    model: nn.Module
    peak: int | None = None
    ratio: float | None = None


def scalar_loss(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """The model's own loss if it returns one, else the mean square of all floating-point tensors that it returns."""
    result = model(*inputs, **named)
    loss = loss_in(result)
    if loss is not result and isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum()
    leaves = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not leaves:
        raise UsageError("Nothing to train", "the model returns nothing that requires a gradient", "return a loss")
    if len(leaves) == 1 and leaves[0].dim() == 0:
        return leaves[0]
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


def bench_model(build: Build, options: Options, device: str, outputs: Wanted | None = None, repeats: int = 7) -> Bench:
    """Build the model for real and measure its training step in every way. Raises BudgetError as compiling does."""
    place = _place(device)
    torch.manual_seed(0)
    model, inputs = build()
    model = model.to(place).train()
    given = Arguments.of(inputs).to(place)
    notes: list[str] = []
    ways: list[_Way] = []
    with peers.same_random_numbers(options.lowering):
        with tqdm(desc="compiling", leave=False, disable=None) as bar:
            for way in _ways(model, given, options, outputs, notes):
                ways.append(way)
                bar.update()
        rows = _measured(ways, given, place, repeats)
    plan: Any = ways[-1].model.plan
    return Bench(device, options.lowering, rows, plan.budget_bytes, (*notes, *plan.notes))


def _place(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        todo = "leave out --device to measure on the CPU; moonwalk plan predicts for any device"
        raise UsageError("Nothing can be measured", f"there is no {device} on this machine", todo)
    return torch.device("cuda")


def _ways(
    model: nn.Module, given: Arguments, options: Options, outputs: Wanted | None, notes: list[str]
) -> Iterator[_Way]:
    """Ours comes last. Each has run once, under its own settings."""
    planner = planned_session(model, given, replace(options, budget=None)).planner
    assert planner is not None
    graph, expected = planner.analysis.graph, planner.plain
    if all(graph.values[value].shape for value in graph.output_values):
        notes.append("the loss is outside the model: predictions leave it out")
    yield _Way("plain", _started(peers.plain(model, options.lowering), given), expected.peak, 1.0)
    by_hand, checkpointed = checkpoint_by_hand(planner), peers.checkpointed(model)
    if by_hand is None or checkpointed is None:
        notes.append("no module repeats: nothing to checkpoint by hand")
    else:
        try:
            trained = _started(peers.compiled(checkpointed, options.lowering), given)
        except Exception as error:
            notes.append(f"checkpoint runs uncompiled; compiled: {first_line(error)}")
            fallback = peers.checkpointed(model)
            assert fallback is not None
            trained = _started(fallback, given)
        yield _Way("each block checkpointed", trained, by_hand.peak, by_hand.seconds / expected.seconds)
    for part in TORCH_BUDGETS:
        try:
            with peers.torch_budget(part):
                trained = _started(peers.under_torch_budget(model, options.lowering), given)
        except Exception as error:
            notes.append(f"torch's budget {part} does not run: {first_line(error)}")
        else:
            yield _Way(f"torch's budget {part}", trained)
    ours = moonwalk_compile(
        copy.deepcopy(model),
        budget=options.budget,  # type: ignore[arg-type]
        outputs=outputs,
        **{name: getattr(options, name) for name in ("max_slowdown", "strategies", "tolerance", "lowering", "profile")},
    )
    plan: Any = _started(ours, given).plan
    if plan is None:
        raise UsageError("Nothing to compare", "the model could not be compiled", "see the warning above")
    yield _Way("moonwalk", ours, plan.peak_bytes, plan.time_s / plan.plain_time_s)


def _loss(model: nn.Module, given: Arguments) -> Tensor:
    return scalar_loss(model, *given.args, **given.kwargs)


def _started(model: nn.Module, given: Arguments) -> nn.Module:
    _loss(model, given).backward()
    model.zero_grad(set_to_none=True)
    return model


def _measured(ways: Sequence[_Way], given: Arguments, place: torch.device, repeats: int) -> tuple[Row, ...]:
    def step_of(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            _loss(model, given).backward()

        return step

    steps = {way.name: step_of(way.model) for way in ways}
    peaks: dict[str, int] = {}
    errors: dict[str, Comparison] = {}
    for way in tqdm(ways, desc="measuring", leave=False, disable=None):
        for _ in range(2):
            steps[way.name]()
        way.model.zero_grad(set_to_none=True)
        peaks[way.name] = measure_step(steps[way.name], device=place).peak_bytes
        errors[way.name] = compare_steps(way.model, ways[0].model, _loss, [given])
    times = time_interleaved(steps, repeats=repeats, device=place)
    return tuple(
        Row(
            *(way.name, peaks[way.name], way.peak, times[way.name].seconds, times[way.name].ratio, way.ratio),
            errors[way.name].gradient_error,
        )
        for way in ways
    )
