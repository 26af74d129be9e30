"""Residuals that take one bit per element: results that have two values, and readers that only ask for a side."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph import Edge, Ref, refs_in
from .rule import Call, Packing

# -- results -------------------------------------------------------------------------------------------------------


def _zero_or_one(note: str) -> Packing:
    return Packing(1.0, 0.0, True, note)


def _bernoulli(call: Call, result: Tensor) -> Packing | None:
    return _zero_or_one("drawn 0 or 1")


def _converted(call: Call, result: Tensor) -> Packing | None:
    source = call.tensor(0)
    return _zero_or_one("converted bool") if source is not None and source.dtype == torch.bool else None


def _sign(call: Call, result: Tensor) -> Packing | None:
    """Not exact: where the argument is exactly zero, another subgradient is taken than torch's."""
    if not result.dtype.is_floating_point:
        return None
    return Packing(1.0, -1.0, False, "sign; an exact zero counts as negative", of_argument=True)


def _index_of_pair(call: Call, result: Tensor) -> Packing | None:
    """Positions along a dimension of two elements."""
    source = call.tensor(0)
    sizes = source.shape if source is not None else ()
    dim = call.constant("dim", 2 if call.name == "topk" else 1, -1)
    pair = isinstance(dim, int) and len(sizes) > 0 and sizes[dim] == 2 and result.dtype == torch.int64
    return _zero_or_one("index of a pair") if pair else None


# By operation, the position of the result that has two values.
_RESULTS: dict[str, tuple[int, Callable[[Call, Tensor], Packing | None]]] = {
    "bernoulli": (0, _bernoulli),
    "_to_copy": (0, _converted),
    "sgn": (0, _sign),
    "sign": (0, _sign),
    "argmax": (0, _index_of_pair),
    "argmin": (0, _index_of_pair),
    "sort": (1, _index_of_pair),
    "max": (1, _index_of_pair),
    "min": (1, _index_of_pair),
    "topk": (1, _index_of_pair),
}


def packing_of_value(call: Call, position: int = 0) -> Packing | None:
    """How a result can be kept in bits; `position` counts the results that are read, as `Edge.gives` does."""
    given = [(place, output) for place, output in enumerate(call.outputs) if isinstance(output, Tensor)]
    if position >= len(given):
        return None
    place, output = given[position]
    if output.dtype == torch.bool:
        return Packing(1.0, 0.0, True, "bool")
    wanted, function = _RESULTS.get(call.name, (None, None))
    return function(call, output) if function is not None and wanted == place else None


# Results that jump where an argument moves a little; so do those that are no floating-point numbers.
_JUMPING = {"sgn", "sign", "round", "floor", "ceil", "trunc", "frac", "fmod", "remainder", "heaviside"}


def jumps(label: str, dtype: str) -> bool:
    """Whether the result of an operation tells one side of a threshold from the other: a mask, an index, a sign."""
    return not dtype.startswith(("float", "bfloat", "complex")) or label in _JUMPING


# -- readers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """A reader of `args[argument]` that asks on which side of two numbers it lies; and a number on either side.

    All three follow from the call's constants.
    """

    argument: int
    between: Callable[[list[Any]], tuple[float, float | None]]
    inside: Callable[[list[Any]], float]
    outside: Callable[[list[Any]], float]


def _beyond(limit: float) -> float:
    """A number above `limit`, by more than a rounding error in any dtype."""
    return limit + max(1.0, abs(limit))


_READERS: dict[str, _Reader] = {
    "leaky_relu_backward": _Reader(1, lambda c: (0.0, None), lambda c: 1.0, lambda c: -1.0),
    "threshold_backward": _Reader(1, lambda c: (c[0], None), lambda c: _beyond(c[0]), lambda c: -_beyond(-c[0])),
    "hardtanh_backward": _Reader(1, lambda c: (c[0], c[1]), lambda c: (c[0] + c[1]) / 2, lambda c: _beyond(c[1])),
    "hardsigmoid_backward": _Reader(1, lambda c: (-3.0, 3.0), lambda c: 0.0, lambda c: 6.0),
}


def packing_of_reader(call: Call, position: int) -> Packing | None:
    """What a reader needs of `tensors[position]`, if a bit per element is enough; the stand-in has the same dtype."""
    reader = _READERS.get(call.name)
    if reader is None or call.args[reader.argument] != Ref(position):
        return None
    constants = [arg for arg in call.args[reader.argument + 1 :] if not isinstance(arg, Ref)]
    tensor = call.tensors[position]
    if [ref.slot for ref in refs_in((call.args, call.kwargs))].count(position) > 1 or not tensor.is_floating_point():
        return None
    high, low = reader.inside(constants), reader.outside(constants)
    return Packing(high, low, False, f"side of {call.name} {constants}", reader.between(constants))


# Other operations whose result jumps where an argument crosses a threshold: which argument.
_KINKS = {
    "_prelu_kernel_backward": 1,
    "elu_backward": 5,
    "hardshrink_backward": 1,
    "hardswish_backward": 1,
    "rrelu_with_noise_backward": 1,
    "softshrink_backward": 1,
}


def kinks(edge: Edge) -> Set[int]:
    """The values at which the results of an edge may jump; of unknown operations, at every one."""
    if "::" in edge.label:
        return set() if edge.label.startswith(("prims::", "moonwalk_compile::")) else {*edge.needs}
    argument = _KINKS.get(edge.label)
    if argument is None:
        return set()
    arguments = edge.operations[0].args
    smooth = edge.label == "elu_backward" and arguments[1] * arguments[3] == 1
    return set() if smooth else {edge.needs[ref.slot] for ref in refs_in(arguments[argument])}
