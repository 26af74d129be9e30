"""The command `moonwalk`.

Exit status: 0 planned; 1 the budget cannot be met (the smallest that can is printed); 2 wrong usage, errors in the
model's own code included; 3 a bug of moonwalk_compile, with its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from .errors import BudgetError, MoonwalkError, UsageError
from .options import LOWERINGS, ON_REQUEST, PROFILES, STRATEGIES, Options, nearest
from .outputs import Wanted, check_outputs
from .passes.cost import DEVICES
from .plot import check_plot_path
from .targets import load_target, parse_specs
from .usercode import reporting_user_code

if TYPE_CHECKING:
    from .bench import Bench
    from .front import Front
    from .report import Plan

    Found = Plan | Front | Bench

PLANNED, OVER_BUDGET, WRONG_USAGE, INTERNAL_ERROR = range(4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments))
    except MoonwalkError as error:
        print(error, file=sys.stderr)
        return OVER_BUDGET if isinstance(error, BudgetError) else WRONG_USAGE
    except Exception:
        traceback.print_exc()
        print("This is a bug of moonwalk_compile: please report it with the lines above.", file=sys.stderr)
        return INTERNAL_ERROR


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are reported like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("Wrong usage", message, f"see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moonwalk", description="Train unmodified PyTorch models within a memory budget.")
    parser.add_argument("--version", action="version", version=f"moonwalk {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="compile an unmodified model, train a step, compare with the prediction")
    demo.set_defaults(run=_demo)
    _add_plan(commands.add_parser("plan", help="plan a model's training step without allocating its memory"))
    _add_pareto(commands.add_parser("pareto", help="all that is possible: peak against time, by plans like these"))
    _add_bench(commands.add_parser("bench", help="measure a training step: plain, checkpointed, and as planned"))
    return parser


BUDGET_HELP = "bound on the peak: bytes, 512MiB, 2GiB, or 40%% of plain's"


def _add_goal(parser: argparse.ArgumentParser) -> None:
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--budget", metavar="B", help=BUDGET_HELP)
    slowdown = "without a budget: largest step time relative to plain's (default 1.5)"
    goal.add_argument("--max-slowdown", metavar="R", type=float, help=slowdown)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    wanted = "the outputs that training needs, by name or position, with commas between (default all)"
    parser.add_argument("--outputs", metavar="A,B", help=wanted)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_goal(parser)
    _add_outputs(parser)
    _add_common(parser, "draw live memory over the step")
    parser.set_defaults(run=_plan)


def _add_pareto(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", metavar="N", type=int, default=12, help="plans to make (default 12)")
    parser.add_argument("--budget", metavar="B", help=f"mark the plan of a {BUDGET_HELP}")
    _add_outputs(parser)
    _add_common(parser, "draw peak against time")
    parser.set_defaults(run=_pareto, max_slowdown=None)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    _add_goal(parser)
    parser.add_argument("--repeats", metavar="N", type=int, default=7, help="interleaved runs (default 7)")
    _add_outputs(parser)
    _add_common(parser, "draw measured and predicted peaks against time")
    parser.set_defaults(run=_bench)


def _add_common(parser: argparse.ArgumentParser, drawing: str) -> None:
    add = parser.add_argument
    add("target", metavar="TARGET", help="package.module:callable or path/to/file.py:callable")
    spec = "an input, as f32[8,3,224,224], or by name, as labels=i64[4,128]<50257; once for each"
    add("--input", metavar="SPEC", action="append", default=[], help=spec)
    add(
        "--strategies",
        metavar="A,B",
        help=f"some of {','.join((*STRATEGIES, *ON_REQUEST))} (default all; split only through inductor)",
    )
    add("--device", metavar="NAME", default="cpu", help=f"one of {', '.join(DEVICES)} (default cpu)")
    add("--lowering", metavar="L", help=f"{' or '.join(LOWERINGS)} (default {LOWERINGS[0]})")
    add("--profile", metavar="P", help=f"{' or '.join(PROFILES)}: predict times by a table, or time operations here")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--plot", metavar="FILE", help=f"{drawing}, to a .png, .pdf or .svg file")


def _version() -> str:
    try:
        return importlib.metadata.version("moonwalk-compile")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import main as demo

    return int(demo() or 0)


def _plan(arguments: argparse.Namespace) -> int:
    from .api import plan_model

    return _report(arguments, _options(arguments), functools.partial(plan_model, outputs=_outputs(arguments)))


def _pareto(arguments: argparse.Namespace) -> int:
    from .api import model_front

    if arguments.points < 2:
        raise UsageError("Wrong usage", f"--points {arguments.points} makes no front", "ask for at least 2 points")
    make = functools.partial(model_front, outputs=_outputs(arguments), count=arguments.points)
    return _report(arguments, _options(arguments), make)


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import bench_model

    if arguments.repeats < 1:
        raise UsageError("Wrong usage", f"--repeats {arguments.repeats} measures nothing", "ask for at least 1")
    make = functools.partial(bench_model, outputs=_outputs(arguments), repeats=arguments.repeats)
    return _report(arguments, _options(arguments), make)


def _report(arguments: argparse.Namespace, options: Options, make: Callable[..., Found]) -> int:
    """Print, and draw, what `make` finds about the target."""
    _check_device(arguments.device)
    if arguments.plot:
        check_plot_path(arguments.plot)
    try:
        found = _on_target(arguments, options, make)
    except BudgetError as error:
        if arguments.json:
            print(_budget_error_as_json(error))
        raise
    print(found.to_json() if arguments.json else found)
    if arguments.plot:
        found.plot(arguments.plot)
        print(f"wrote {arguments.plot}", file=sys.stderr)
    return PLANNED


def _options(arguments: argparse.Namespace) -> Options:
    """Only what was given: the defaults are those of `Options`."""
    names = ("budget", "max_slowdown", "strategies", "lowering", "profile")
    given = {name: getattr(arguments, name) for name in names}
    return Options.from_mapping({name: value for name, value in given.items() if value is not None})


def _outputs(arguments: argparse.Namespace) -> Wanted | None:
    """Numbers are positions."""
    if arguments.outputs is None:
        return None
    names = [name.strip() for name in arguments.outputs.split(",")]
    return check_outputs([int(name) if name.isdecimal() else name for name in names if name])


def _check_device(name: str) -> None:
    if name not in DEVICES:
        what = f"there is no cost table for {name!r}{nearest(name, DEVICES)}"
        raise UsageError("Unknown device", what, f"use one of {', '.join(DEVICES)}")


def _on_target(arguments: argparse.Namespace, options: Options, make: Callable[..., Found]) -> Found:
    """What the model's code prints goes to stderr: stdout is for the result."""
    specs = parse_specs(arguments.input)
    with contextlib.redirect_stdout(sys.stderr), _quiet_torch():
        target = load_target(arguments.target)
        with reporting_user_code(f"planning {arguments.target}"):
            return make(functools.partial(target.build, specs), options, arguments.device)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch logs a traceback of its own for errors that are reported here in three lines."""
    levels = [(handler, handler.level) for handler in logging.getLogger("torch").handlers]
    for handler, _ in levels:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)


def _budget_error_as_json(error: BudgetError) -> str:
    values = {
        "budget_bytes": error.budget_bytes,
        "smallest_peak_bytes": error.smallest_peak_bytes,
        "pinned": list(error.pinned),
    }
    return json.dumps(values, indent=2)
