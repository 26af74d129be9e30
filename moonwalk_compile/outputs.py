"""What of a model's outputs a training step needs: the others are not returned, and nothing is held for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import OptionError, UsageError

Wanted = tuple[str | int, ...]
TODO = 'name outputs as the model does ("loss"), or by position (0)'


def check_outputs(value: Any) -> Wanted | None:
    """A tuple of names and positions; one of them need not stand in a list."""
    if value is None:
        return None
    names = [value] if isinstance(value, (str, int)) else value
    if isinstance(names, Mapping) or not isinstance(names, Iterable):
        raise OptionError("Bad option: outputs", f"{value!r} is not a sequence of names", TODO)
    names = tuple(names)
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise OptionError("Bad option: outputs", f"{name!r} is neither a name nor a position", TODO)
    if not names:
        raise OptionError("Bad option: outputs", "no output is left to train on", TODO)
    return names


def with_outputs(function: Callable[..., Any], wanted: Wanted | None) -> Callable[..., Any]:
    """`function` with None for all other outputs."""
    if wanted is None:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return only(function(*args, **kwargs), wanted)

    return call


def only(result: Any, wanted: Wanted) -> Any:
    """The same kind of result, with None in place of what is not wanted."""
    found = _entries(result)
    missing = [name for name in wanted if name not in found]
    if missing:
        names = ", ".join(map(repr, found)) or "nothing that has a name"
        raise UsageError("There is no such output", f"{missing[0]!r} is not among {names}", TODO)
    made: Callable[..., Any] = type(result)
    entries = {name: value if name in wanted else None for name, value in found.items()}
    if dataclasses.is_dataclass(result):  # transformers' outputs are mappings too, and set these up themselves
        return made(**{str(name): value for name, value in entries.items()})
    if isinstance(result, Mapping):
        return made(entries)
    return made(*entries.values()) if hasattr(result, "_fields") else made(entries.values())


def loss_in(result: Any) -> Any:
    """The loss of a model that returns one beside other things, else what it returned."""
    return _entries(result).get("loss", result)


def _entries(result: Any) -> dict[str | int, Any]:
    """What a model returned, by name or position."""
    if isinstance(result, Mapping):
        return dict(result)
    if dataclasses.is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, (tuple, list)):
        return dict(zip(getattr(result, "_fields", range(len(result))), result, strict=True))
    return {}
