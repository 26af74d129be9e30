"""Flows of nflows, normflows and FrEIA, unmodified, and reversible networks of memcnn, revlib and momentumnet.

    python benchmarks/flows.py [--case '*Glow']... [--lowering eager|inductor] [--scale full|small] [--json FILE]

Needs the packages of the extra `flows` (`pip install -e '.[flows]'`); a case whose package is missing is named and
counts as missed. Each case runs in a process of its own. Exit status 1 if a demanded figure was not reached (at full
scale).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that measures peaks is silent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flows_cases import CASES, STEPS
from flows_peers import PEERS
from main_job_runs import Variant, returned_loss
from tabulate import tabulate
from torch import Tensor, nn
from workers import mebibytes, run_worker, select

REDUCTION, ERROR = 8, 1e-4


@dataclass
class Figure:
    """One model: plain, theirs (None for a flow) and ours. Bytes; seconds relative to plain; gradient errors."""

    case: str
    lowering: str
    plain: int
    ours: int
    predicted: int | None
    ours_time: float
    ours_error: float
    plan: str
    graph_break: str = ""
    theirs: int | None = None
    theirs_time: float | None = None
    theirs_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Verdict = tuple[str, str, str, bool]


def main() -> int:
    options = parse()
    if options.worker:
        print(json.dumps(measure(options.worker, options.lowering, options.scale, options.repeats).to_json()))
        return 0
    names = select([*CASES, *PEERS], options.case)
    missing = {name: package for name in names if (package := missing_package(name))}
    for name, package in missing.items():
        print(f"{name}: the package {package} is missing; pip install {package}")
    figures: list[Figure] = []
    for name in names:
        if name not in missing:
            print(f"{name} ...", file=sys.stderr, flush=True)
            figures += run_case(name, options)
            if options.json:
                Path(options.json).write_text(json.dumps([figure.to_json() for figure in figures], indent=1))
    print(format_figures(figures))
    verdicts = [verdict for figure in figures for verdict in judge(figure)]
    print(tabulate(verdicts, headers=("case", "figure", "found", "met"), tablefmt="github"))
    failed = {*names} - {figure.case for figure in figures}
    missed = failed or any(not met for *_, met in verdicts)
    return int(bool(missed) and options.scale == "full")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure normalizing flows and reversible networks.")
    names = ", ".join([*CASES, *PEERS])
    parser.add_argument("--case", action="append", metavar="NAME", help=f"of {names}; * and ? match any")
    parser.add_argument("--lowering", default="eager", choices=["inductor", "eager"])
    parser.add_argument("--scale", default="full", choices=["full", "small"], help="small: a smoke test, not judged")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved runs of which the median is taken")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each case")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--worker", choices=[*CASES, *PEERS], help=argparse.SUPPRESS)
    return parser.parse_args()


def missing_package(name: str) -> str | None:
    case = CASES.get(name) or PEERS[name]
    return case.module if case.missing else None


def run_case(name: str, options: argparse.Namespace) -> list[Figure]:
    """The figure of one case; none where it failed."""
    command = [__file__, "--worker", name]
    for option in ("lowering", "scale", "repeats"):
        command += [f"--{option}", str(getattr(options, option))]
    found, printed = run_worker(command, options.timeout)
    print(f"{name} failed: {printed}" if found is None else printed)
    return [] if found is None else [Figure(**found)]


# -- in the worker -------------------------------------------------------------------------------------------------


def measure(name: str, lowering: str, scale: str, repeats: int) -> Figure:
    """Ours is compiled from a copy of the unmodified model; of a peer's, with its memory saving switched off."""
    from moonwalk_compile.measure import gradient_error, time_interleaved

    theirs = None
    if name in CASES:
        base, inputs = CASES[name].made(scale)
    else:
        mine, base, inputs = PEERS[name].made(scale)
        theirs = Variant(mine, returned_loss, inputs)
    plain = Variant(copy.deepcopy(base), returned_loss, inputs)
    reference = own_gradients(plain)
    their_peak = theirs.peak() if theirs else None
    ours, broken = compiled(base, inputs, lowering, their_peak)
    peak, plan = ours.peak(), ours.model.plan
    variants = {"plain": plain, "ours": ours, **({"theirs": theirs} if theirs else {})}
    timings = time_interleaved({title: variant.step for title, variant in variants.items()}, repeats=repeats)
    return Figure(
        *(name, lowering, plain.peak(), peak, plan.peak_bytes if plan else None),
        ours_time=timings["ours"].ratio_to(timings["plain"]),
        ours_error=gradient_error(own_gradients(ours), reference),
        plan=describe(plan) if plan else "trained plain",
        graph_break=broken,
        theirs=their_peak,
        theirs_time=timings["theirs"].ratio_to(timings["plain"]) if theirs else None,
        theirs_error=gradient_error(own_gradients(theirs), reference) if theirs else None,
    )


