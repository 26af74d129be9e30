"""The rows of the main job's table. Each case runs in a process of its own and returns its rows."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from main_job_runs import (
    Row,
    Settings,
    Variant,
    checkpoint_variants,
    compare,
    judge_prediction,
    judge_reduction,
    our_variant,
    plain_variants,
    train,
)
from torch import Tensor, nn

from examples import gpt, lipschitz, reversible
from moonwalk_compile import BudgetError, moonwalk_compile
from moonwalk_compile.measure import compare_steps

COUPLING_SIZES = {
    "full": {"blocks": 64, "half": 128, "hidden": 256, "batch": 16, "tokens": 512},
    "small": {"blocks": 4, "half": 16, "hidden": 32, "batch": 4, "tokens": 64},
}
LIPSCHITZ_SIZES = {
    "full": {"layers": 128, "width": 256, "batch": 8192},
    "small": {"layers": 8, "width": 32, "batch": 256},
}
GPT_SIZES = {
    "full": {"blocks": 12, "width": 256, "heads": 8, "batch": 8, "tokens": 256},
    "small": {"blocks": 3, "width": 32, "heads": 2, "batch": 4, "tokens": 32},
}
DEEP_GPT_BLOCKS = 96
WORDS = {"full": 32000, "small": 2000}
BUDGET_PERCENTS = (100, 70, 50, 40, 30, 25)
TIGHT_PERCENT = 30
TRAINING_STEPS = 20
MOONWALK_ONLY = {"strategies": ("moonwalk", "checkpoint"), "max_slowdown": 2}


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def projection(model: nn.Module, x: Tensor) -> Tensor:
    """Linear in the output: 128 leaky layers shrink it so far that the gradient of its square underflows."""
    y = model(x)
    target = torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)
    return (y * target).sum()


def build_coupling(settings: Settings, coupling: str = "additive") -> tuple[nn.Module, Sequence[Tensor]]:
    torch.manual_seed(0)
    return reversible.build(coupling=coupling, **COUPLING_SIZES[settings.scale])


def build_gpt(settings: Settings, **sizes: int) -> tuple[nn.Module, Sequence[Tensor]]:
    torch.manual_seed(0)
    return gpt.build(**{**GPT_SIZES[settings.scale], **sizes})


def coupling_case(name: str, settings: Settings, *, coupling: str, ratio: float, time_ratio: float) -> list[Row]:
    base, inputs = build_coupling(settings, coupling)
    rivals = plain_variants(base, mean_square, inputs, settings.lowering)
    rows = compare(name, our_variant(base, mean_square, inputs, settings), rivals, base, settings)
    for row in rows:
        judge_reduction(row, settings, ratio, time_ratio, error=1e-5)
    return rows


def lipschitz_case(
    name: str, settings: Settings, *, activation: str, slope: float = 0.2, options: dict[str, Any] = MOONWALK_ONLY
) -> list[Row]:
    torch.manual_seed(0)
    base, inputs = lipschitz.build(activation=activation, slope=slope, **LIPSCHITZ_SIZES[settings.scale])
    loss = projection if activation == "leaky_relu" else mean_square
    rivals = plain_variants(base, loss, inputs, settings.lowering)
    ours = our_variant(base, loss, inputs, settings, **options)
    rows = compare(name, ours, rivals, base, settings)
    for row in rows:
        if activation == "leaky_relu" or options is not MOONWALK_ONLY:
            row.judge("error <= 1e-4", row.error is not None and row.error <= 1e-4)
        else:
            judge_reduction(row, settings, 20, 1.6 if settings.lowering == "eager" else 1.8, error=1e-4)
    return rows


def gpt_budget_case(name: str, settings: Settings, *, percent: int) -> list[Row]:
    base, inputs = build_gpt(settings)
    rivals = plain_variants(base, gpt.loss, inputs, settings.lowering)
    same_lowering = next(iter(rivals.values()))
    budget = same_lowering.peak() * percent // 100
    ours = our_variant(base, gpt.loss, inputs, settings, budget=budget)
    rows = compare(name, ours, rivals, base, settings)
    row = rows[0]
    row.judge("peak <= budget", row.peak is not None and row.peak <= budget)
    judge_prediction(row, settings)
    if settings.lowering == "eager":
        row.judge(
            "bitwise aot_eager's gradients", compare_steps(ours.model, same_lowering.model, gpt.loss, inputs).exact
        )
    _judge_training(row, ours, base, inputs)
    return rows


def _judge_training(row: Row, ours: Variant, base: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Last: it changes the weights of `ours`."""
    torch.manual_seed(1)
    batches = [gpt.sample(*inputs[0].shape) for _ in range(TRAINING_STEPS)]
    theirs = train(copy.deepcopy(base), gpt.loss, batches)
    found = train(ours.model, gpt.loss, batches)
    row.note += f"; loss after {TRAINING_STEPS} steps {found:.6f}, eager {theirs:.6f}"
    row.judge(f"same loss after {TRAINING_STEPS} steps (1e-4)", abs(found / theirs - 1) <= 1e-4)


