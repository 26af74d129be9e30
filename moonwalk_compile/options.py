"""The options of `moonwalk_compile` and of the backend, parsed and validated in one place."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

from .errors import OptionError
from .units import format_bytes

__all__ = ["Budget", "Options", "STRATEGIES", "LOWERINGS", "PROFILES", "format_bytes", "parse_bytes", "nearest"]

STRATEGIES = ("keep", "checkpoint", "invert", "moonwalk")
ON_REQUEST = ("split",)  # strategies that are not among the default ones
LOWERINGS = ("inductor", "eager")
PROFILES = ("model", "measure")

_UNITS = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) *([a-z]*|%)", re.IGNORECASE)
_BUDGET_TODO = 'write bytes (1073741824), a size ("512MiB", "1.5GB") or a part of plain backpropagation\'s peak ("40%")'


@dataclass(frozen=True)
class Budget:
    """A bound on the peak: a number of bytes, or a fraction of plain backpropagation's peak. Exactly one is set.

    `granted` is what a fraction came to for other inputs: the bound where that of these inputs cannot be met.
    """

    bytes: int | None = None
    fraction: Fraction | float | None = None
    granted: int = 0

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.fraction is None):
            raise _bad_budget("a budget is either bytes or a fraction")
        if (self.bytes or self.fraction or 0) < 0:
            raise _bad_budget("a budget cannot be negative")

    def resolve(self, plain_peak: int) -> int:
        """The bound in bytes, given the peak of plain backpropagation in bytes (fractions are rounded down)."""
        if self.fraction is not None:
            return int(plain_peak * self.fraction)
        assert self.bytes is not None
        return self.bytes

    def __str__(self) -> str:
        if self.fraction is not None:
            return f"{float(self.fraction * 100):g}%"
        assert self.bytes is not None
        return format_bytes(self.bytes)


def parse_bytes(value: object) -> Budget:
    """A `Budget` from an int of bytes, "1073741824", "512MiB", "2GiB", "1.5GB" (10^9) or "40%".

    Units are read without regard to case, and a space before the unit is allowed.
    Raises OptionError for anything else, bool and float included.
    """
    if isinstance(value, Budget):
        return value
    if isinstance(value, str):
        return _parse_size(value.strip())
    return Budget(bytes=_int_of_bytes(value))


def _int_of_bytes(value: Any) -> int:
    if isinstance(value, bool):
        raise _bad_budget(f"{value} is not a number of bytes")
    try:
        return operator.index(value)
    except TypeError:
        raise _bad_budget(f"{value!r} ({type(value).__name__}) is not a whole number of bytes") from None


def _parse_size(text: str) -> Budget:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise _bad_budget(f"{text!r} cannot be read as a size")
    number, unit = Fraction(match[1]), match[2].lower()
    if unit == "%":
        return Budget(fraction=number / 100)
    if not unit and number.denominator == 1:
        return Budget(bytes=int(number))
    if unit not in _UNITS:
        problem = f"has the unknown unit {match[2]!r}" if unit else "has no unit"
        raise _bad_budget(f"{text!r} {problem}")
    return Budget(bytes=int(number * _UNITS[unit]))


def _bad_budget(what: str) -> OptionError:
    return OptionError("Bad option: budget", what, _BUDGET_TODO)


@dataclass(frozen=True)
class Options:
    """How to plan. Use `Options.from_mapping` for values as users write them ("2GiB", a list of strategies).

    Attributes:
        budget: bound on the peak; None means the smallest peak within `max_slowdown`.
        max_slowdown: with no budget, the largest predicted step time relative to plain's, at least 1.
        strategies: what the planner may use, in the order of STRATEGIES.
        tolerance: largest predicted relative error of a parameter gradient that inversion may cause.
        lowering: "inductor" or "eager".
        profile: how times are predicted: "model" (rates of the device) or "measure" (operations are timed once).
    """

    budget: Budget | None = None
    max_slowdown: float = 1.5
    strategies: tuple[str, ...] = STRATEGIES
    tolerance: float = 1e-4
    lowering: str = "inductor"
    profile: str = "model"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name)))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Options:
        """Options from names and values as users write them. Raises OptionError for an unknown name or bad value."""
        if not isinstance(options, Mapping):
            what = f"the options are a {type(options).__name__}"
            raise OptionError("Bad options", what, 'write a dict such as {"budget": "2GiB"}')
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                what = f"there is no option {name!r}{nearest(name, names)}"
                raise OptionError("Unknown option", what, f"use one of {', '.join(names)}")
        return cls(**options)

    @property
    def splits(self) -> bool:
        """Whether large tensors may be computed in parts of their rows: sums are then added up in another order.

        Code that Inductor generates is not bitwise eager PyTorch's anyway: there, all strategies include this one.
        """
        if {"keep", "checkpoint"}.isdisjoint(self.strategies):
            return False
        return "split" in self.strategies or (self.lowering == "inductor" and self.strategies == STRATEGIES)

    def granting(self, size: int) -> Options:
        """The same, with the bytes that a part of plain's peak came to for other inputs."""
        if self.budget is None or self.budget.fraction is None:
            return self
        return replace(self, budget=replace(self.budget, granted=size))


def nearest(name: object, valid: Iterable[str]) -> str:
    """'; did you mean "budget"?' for the closest valid name, or an empty string if none comes near."""
    close = difflib.get_close_matches(str(name).lower(), list(valid), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def _check_budget(value: Any) -> Budget | None:
    return None if value is None else parse_bytes(value)


def _check_max_slowdown(value: Any) -> float:
    number = _number("max_slowdown", value)
    if not number >= 1:
        what = f"{value!r} is not at least 1"
        raise OptionError("Bad option: max_slowdown", what, "give a ratio to plain's time, as in 1.5")
    return number


def _check_tolerance(value: Any) -> float:
    number = _number("tolerance", value)
    if not 0 < number < math.inf:
        what = f"{value!r} is not a positive, finite number"
        raise OptionError("Bad option: tolerance", what, "give a relative error of the gradient, as in 1e-4")
    return number


def _number(option: str, value: Any) -> float:
    """Real numbers only: a bool or a string that happens to convert is more likely a mistake."""
    problem = OptionError(f"Bad option: {option}", f"{value!r} is not a number", "give a number")
    if isinstance(value, (bool, str)):
        raise problem
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise problem from None


def _check_strategies(value: Any) -> tuple[str, ...]:
    """A tuple in the order of STRATEGIES, without repetitions; a string is read as names with commas between."""
    known = (*STRATEGIES, *ON_REQUEST)
    title, todo = "Bad option: strategies", f"give a non-empty subset of {', '.join(known)}"
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if isinstance(names, Mapping) or not isinstance(names, Iterable):
        raise OptionError(title, f"{value!r} is not a sequence of names", todo)
    names = list(names)
    for name in names:
        if name not in known:
            raise OptionError(title, f"there is no strategy {name!r}{nearest(name, known)}", todo)
    if not set(names).intersection(STRATEGIES):
        raise OptionError(title, "no strategy is left to the planner", todo)
    return tuple(name for name in known if name in names)


def _one_of(option: str, valid: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in valid:
            what = f"there is no {option} {value!r}{nearest(value, valid)}"
            raise OptionError(f"Bad option: {option}", what, f"use one of {', '.join(valid)}")
        return str(value)

    return check


_CHECKS = {
    "budget": _check_budget,
    "max_slowdown": _check_max_slowdown,
    "strategies": _check_strategies,
    "tolerance": _check_tolerance,
    "lowering": _one_of("lowering", LOWERINGS),
    "profile": _one_of("profile", PROFILES),
}
