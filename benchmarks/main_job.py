"""The main job: how much memory unmodified models need with and without the compiler, side by side in one run.

    python benchmarks/main_job.py [--case 'gpt-*']... [--lowering inductor|eager] [--scale full|small] [--markdown]

Each case runs in a process of its own. Exit status 1 if a figure that is demanded was not reached, or a case failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that measures peaks is silent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from main_job_cases import CASES, cold_start
from main_job_runs import Row, Settings
from tabulate import tabulate
from workers import mebibytes, run_worker, select

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADERS = (
    "case",
    "against",
    "its peak (MiB)",
    "ours (MiB)",
    "ratio",
    "predicted (MiB)",
    "deviation",
    "time ratio",
    "gradient error",
    "demanded",
    "remarks",
)


def main() -> int:
    options = parse()
    settings = Settings(options.lowering, options.scale, options.repeats)
    if options.cold:
        print(json.dumps(cold_start(options.cold, settings)))
        return 0
    if options.worker:
        rows = CASES[options.worker](options.worker, settings)
        print(json.dumps([row.to_json() for row in rows]))
        return 0
    rows = run_cases(select(CASES, options.case), settings, options.timeout)
    if options.markdown:
        print(heading(settings))
    print(format_rows(rows, "github" if options.markdown else "simple"))
    return 0 if all(met for row in rows for _, met in row.verdicts) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the main job.")
    names = ", ".join(CASES).replace("%", "%%")
    parser.add_argument("--case", action="append", metavar="NAME", help=f"of {names}; * and ? match any")
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--scale", default="full", choices=["full", "small"], help="small: a smoke test, hardly judged")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved runs of which the median is taken")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each case")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table, with machine and date")
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--cold", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_cases(names: Sequence[str], settings: Settings, timeout: float) -> list[Row]:
    """All rows; on stderr, those of each case as soon as it is done."""
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = run_case(name, settings, timeout)
        print(format_rows(found, "plain"), file=sys.stderr, flush=True)
        rows += found
    return rows


def run_case(name: str, settings: Settings, timeout: float) -> list[Row]:
    command = [__file__, "--worker", name, "--lowering", settings.lowering, "--scale", settings.scale]
    rows, reason = run_worker([*command, "--repeats", str(settings.repeats)], timeout)
    return [failed(name, reason)] if rows is None else [Row(**row) for row in rows]


def failed(name: str, reason: str) -> Row:
    return Row(name, "", note=reason, verdicts=[("runs", False)])


def heading(settings: Settings) -> str:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    machine = f"{platform.machine()}, {processor()}, {os.cpu_count()} cores"
    what = f"Main job, {settings.lowering} lowering, {settings.scale} sizes"
    return f"{what}. {today}, torch {torch.__version__}, {machine}.\n"


def processor() -> str:
    """The model of the CPU, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def format_rows(rows: Sequence[Row], style: str) -> str:
    return tabulate([cells(row) for row in rows], headers=HEADERS, tablefmt=style, disable_numparse=True)


def cells(row: Row) -> list[str]:
    both = row.peak is not None and row.rival_peak is not None
    predicted = row.peak is not None and row.predicted is not None
    return [
        row.case,
        row.against,
        mebibytes(row.rival_peak),
        mebibytes(row.peak),
        f"{row.ratio:.1f}" if both else "",
        mebibytes(row.predicted),
        f"{row.deviation:+.1%}" if predicted else "",
        "" if row.time_ratio is None else f"{row.time_ratio:.2f}",
        "" if row.error is None else f"{row.error:.1e}",
        "; ".join(f"{demand}: {'yes' if met else 'NO'}" for demand, met in row.verdicts),
        row.note,
    ]


if __name__ == "__main__":
    sys.exit(main())