def gpt_checkpoint_case(name: str, settings: Settings) -> list[Row]:
    base, inputs = build_gpt(settings)
    rivals = checkpoint_variants(base, gpt.loss, inputs, settings.lowering)
    budget = next(iter(rivals.values())).peak()
    ours = our_variant(base, gpt.loss, inputs, settings, budget=budget)
    rows = compare(name, ours, rivals, base, settings)
    rows[0].judge("peak <= checkpoint's", rows[0].peak is not None and rows[0].peak <= budget)
    if settings.full:
        rows[0].judge("time <= checkpoint's", rows[0].time_ratio is not None and rows[0].time_ratio <= 1)
    return rows


def gpt_impossible_case(name: str, settings: Settings) -> list[Row]:
    """A budget of 1% is refused, and the peak that the error names can be had."""
    base, inputs = build_gpt(settings)
    rivals = plain_variants(base, gpt.loss, inputs, settings.lowering)
    budget = next(iter(rivals.values())).peak() // 100
    try:
        our_variant(base, gpt.loss, inputs, settings, budget=budget)
    except BudgetError as error:
        smallest = error.smallest_peak_bytes
    else:
        row = Row(name, "")
        row.judge("BudgetError", False)
        return [row]
    rows = compare(name, our_variant(base, gpt.loss, inputs, settings, budget=smallest), rivals, base, settings)
    rows[0].judge("BudgetError", True)
    rows[0].judge("a plan at the smallest peak holds", rows[0].peak is not None and rows[0].peak <= smallest)
    return rows


def words_case(name: str, settings: Settings, *, percent: int | None = None) -> list[Row]:
    """A vocabulary as language models have it: under a part of plain's peak, or at the smallest reachable."""
    sizes = {**GPT_SIZES[settings.scale], "blocks": 4}
    words, shape = WORDS[settings.scale], (sizes["batch"], sizes["tokens"])
    torch.manual_seed(0)
    base = gpt.Gpt(words, sizes["tokens"], sizes["blocks"], sizes["width"], sizes["heads"], 0.0)
    inputs = (torch.randint(words, shape), torch.randint(words, shape))
    rivals = plain_variants(base, gpt.loss, inputs, settings.lowering)
    split = {"strategies": ("keep", "checkpoint", "split")}
    budget = next(iter(rivals.values())).peak() * (percent or 0) // 100
    whole = 0
    if percent is None:
        whole, budget = (
            _smallest(base, inputs, settings, given) for given in ({"strategies": split["strategies"][:2]}, split)
        )
    rows = compare(name, our_variant(base, gpt.loss, inputs, settings, budget=budget, **split), rivals, base, settings)
    rows[0].judge("peak <= budget", rows[0].peak is not None and rows[0].peak <= budget)
    rows[0].judge("error <= 1e-5", rows[0].error is not None and rows[0].error <= 1e-5)
    judge_prediction(rows[0], settings)
    if whole:
        rows[0].note += f"; smallest peak without split {whole / 2**20:.1f} MiB"
        rows[0].judge("peak <= 0.4x that", budget <= 0.4 * whole)
    return rows


def _smallest(base: nn.Module, inputs: Sequence[Tensor], settings: Settings, options: dict[str, Any]) -> int:
    try:
        our_variant(base, gpt.loss, inputs, settings, budget=1, **options)
    except BudgetError as error:
        return error.smallest_peak_bytes
    raise AssertionError("a budget of one byte was met")


