"""What the command line plans: TARGET ("file.py:callable") and SPEC ("f32[8,3,224,224]")."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .errors import UsageError
from .inputs import Arguments
from .options import nearest
from .usercode import reporting_user_code

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
_SPEC = re.compile(
    r"(?:(?P<name>[^\W\d]\w*)=)?(?P<dtype>\w+)\[(?P<shape>[^\[\]]*)\](?:<(?P<high>[0-9]{1,20}))?", re.ASCII
)
_SPEC_TODO = (
    "write a dtype and a shape, as in f32[8,3,224,224], or i64[4,128]<50257 for integers below 50257; "
    "in front of it, a name for an argument by name, as in labels=i64[4,128]<50257"
)
_TARGET_TODO = "write package.module:callable or path/to/file.py:callable"


@dataclass(frozen=True)
class InputSpec:
    """A tensor to make: its dtype, its shape, for integers the bound that all values stay below; and the argument that
    it is for, where that is named."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    high: int | None = None
    name: str | None = None

    def make(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Normal values for floats, uniform ones in [0, high) for integers and bools (high is 2 if not given)."""
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, dtype=self.dtype, generator=generator)
        return torch.randint(self.high or 2, self.shape, dtype=self.dtype, generator=generator)


def parse_specs(texts: Iterable[str]) -> list[InputSpec]:
    """The inputs of a model, each described once. Raises UsageError."""
    specs = [parse_spec(text) for text in texts]
    names = [spec.name for spec in specs if spec.name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise _bad_spec(twice, "is given twice", "describe each input once")
    return specs


def parse_spec(text: str) -> InputSpec:
    """ "i64[4,128]<50257" -> InputSpec(torch.int64, (4, 128), 50257). Raises UsageError."""
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise _bad_spec(text, "does not look like DTYPE[SIZE,...]", _SPEC_TODO)
    dtype = DTYPES.get(match["dtype"])
    if dtype is None:
        problem = f"has the unknown dtype {match['dtype']!r}{nearest(match['dtype'], DTYPES)}"
        raise _bad_spec(text, problem, f"use one of {', '.join(DTYPES)}")
    shape, high = _parse_shape(text, match["shape"], dtype), _parse_high(text, match["high"], dtype)
    return InputSpec(dtype, shape, high, match["name"])


def _parse_shape(text: str, shape: str, dtype: torch.dtype) -> tuple[int, ...]:
    sizes = [size.strip() for size in shape.split(",")] if shape.strip() else []
    for size in sizes:
        if not re.fullmatch("[0-9]{1,18}", size) or int(size) == 0:
            raise _bad_spec(text, f"has the size {size!r}", "every size is an integer of 1 or more")
    numbers = tuple(map(int, sizes))
    if math.prod(numbers) * dtype.itemsize >= 2**63:
        raise _bad_spec(text, "is larger than any tensor can be", "check the sizes")
    return numbers


def _parse_high(text: str, high: str | None, dtype: torch.dtype) -> int | None:
    if high is None:
        return None
    if dtype.is_floating_point or dtype == torch.bool:
        raise _bad_spec(text, "bounds values that are not integers", "leave the bound out, or use an integer dtype")
    largest = torch.iinfo(dtype).max
    if not 1 <= int(high) <= largest:
        raise _bad_spec(text, f"has the bound {high}", f"for this dtype it lies between 1 and {largest}")
    return int(high)


def _bad_spec(text: str, problem: str, todo: str) -> UsageError:
    return UsageError("Bad input spec", f"{text!r} {problem}", todo)


@dataclass(frozen=True)
class Target:
    """A loaded TARGET: a module instance, a class, or a function that returns a model or (model, example_inputs)."""

    text: str
    value: Any

    def build(self, specs: Sequence[InputSpec] = ()) -> tuple[nn.Module, Arguments]:
        """The model and its example inputs, those of `specs` if there are any.

        Call it under FakeTensorMode to allocate nothing. Raises UsageError if there is no model or no input.
        """
        model, inputs = self._model_and_inputs()
        if specs:
            by_position = tuple(spec.make() for spec in specs if spec.name is None)
            inputs = Arguments(by_position, {spec.name: spec.make() for spec in specs if spec.name is not None})
        if not inputs:
            todo = "describe the inputs with --input, as in --input 'f32[8,3,224,224]', or return (model, inputs)"
            raise UsageError("No example input", f"{self.text} gives a model without inputs", todo)
        return model, inputs

    def _model_and_inputs(self) -> tuple[nn.Module, Arguments]:
        if isinstance(self.value, nn.Module):
            return self.value, Arguments()
        with reporting_user_code(f"calling {self.text}", self.text):
            result = self.value()
        if isinstance(result, nn.Module):
            return result, Arguments()
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
            if not isinstance(result[1], (tuple, list, Mapping, torch.Tensor)):
                raise self._bad_result(f"example inputs as a {_describe(result[1])}")
            return result[0], Arguments.of(result[1])
        raise self._bad_result(f"a {_describe(result)}")

    def _bad_result(self, got: str) -> UsageError:
        kinds = "a tensor, a tuple of them, or a dict of arguments by name"
        todo = f"return a torch.nn.Module, or (model, inputs) where inputs is {kinds}"
        return UsageError("Not a model", f"{self.text} returned {got}", todo)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return type(value).__name__


def load_target(text: str) -> Target:
    """Import what `text` names, without calling it.

    The current folder (for modules) or the file's own folder (for files) goes to the front of sys.path, as it
    does when Python runs a module or a file. Raises UsageError.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise UsageError("Bad target", f"{text!r} does not have the form MODULE:NAME", _TARGET_TODO)
    looks_like_file = place.endswith(".py") or "/" in place or "\\" in place
    module = _load_file(Path(place)) if looks_like_file else _load_module(place)
    return Target(text, _callable_without_arguments(text, _look_up(module, place, name)))


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError("Bad target", f"there is no file {str(path)!r}", _TARGET_TODO)
    # A prefix of its own, so that a user's torch.py or numbers.py shadows nothing.
    name = f"moonwalk_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError("Bad target", f"{str(path)!r} is not a Python file", _TARGET_TODO)
    _prepend_to_path(path.resolve().parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with reporting_user_code(f"importing {path}", str(path)):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError("Bad target", f"{name!r} is neither a module's name nor a .py file", _TARGET_TODO)
    _prepend_to_path(Path.cwd())
    with reporting_user_code(f"importing {name}", name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, but something that it imports is not
            todo = "run where it can be imported, or name a file: path/to/file.py:callable"
            raise UsageError("Bad target", f"there is no module {error.name!r}", todo) from None


def _prepend_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _look_up(module: ModuleType, place: str, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        names = vars(value) if isinstance(value, (ModuleType, type)) else dir(value)
        try:
            value = getattr(value, part)
        except AttributeError:
            public = [other for other in names if not other.startswith("_")]
            todo = "name a model, a class, or a function that returns a model"
            raise UsageError("Bad target", f"{place} has no {name!r}{nearest(part, public)}", todo) from None
    return value


def _callable_without_arguments(text: str, value: Any) -> Any:
    """`value`, checked. What is called here needs no arguments; a module instance is not called at all."""
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        what = f"{text} is a {type(value).__name__}, which cannot be called"
        raise UsageError("Bad target", what, "name a model, a class, or a function that returns a model")
    required = _required_parameters(value)
    if required:
        what = f"{text} needs arguments: {', '.join(required)}"
        raise UsageError("Bad target", what, "name a function without arguments that builds the model")
    return value


def _required_parameters(value: Any) -> list[str]:
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
