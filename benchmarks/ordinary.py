"""Ordinary models, which cannot be inverted: ours at many budgets against every peer, side by side.

    python benchmarks/ordinary.py [--model 'gpt*']... [--lowering eager|inductor] [--scale full|small] [--json FILE]
    python benchmarks/ordinary.py --device cuda --scale large ...

Each model runs in a process of its own. Exit status 1 if a demanded figure was not reached (not at small scale).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean, mean

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that measures peaks is silent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ordinary_runs import Figure, measure_model
from tabulate import tabulate
from workers import mebibytes, run_worker, select

from examples.ordinary import MODELS

Verdict = tuple[str, str, bool]


def main() -> int:
    options = parse()
    if options.worker:
        settings = (options.lowering, options.scale, options.budgets, options.repeats, options.device)
        print(json.dumps([figure.to_json() for figure in measure_model(options.worker, *settings)]))
        return 0
    names = select(MODELS, options.model)
    figures: list[Figure] = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        figures += run_model(name, options)
        print(format_model([figure for figure in figures if figure.model == name]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps([figure.to_json() for figure in figures], indent=1))
    if options.plots:
        from ordinary_plots import plot_models

        plot_models(figures, Path(options.plots))
    verdicts = judge(figures, options.lowering)
    print(tabulate(verdicts, headers=("figure", "found", "met"), tablefmt="github"))
    failed = {*names} - {figure.model for figure in figures}
    missed = failed or any(not met for _, _, met in verdicts)
    return int(bool(missed) and options.scale != "small")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure ordinary models.")
    parser.add_argument("--model", action="append", metavar="NAME", help=f"of {', '.join(MODELS)}; * and ? match any")
    parser.add_argument("--lowering", default="eager", choices=["inductor", "eager"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: in mixed precision")
    parser.add_argument(
        "--scale",
        default="full",
        choices=["full", "small", "large"],
        help="small: a smoke test, not judged; large: fills a GPU",
    )
    parser.add_argument("--budgets", type=int, default=8, help="from plain's peak down to the smallest reachable")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved runs of which the median is taken")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for each model")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--plots", metavar="FOLDER", help="draw peak against time for each model")
    parser.add_argument("--worker", choices=list(MODELS), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_model(name: str, options: argparse.Namespace) -> list[Figure]:
    """The figures of one model; none where it failed."""
    command = [__file__, "--worker", name]
    for option in ("lowering", "device", "scale", "budgets", "repeats"):
        command += [f"--{option}", str(getattr(options, option))]
    figures, printed = run_worker(command, options.timeout)
    print(f"{name} failed: {printed}" if figures is None else printed)
    return [Figure(**figure) for figure in figures or ()]


def format_model(figures: Sequence[Figure]) -> str:
    headers = (
        *("model", "variant", "budget (MiB)", "predicted", "peak (MiB)"),
        *("time (ms)", "time / plain", "predicted", "gradients"),
    )
    return tabulate([cells(figure) for figure in figures], headers=headers, tablefmt="github", disable_numparse=True)


def cells(figure: Figure) -> list[str]:
    gradients = "" if figure.error is None else "exact" if figure.exact else f"{figure.error:.1e}"
    time = f"{figure.time_ratio:.2f}"
    if figure.against_ratio is not None:
        time += f" ({figure.against_ratio:.2f} of {figure.against})"
    return [
        figure.model,
        figure.name,
        mebibytes(figure.budget),
        mebibytes(figure.predicted),
        mebibytes(figure.peak),
        f"{1e3 * figure.seconds:.0f}",
        time,
        "" if figure.predicted_ratio is None else f"{figure.predicted_ratio:.2f}",
        gradients,
    ]


def judge(figures: Sequence[Figure], lowering: str) -> list[Verdict]:
    """What is demanded over all models, what was found, and whether that is enough."""
    mine = [f for f in figures if f.budget is not None]
    if not mine:
        return []
    inductor = lowering == "inductor"
    over = [f for f in mine if f.peak > f.budget]
    off = max(abs(f.predicted / f.peak - 1) for f in mine)
    rise = max(rises(figures), default=0.0)
    whole, above = smallest_ratios(figures, False), smallest_ratios(figures, True)
    against = [f.against_ratio for f in mine if f.against_ratio is not None and f.against != "plain"]
    slower = [f.against_floor for f in mine if f.against_floor is not None and f.against != "plain"]
    loose = [f for f in mine if f.name == "ours 1"]
    wrong = [f for f in mine if (f.error > 1e-5 if inductor else not f.exact)]
    timing = max(abs(f.predicted_ratio / f.time_ratio - 1) for f in mine)
    apart = max(abs(f.predicted_ratio / nearest(f.predicted_ratio, f.time_interval) - 1) for f in mine)
    overall = geometric_mean(against) if against else float("nan")
    return [
        ("measured peaks above the budget: 0", f"{len(over)} of {len(mine)}", not over),
        (f"predicted within {0.05 if inductor else 0.01:.0%}", f"{off:.2%}", off <= (0.05 if inductor else 0.01)),
        ("peak rises as the budget falls: <= 1%", f"{rise:.2%}", rise <= 0.01),
        ("smallest peak / best peer's: each <= 1", f"{max(whole):.2f}", max(whole) <= 1),
        ("the same, mean: <= 0.9", f"{mean(whole):.2f}", mean(whole) <= 0.9),
        (
            "the same without gradients, mean: <= 0.85",
            f"{mean(above):.2f}",
            mean(above) <= 0.85,
        ),
        (
            "time at a peer's peak: each <= 1.02 beyond noise",
            f"{max(against, default=0):.2f}, beyond noise {max(slower, default=0):.2f}",
            max(slower, default=0) <= 1.02,
        ),
        ("the same, geometric mean: <= 0.9", f"{overall:.2f}", overall <= 0.9),
        (
            "plain's peak as budget, time / plain: <= 1.02 beyond noise",
            f"{max(f.time_ratio for f in loose):.2f}, beyond noise {max(f.time_interval[0] for f in loose):.2f}",
            max(f.time_interval[0] for f in loose) <= 1.02,
        ),
        (f"gradients {'within 1e-5' if inductor else 'bitwise'}", f"{len(wrong)} of {len(mine)} are not", not wrong),
        ("predicted time ratio within 15%", f"{timing:.0%}, beyond noise {apart:.0%}", timing <= 0.15),
    ]


def nearest(value: float, interval: tuple[float, float]) -> float:
    return min(max(value, interval[0]), interval[1])


def rises(figures: Sequence[Figure]) -> list[float]:
    """How much the measured peak rises from each budget to the next smaller one."""
    found = []
    for name in {figure.model for figure in figures}:
        ladder = [f for f in figures if f.model == name and f.budget is not None and not f.against]
        ladder.sort(key=lambda f: -(f.budget or 0))
        found += [after.peak / before.peak - 1 for before, after in pairwise(ladder)]
    return found


def smallest_ratios(figures: Sequence[Figure], without_gradients: bool) -> list[float]:
    """For each model, our smallest measured peak over the best peer's."""
    found = []
    for name in {figure.model for figure in figures}:
        rows = [f for f in figures if f.model == name]
        floor = rows[0].gradients if without_gradients else 0
        mine = min(f.peak for f in rows if f.budget is not None)
        found.append((mine - floor) / (min(f.peak for f in rows if f.budget is None) - floor))
    return found


if __name__ == "__main__":
    sys.exit(main())
