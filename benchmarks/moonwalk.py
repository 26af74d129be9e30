"""What Moonwalk is measured by: depth under a fixed peak, every algorithm on one network, ill-conditioned networks.

    python benchmarks/moonwalk.py [--case 'depth-*']... [--lowering eager|inductor] [--scale full|small] [--json FILE]

Each case runs in a process of its own. Exit status 1 if a demanded figure was not reached (at full scale). RevNets
train on scikit-learn's digits, which must be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that measures peaks is silent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from main_job_runs import Settings
from moonwalk_cases import CASES, ENVIRONMENT, Point, Result
from tabulate import tabulate
from workers import mebibytes, run_worker, select


def main() -> int:
    options = parse()
    if options.worker:
        settings = Settings(options.lowering, options.scale, options.repeats)
        print(json.dumps(CASES[options.worker](options.worker, settings).to_json()))
        return 0
    results = {}
    for name in select(CASES, options.case):
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = run_case(name, options)
        print(format_result(results[name]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps({n: r.to_json() for n, r in results.items()}, indent=1))
    if options.plots:
        from moonwalk_plots import plot_results

        plot_results(results, Path(options.plots))
    missed = any(not met for result in results.values() for _, _, met in result.verdicts)
    return int(missed and options.scale == "full")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Moonwalk.")
    parser.add_argument("--case", action="append", metavar="NAME", help=f"of {', '.join(CASES)}; * and ? match any")
    parser.add_argument("--lowering", default="eager", choices=["inductor", "eager"])
    parser.add_argument("--scale", default="full", choices=["full", "small"], help="small: a smoke test, not judged")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each case")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--plots", metavar="FOLDER", help="draw peaks and times against depth")
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_case(name: str, options: argparse.Namespace) -> Result:
    command = [__file__, "--worker", name]
    for option in ("lowering", "scale", "repeats"):
        command += [f"--{option}", str(getattr(options, option))]
    found, reason = run_worker(command, options.timeout, ENVIRONMENT.get(name, {}))
    if found is None:
        return Result(verdicts=[(f"{name} runs", reason, False)])
    return Result([Point(**point) for point in found["points"]], [tuple(verdict) for verdict in found["verdicts"]])


def format_result(result: Result) -> str:
    headers = ("case", "variant", "depth", "peak (MiB)", "gradients", "step (ms)", "gradient error", "remarks")
    points = tabulate([cells(p) for p in result.points], headers=headers, tablefmt="github", disable_numparse=True)
    verdicts = tabulate(result.verdicts, headers=("demanded", "found", "met"), tablefmt="github")
    return f"{points}\n\n{verdicts}\n"


def cells(point: Point) -> list[str]:
    return [
        point.case,
        point.variant,
        str(point.depth),
        mebibytes(point.peak),
        mebibytes(point.gradients),
        "" if point.seconds is None else f"{1000 * point.seconds:.1f}",
        "" if point.error is None else f"{point.error:.1e}",
        point.note,
    ]


if __name__ == "__main__":
    sys.exit(main())