def planning_case(name: str, settings: Settings, *, blocks: int | None = None) -> list[Row]:
    """Seconds to plan a tight budget: the planner's own figure, and all of the call (capture included)."""
    base, inputs = build_gpt(settings, **({"blocks": blocks} if blocks else {}))
    start = time.perf_counter()
    ours = our_variant(base, gpt.loss, inputs, settings, budget=f"{TIGHT_PERCENT}%")
    seconds = time.perf_counter() - start
    plan = ours.model.plan
    note = f"planned in {plan.planning_s:.2f} s, the whole call took {seconds:.2f} s; {len(plan.segments)} segments"
    return [Row(name, "", predicted=plan.peak_bytes, note=note)]


def compile_time_case(name: str, settings: Settings, *, model: str) -> list[Row]:
    """Cold first steps, each in a fresh process with empty caches."""
    plain = _cold_start(f"{model}:plain", settings)
    ours = _cold_start(f"{model}:ours", settings)
    row = Row(name, "torch.compile" if settings.lowering == "inductor" else "aot_eager")
    row.note = f"first step: ours {ours:.1f} s, plain {plain:.1f} s, {ours / plain:.2f}x"
    if settings.full and settings.lowering == "inductor":
        row.judge("compile time <= 1.5x", ours <= 1.5 * plain)
    return [row]


def _cold_start(what: str, settings: Settings) -> float:
    script = Path(__file__).with_name("main_job.py")
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder}
        command = [
            sys.executable,
            str(script),
            "--cold",
            what,
            "--lowering",
            settings.lowering,
            "--scale",
            settings.scale,
        ]
        done = subprocess.run(command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cold_start(what: str, settings: Settings) -> float:
    """Seconds that planning, compiling and the first step take beyond a later step."""
    model, _, variant = what.partition(":")
    (base, inputs), loss = _COLD_MODELS[model](settings)
    options: dict[str, Any] = {"budget": f"{TIGHT_PERCENT}%"} if model == "gpt" else {}
    start = time.perf_counter()
    if variant == "ours":
        running = Variant(moonwalk_compile(base, lowering=settings.lowering, **options), loss, inputs)
    else:
        running = next(iter(plain_variants(base, loss, inputs, settings.lowering).values()))
    running.step()
    first = time.perf_counter() - start
    start = time.perf_counter()
    running.step()
    return first - (time.perf_counter() - start)


_COLD_MODELS: dict[str, Callable[[Settings], Any]] = {
    "coupling": lambda settings: (build_coupling(settings), mean_square),
    "gpt": lambda settings: (build_gpt(settings), gpt.loss),
}

CASES: dict[str, Callable[[str, Settings], list[Row]]] = {
    "coupling-additive": partial(coupling_case, coupling="additive", ratio=32, time_ratio=1.40),
    "coupling-affine": partial(coupling_case, coupling="affine", ratio=30, time_ratio=1.43),
    "leapfrog": partial(coupling_case, coupling="leapfrog", ratio=30, time_ratio=1.43),
    "lipschitz-abs": partial(lipschitz_case, activation="abs"),
    "lipschitz-abs-default": partial(lipschitz_case, activation="abs", options={}),
    "lipschitz-maxmin": partial(lipschitz_case, activation="maxmin"),
    "lipschitz-leaky-0.2": partial(lipschitz_case, activation="leaky_relu", slope=0.2),
    "lipschitz-leaky-0.01": partial(lipschitz_case, activation="leaky_relu", slope=0.01),
    **{f"gpt-{percent}%": partial(gpt_budget_case, percent=percent) for percent in BUDGET_PERCENTS},
    "gpt-checkpoint": gpt_checkpoint_case,
    "gpt-impossible": gpt_impossible_case,
    **{f"words-{percent}%": partial(words_case, percent=percent) for percent in (70, 40)},
    "words-smallest": words_case,
    "planning": planning_case,
    "planning-96": partial(planning_case, blocks=DEEP_GPT_BLOCKS),
    "compile-coupling": partial(compile_time_case, model="coupling"),
    "compile-gpt": partial(compile_time_case, model="gpt"),
}
