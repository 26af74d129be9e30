"""One ordinary model against its peers: plain, checkpoints by hand, torch's own budget, and ours at many budgets."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from main_job_runs import Variant
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from examples.ordinary import build, loss
from moonwalk_compile import BudgetError, moonwalk_compile, peers
from moonwalk_compile.api import first_line
from moonwalk_compile.measure import compare_steps, time_interleaved

aten = torch.ops.aten
EXPENSIVE = [
    *(aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default),
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
TORCH_BUDGETS = (0.7, 0.5, 0.3, 0.1)


@dataclass
class Figure:
    """What one variant of one model took. Bytes; times relative to plain's in the same lowering, and seconds.

    `budget` and the predictions are of ours; `against` names the peer whose measured peak was the budget, and then
    `against_ratio` is the time relative to that peer's. `time_interval` and `against_floor` are the 95% interval of the
    one ratio and the lower end of the other's: only what lies above a bar with those is above it beyond noise.
    """

    model: str
    lowering: str
    name: str
    peak: int
    time_ratio: float
    gradients: int
    seconds: float = 0.0
    budget: int | None = None
    predicted: int | None = None
    predicted_ratio: float | None = None
    planning_s: float | None = None
    exact: bool | None = None
    error: float | None = None
    against: str = ""
    against_ratio: float | None = None
    time_interval: tuple[float, float] = (1.0, 1.0)
    against_floor: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def keep_expensive() -> Any:
    return create_selective_checkpoint_contexts(EXPENSIVE)


def variants_of_peers(name: str, base: nn.Module, inputs: Any, lowering: str) -> Iterator[tuple[str, Variant]]:
    """Plain first. Each has run once, so that it is compiled under its own settings."""
    yield "plain", started(peers.plain(base, lowering), inputs)
    for title, context in (("checkpoint", None), ("selective", keep_expensive)):
        try:
            yield title, started(peers.compiled(checkpointed(base, context), lowering), inputs)
        except Exception as error:
            print(f"{name}: {title} runs uncompiled; compiled: {first_line(error)}")
            yield title, started(checkpointed(base, context), inputs)
    for part in TORCH_BUDGETS:
        try:
            with peers.torch_budget(part):
                variant = started(peers.under_torch_budget(base, lowering), inputs)
        except Exception as error:
            print(f"{name}: torch's budget {part} does not run: {first_line(error)}")
        else:
            yield f"torch {part}", variant


def checkpointed(base: nn.Module, context: Callable[[], Any] | None) -> nn.Module:
    """Selective: results of expensive operations are kept."""
    found = peers.checkpointed(base, context)
    assert found is not None
    return found


def started(model: nn.Module, inputs: Any) -> Variant:
    variant = Variant(model, loss, inputs)
    variant.step()
    return variant


def ours(base: nn.Module, inputs: Any, lowering: str, budget: int) -> Variant:
    return started(moonwalk_compile(copy.deepcopy(base), budget=budget, lowering=lowering), inputs)


def smallest(base: nn.Module, inputs: Any, lowering: str) -> int:
    try:
        ours(base, inputs, lowering, 1)
    except BudgetError as error:
        return error.smallest_peak_bytes
    raise AssertionError("a budget of one byte was met")


def measure_model(
    name: str, lowering: str, scale: str, budgets: int, repeats: int, device: str = "cpu"
) -> list[Figure]:
    torch.manual_seed(0)
    base, inputs = build(name, scale)
    base, inputs = base.to(device), tuple(value.to(device) for value in inputs)
    gradients = sum(p.numel() * p.element_size() for p in base.parameters() if p.requires_grad)
    with peers.same_random_numbers(lowering):
        found = dict(variants_of_peers(name, base, inputs, lowering))
        peaks = {title: variant.peak() for title, variant in found.items()}
        low = smallest(base, inputs, lowering)
        high = max(peaks["plain"], low)
        wanted = [(f"ours {i + 1}", round(high * (low / high) ** (i / (budgets - 1))), "") for i in range(budgets)]
        wanted += [(f"ours at {title}", peak, title) for title, peak in peaks.items() if peak >= low]
        made: dict[str, tuple[Variant, int, str]] = {}
        for title, budget, against in wanted:
            with contextlib.suppress(BudgetError):
                made[title] = (ours(base, inputs, lowering, budget), budget, against)
        variants = {**found, **{title: variant for title, (variant, _, _) in made.items()}}
        figures = [Figure(name, lowering, title, peaks[title], 1.0, gradients) for title in found]
        for title, (variant, budget, against) in made.items():
            peak, plan = variant.peak(), variant.model.plan
            comparison = compare_steps(variant.model, found["plain"].model, loss, inputs)
            figures.append(
                Figure(
                    *(name, lowering, title, peak, 1.0, gradients),
                    budget=budget,
                    predicted=plan.peak_bytes,
                    predicted_ratio=plan.time_s / plan.plain_time_s,
                    planning_s=plan.planning_s,
                    exact=comparison.exact,
                    error=comparison.gradient_error,
                    against=against,
                )
            )
        time_in_groups(figures, variants, repeats)
    return figures


def time_in_groups(figures: Sequence[Figure], variants: Mapping[str, Variant], repeats: int) -> None:
    """Fill in the times. What is compared runs within seconds of each other: other guests of a machine come and go.

    So plain takes its turns with each peer and what is held against it, and with three of the budgets at a time.
    """
    ladder = [figure for figure in figures if figure.budget is not None and not figure.against]
    groups = [ladder[start : start + 3] for start in range(0, len(ladder), 3)]
    for peer in (figure for figure in figures if figure.budget is None):
        groups.append([peer, *(figure for figure in figures if figure.against == peer.name)])
    for group in groups:
        steps = {name: variants[name].step for name in ("plain", *(figure.name for figure in group))}
        timings = time_interleaved(steps, repeats=repeats, device=variants["plain"].inputs[0].device)
        for figure in group:
            timing = timings[figure.name]
            figure.seconds = timing.seconds
            figure.time_ratio = timing.ratio_to(timings["plain"])
            figure.time_interval = timing.interval_to(timings["plain"])
            if figure.against:
                figure.against_ratio = timing.ratio_to(timings[figure.against])
                figure.against_floor = timing.interval_to(timings[figure.against])[0]