def own_gradients(variant: Variant) -> dict[str, Tensor | None]:
    """By number: libraries name the parameters of a network without memory saving differently."""
    variant.step()
    found = [None if p.grad is None else p.grad.clone() for p in variant.model.parameters()]
    variant.model.zero_grad(set_to_none=True)
    return {str(position): gradient for position, gradient in enumerate(found)}


def compiled(base: nn.Module, inputs: Any, lowering: str, budget: int | None) -> tuple[Variant, str]:
    """Within the peer's own peak, if there is a peer and that can be met; and the graph break that was named."""
    from moonwalk_compile import BudgetError, moonwalk_compile

    def attempt(**goal: Any) -> tuple[Variant, str]:
        variant = Variant(moonwalk_compile(copy.deepcopy(base), lowering=lowering, **goal), returned_loss, inputs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            variant.step()
        said = [str(warning.message) for warning in caught if str(warning.message).startswith("moonwalk:")]
        return variant, next((text.splitlines()[0] for text in said if "could not be compiled" in text), "")

    if budget is not None:
        try:
            return attempt(budget=budget)
        except BudgetError as error:
            return attempt(budget=error.smallest_peak_bytes)
    return attempt(max_slowdown=2)


def describe(plan: Any) -> str:
    counts = Counter(segment.strategy for segment in plan.segments)
    return ", ".join(f"{strategy} {count}" for strategy, count in sorted(counts.items()))


# -- what is shown and demanded ------------------------------------------------------------------------------------


def format_figures(figures: Sequence[Figure]) -> str:
    headers = (
        "case",
        "plain (MiB)",
        "theirs",
        "ours",
        "plain / ours",
        "time / plain",
        "theirs",
        "gradients",
        "theirs",
        "plan",
    )
    return tabulate([cells(f) for f in figures], headers=headers, tablefmt="github", disable_numparse=True)


def cells(figure: Figure) -> list[str]:
    return [
        figure.case,
        mebibytes(figure.plain),
        mebibytes(figure.theirs),
        mebibytes(figure.ours),
        f"{figure.plain / figure.ours:.1f}",
        f"{figure.ours_time:.2f}",
        "" if figure.theirs_time is None else f"{figure.theirs_time:.2f}",
        f"{figure.ours_error:.1e}",
        "" if figure.theirs_error is None else f"{figure.theirs_error:.1e}",
        figure.plan,
    ]


def judge(figure: Figure) -> list[Verdict]:
    """What is demanded of one case, what was found, and whether that is enough."""
    right = (figure.case, f"gradient error <= {ERROR:g}", f"{figure.ours_error:.1e}", figure.ours_error <= ERROR)
    if figure.theirs is None or figure.theirs_time is None:
        ratio = figure.plain / figure.ours
        reduced = (figure.case, f"plain / ours >= {REDUCTION} at {STEPS} steps", f"{ratio:.1f}", ratio >= REDUCTION)
        broken = (figure.case, "one graph, or its break named", figure.graph_break or "one graph", True)
        return [reduced, right, broken]
    smaller = (figure.case, "peak / theirs <= 1", f"{figure.ours / figure.theirs:.2f}", figure.ours <= figure.theirs)
    ratio = figure.ours_time / figure.theirs_time
    return [smaller, (figure.case, "time / theirs < 1", f"{ratio:.2f}", ratio < 1), right]


if __name__ == "__main__":
    sys.exit(main())
