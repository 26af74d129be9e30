"""Models of transformers, timm, diffusers and torch_geometric under a budget: do peaks hold, are gradients exact?

    python benchmarks/libraries.py [--case 'timm/*']... [--lowering eager|inductor] [--budget 50] [--json FILE]

Needs the packages of the extra `libraries` (`pip install -e '.[libraries]'`); a case whose package is missing is named
and counts as missed. Models are small, with random weights, and in training mode. The budget is a part of plain's
measured peak, or the smallest that can be met where that is more. Each case runs in a process of its own. Exit status 1
if a demanded figure was not reached.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that measures peaks is silent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from libraries_cases import CASES, loss_of
from tabulate import tabulate
from torch import Tensor, nn
from workers import mebibytes, run_worker, select

OFF = {"eager": 0.01, "inductor": 0.05}  # how far a predicted peak may be from the measured one
ERROR = {"eager": 0.0, "inductor": 1e-5}
TOLERANCE = 1e-4  # of plans that invert
SCALARS = 4096  # bytes of a loss outside of the model, which no plan sees


@dataclass
class Figure:
    """One model, plain and ours. Bytes; `time` is relative to plain.

    `own` is how far plain's gradients are from those in double precision, where ours are far from plain's: those in
    front of two normalizations are zero but for rounding.
    """

    case: str
    plain: int
    budget: int
    ours: int
    predicted: int
    error: float
    time: float
    planning_s: float
    inverts: bool
    own: float | None

    def missed(self, lowering: str) -> str:
        """What is not as demanded."""
        found = {
            "above the budget": self.ours > self.budget + SCALARS,
            "predicted peak": abs(self.ours / self.predicted - 1) > OFF[lowering],
            "gradients": not self.error <= max(TOLERANCE if self.inverts else ERROR[lowering], 2 * (self.own or 0.0)),
        }
        return ", ".join(name for name, is_missed in found.items() if is_missed)


def main() -> int:
    options = parse()
    if options.worker:
        print(json.dumps(asdict(measure(options.worker, options))))
        return 0
    figures, missed = [], 0
    for name in select(CASES, options.case):
        figure, why = run_case(name, options)
        missed += bool(why)
        print(f"{name}: {why or 'as demanded'}", file=sys.stderr, flush=True)
        figures += [] if figure is None else [figure]
        if options.json:
            Path(options.json).write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
    print(format_figures(figures, options.lowering))
    return int(missed > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train models of libraries under a budget.")
    parser.add_argument("--case", action="append", metavar="NAME", help="such as timm/resnet50; * and ? match any")
    parser.add_argument("--lowering", default="eager", choices=["inductor", "eager"])
    parser.add_argument("--budget", type=float, default=50, metavar="PERCENT", help="of plain's measured peak")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved runs of which the median is taken")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each case")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--worker", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_case(name: str, options: argparse.Namespace) -> tuple[Figure | None, str]:
    """Its figure, if there is one, and what is wrong with it."""
    if CASES[name].missing:
        return None, f"the package {CASES[name].library} is missing"
    command = [__file__, "--worker", name]
    for option in ("lowering", "budget", "repeats"):
        command += [f"--{option}", str(getattr(options, option))]
    found, printed = run_worker(command, options.timeout)
    if found is None:
        return None, f"failed: {printed}"
    figure = Figure(**found)
    return figure, figure.missed(options.lowering)


def format_figures(figures: list[Figure], lowering: str) -> str:
    rows = [
        (
            figure.case,
            mebibytes(figure.plain),
            mebibytes(figure.budget),
            mebibytes(figure.ours),
            f"{figure.ours / figure.predicted - 1:+.2%}",
            f"{figure.time:.2f}",
            (f"{figure.error:.1e}" if figure.error else "exact")
            + (f" (plain's own {figure.own:.1e})" if figure.own else ""),
            f"{figure.planning_s:.1f}",
            figure.missed(lowering),
        )
        for figure in figures
    ]
    names = (
        "model",
        "plain MiB",
        "budget",
        "ours",
        "off predicted",
        "time / plain",
        "gradient error",
        "planning s",
        "",
    )
    return tabulate(rows, headers=names, tablefmt="github", disable_numparse=True)


# -- in the worker -----------------------------------------------------------------------------------------------------


class Trained:
    """A model with its arguments; a step begins without gradients."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        self.model, self.arguments = model, arguments

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.backward()

    def backward(self) -> None:
        result = self.model(**self.arguments)  # which the user holds
        loss_of(result).backward()

    def peak(self) -> int:
        from moonwalk_compile.measure import measure_step

        self.model.zero_grad(set_to_none=True)
        return measure_step(self.backward).peak_bytes


def measure(name: str, options: argparse.Namespace) -> Figure:
    from moonwalk_compile import peers
    from moonwalk_compile.measure import compare_steps, time_interleaved

    base, arguments = CASES[name].made()
    base.train()
    plain = Trained(peers.plain(base, options.lowering), arguments)
    with peers.same_random_numbers(options.lowering):
        plain.step()
        peak = plain.peak()
        ours = within(base, arguments, options.lowering, int(peak * options.budget / 100))

        def loss(model: nn.Module) -> Tensor:
            return loss_of(model(**arguments))

        compared = compare_steps(ours.model, plain.model, loss, ())
        ours.step()
        found = ours.peak()
        times = time_interleaved({"plain": plain.step, "ours": ours.step}, repeats=options.repeats)
    plan: Any = ours.model.plan
    assert plan.budget_bytes is not None
    error = 0.0 if compared.exact else compared.gradient_error
    time = times["ours"].ratio_to(times["plain"])
    inverts = any(segment.strategy in ("invert", "moonwalk") for segment in plan.segments)
    own = rounding(base, arguments) if error > TOLERANCE else None
    return Figure(name, peak, plan.budget_bytes, found, plan.peak_bytes, error, time, plan.planning_s, inverts, own)


def rounding(base: nn.Module, arguments: dict[str, Any]) -> float:
    """The error of eager PyTorch's gradients against double precision, at equal random numbers."""
    from moonwalk_compile.measure import gradient_error, gradients

    found = []
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(base).to(dtype)
        torch.manual_seed(0)
        given = {
            key: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in arguments.items()
        }
        loss_of(model(**given)).backward()
        found.append(gradients(model))
    return gradient_error(*found)


def within(base: nn.Module, arguments: dict[str, Any], lowering: str, budget: int) -> Trained:
    """Ours under the budget, or under the smallest that can be met."""
    from moonwalk_compile import BudgetError, moonwalk_compile

    for _ in range(2):
        try:
            model: Any = moonwalk_compile(copy.deepcopy(base), budget=budget, lowering=lowering)
            ours = Trained(model, arguments)
            ours.step()
            return ours
        except BudgetError as error:
            budget = error.smallest_peak_bytes
    raise AssertionError("the budget that a refusal names was refused")


if __name__ == "__main__":
    sys.exit(main())
