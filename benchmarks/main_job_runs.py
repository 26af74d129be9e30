"""How the main job is measured: variants of one model side by side, and the row of figures that comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moonwalk_compile.measure import compare_steps, measure_step, time_interleaved
from moonwalk_compile.peers import in_one_graph

Loss = Callable[..., Tensor]
Inputs = Sequence[Tensor]


@dataclass(frozen=True)
class Settings:
    """What the command line asks for. `scale` is "full" or "small" (a smoke test: nothing is judged)."""

    lowering: str
    scale: str
    repeats: int

    @property
    def full(self) -> bool:
        return self.scale == "full"


@dataclass
class Row:
    """The figures of one comparison; `None` where there is none. Bytes, ratios, and what was demanded of them.

    Attributes:
        against: the variant that `rival_peak` and `time_ratio` refer to.
        verdicts: (demand, met) pairs.
    """

    case: str
    against: str
    rival_peak: int | None = None
    peak: int | None = None
    predicted: int | None = None
    time_ratio: float | None = None
    error: float | None = None
    note: str = ""
    verdicts: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return (self.rival_peak or 0) / (self.peak or 1)

    @property
    def deviation(self) -> float:
        """Of the predicted peak from the measured one, relative to the measured one."""
        return (self.predicted or 0) / (self.peak or 1) - 1

    def judge(self, demand: str, met: bool) -> None:
        self.verdicts.append((demand, bool(met)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def returned_loss(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Of a model that returns its loss."""
    return model(*inputs)


@dataclass(frozen=True)
class Variant:
    """One way of running a training step of a model on fixed inputs."""

    model: nn.Module
    loss: Loss
    inputs: Inputs

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss(self.model, *self.inputs).backward()

    def peak(self) -> int:
        """Measured bytes, after steps that compile and calibrate, and after which a plan may be made again."""
        for _ in range(3):
            self.step()
        self.model.zero_grad(set_to_none=True)
        return measure_step(self.step, device=self.inputs[0].device).peak_bytes


class Checkpointed(nn.Module):
    """A block whose activations are recomputed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def plain_variants(base: nn.Module, loss: Loss, inputs: Inputs, lowering: str) -> dict[str, Variant]:
    """What we are compared with: in the same lowering first, then without any compiler in the eager lowering."""
    compiled = copy.deepcopy(base)
    if lowering == "inductor":
        in_one_graph(compiled)
        return {"torch.compile": Variant(compiled, loss, inputs)}
    in_one_graph(compiled, "aot_eager")
    return {
        "aot_eager": Variant(compiled, loss, inputs),
        "eager": Variant(copy.deepcopy(base), loss, inputs),
    }


def checkpoint_variants(base: nn.Module, loss: Loss, inputs: Inputs, lowering: str) -> dict[str, Variant]:
    """`base.blocks` under torch.utils.checkpoint, one by one, in the same variants as plain."""
    model = copy.deepcopy(base)
    model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    variants = plain_variants(model, loss, inputs, lowering)
    return {f"checkpoint, {name}": variant for name, variant in variants.items()}


def our_variant(base: nn.Module, loss: Loss, inputs: Inputs, settings: Settings, **options: Any) -> Variant:
    from moonwalk_compile import moonwalk_compile

    model = copy.deepcopy(base)
    compiled = moonwalk_compile(model, lowering=settings.lowering, example_inputs=tuple(inputs), **options)
    return Variant(compiled, loss, inputs)


def compare(case: str, ours: Variant, rivals: Mapping[str, Variant], base: nn.Module, settings: Settings) -> list[Row]:
    """One row for each rival; gradients are compared with those of `base`, run without any compiler."""
    peak = ours.peak()
    plan = ours.model.plan
    rival_peaks = {name: rival.peak() for name, rival in rivals.items()}
    comparison = compare_steps(ours.model, base, ours.loss, ours.inputs)
    steps = {name: variant.step for name, variant in {**rivals, "ours": ours}.items()}
    timings = time_interleaved(steps, repeats=settings.repeats)
    make = partial(
        Row, case, peak=peak, predicted=plan.peak_bytes, error=comparison.gradient_error, note=describe(plan)
    )
    return [
        make(against=name, rival_peak=rival_peaks[name], time_ratio=timings["ours"].ratio_to(timings[name]))
        for name in rivals
    ]


def describe(plan: Any) -> str:
    """How many segments there are of each strategy: "checkpoint 3, keep 1"."""
    strategies = [segment.strategy for segment in plan.segments]
    return ", ".join(f"{strategy} {strategies.count(strategy)}" for strategy in sorted(set(strategies)))


def judge_reduction(row: Row, settings: Settings, ratio: float, time_ratio: float, error: float) -> None:
    """The demands on a default plan: uncompiled eager is shown, but only the same lowering is judged."""
    if not settings.full or row.against == "eager":
        return
    row.judge(f"peak ratio >= {ratio:g}", row.ratio >= ratio)
    row.judge(f"time <= {time_ratio:g}", row.time_ratio is not None and row.time_ratio <= time_ratio)
    row.judge(f"error <= {error:g}", row.error is not None and row.error <= error)


def judge_prediction(row: Row, settings: Settings) -> None:
    if settings.full:
        allowed = 0.05 if settings.lowering == "eager" else 0.10
        row.judge(f"predicted within {allowed:.0%}", abs(row.deviation) <= allowed)


def train(model: nn.Module, loss: Loss, batches: Sequence[Inputs], lr: float = 1e-3) -> float:
    """Loss of the last batch, training by Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    value = float("nan")
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        total = loss(model, *batch)
        total.backward()
        optimizer.step()
        value = total.item()
    return value
