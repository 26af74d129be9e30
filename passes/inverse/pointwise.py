"""Elementwise operations: solved where the map is injective on its whole domain, or linear in the solved argument.

Refused, because a principal branch would be silently wrong: sin, cos, square, pow, abs, ReLU, GELU, SiLU. PReLU is
refused as well: its slope is a parameter, and no shape proves it positive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..graph import Ref
from .rule import Call, Recipe, Rule


def solvable(call: Call, argument: int) -> int | None:
    """The position of the tensor at `args[argument]`, if it was neither broadcast nor promoted nor integer."""
    place = call.args[argument] if argument < len(call.args) else None
    output = call.outputs[0] if call.outputs else None
    if not isinstance(place, Ref) or output is None:
        return None
    tensor = call.tensors[place.slot]
    plain = tensor.is_floating_point() and tensor.dtype == output.dtype and tensor.shape == output.shape
    return place.slot if plain else None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_nonzero(value: Any) -> bool:
    """A finite number other than zero."""
    return is_number(value) and value != 0 and abs(value) != float("inf") and value == value


def _with_other(
    call: Call, argument: int, function: Callable[[Tensor, Any], Tensor], note: str = ""
) -> Iterator[Recipe]:
    """A recipe for `args[argument]` of a binary call; `function(output, other)` with the other tensor or number."""
    position = solvable(call, argument)
    other = call.args[1 - argument]
    if position is None:
        return
    if isinstance(other, Ref) and call.tensors[other.slot].dtype != torch.bool:
        yield Recipe((position,), function, (other.slot,), note=note)
    elif is_number(other):
        yield Recipe((position,), lambda y: function(y, other), note=note)


def add(call: Call) -> Iterator[Recipe]:
    """y = a + alpha b."""
    alpha = call.constant("alpha", 2, 1)
    if is_nonzero(alpha):
        yield from _with_other(call, 0, lambda y, b: torch.sub(y, b, alpha=alpha))
        yield from _with_other(call, 1, lambda y, a: (y - a) if alpha == 1 else (y - a) / alpha)


def sub(call: Call) -> Iterator[Recipe]:
    """y = a - alpha b."""
    alpha = call.constant("alpha", 2, 1)
    if is_nonzero(alpha):
        yield from _with_other(call, 0, lambda y, b: torch.add(y, b, alpha=alpha))
        yield from _with_other(call, 1, lambda y, a: (a - y) if alpha == 1 else (a - y) / alpha)


def rsub(call: Call) -> Iterator[Recipe]:
    """y = b - alpha a."""
    alpha = call.constant("alpha", 2, 1)
    if is_nonzero(alpha):
        yield from _with_other(call, 0, lambda y, b: (b - y) if alpha == 1 else (b - y) / alpha)
        yield from _with_other(call, 1, lambda y, a: torch.add(y, a, alpha=alpha))


def mul(call: Call) -> Iterator[Recipe]:
    """y = a b. By a tensor: where it is not zero, which only the certificate can see."""
    for argument in (0, 1):
        other = call.args[1 - argument]
        if isinstance(other, Ref) or is_nonzero(other):
            yield from _with_other(call, argument, lambda y, other: y / other, "by a factor that may be zero")


def div(call: Call) -> Iterator[Recipe]:
    """y = a / b, without rounding."""
    if call.kwargs.get("rounding_mode") is not None:
        return
    if isinstance(call.args[1], Ref) or is_nonzero(call.args[1]):
        yield from _with_other(call, 0, lambda y, b: y * b)
    yield from _with_other(call, 1, lambda y, a: a / y, "by a quotient that may be zero")


def leaky_relu(call: Call) -> Iterator[Recipe]:
    """A positive slope keeps the sign, so the inverse is the same function with the reciprocal slope."""
    slope = call.constant("negative_slope", 1, 0.01)
    position = solvable(call, 0)
    if position is not None and is_nonzero(slope) and slope > 0:
        yield Recipe((position,), lambda y: torch.ops.aten.leaky_relu(y, 1 / slope))


def leaky_relu_backward(call: Call) -> Iterator[Recipe]:
    """g = h where x > 0, else slope h."""
    slope, is_result = call.args[2], call.args[3]
    position = solvable(call, 0)
    source = call.args[1]
    if position is not None and is_nonzero(slope) and slope > 0:
        yield Recipe(
            (position,),
            lambda g, x: torch.ops.aten.leaky_relu_backward(g, x, 1 / slope, is_result),
            (source.slot,),
        )


def _unary(inverse: Callable[[Tensor], Tensor]) -> Rule:
    def rule(call: Call) -> Iterator[Recipe]:
        position = solvable(call, 0)
        if position is not None:
            yield Recipe((position,), inverse)

    return rule


def _backward_by_result(derivative: Callable[[Tensor], Tensor]) -> Rule:
    """g = h f'(x) with f' computed from the result y, the second argument."""

    def rule(call: Call) -> Iterator[Recipe]:
        position = solvable(call, 0)
        if position is not None and isinstance(call.args[1], Ref):
            yield Recipe((position,), lambda g, y: g / derivative(y), (call.args[1].slot,))

    return rule


RULES: dict[str, Rule] = {
    "add": add,
    "sub": sub,
    "rsub": rsub,
    "mul": mul,
    "div": div,
    "neg": _unary(torch.neg),
    "reciprocal": _unary(torch.reciprocal),
    "exp": _unary(torch.log),
    "log": _unary(torch.exp),
    "expm1": _unary(torch.log1p),
    "log1p": _unary(torch.expm1),
    "sqrt": _unary(lambda y: y * y),
    "rsqrt": _unary(lambda y: 1 / (y * y)),
    "tanh": _unary(torch.atanh),
    "atanh": _unary(torch.tanh),
    "sigmoid": _unary(torch.logit),
    "sinh": _unary(torch.asinh),
    "asinh": _unary(torch.sinh),
    "atan": _unary(torch.tan),
    "leaky_relu": leaky_relu,
    "leaky_relu_backward": leaky_relu_backward,
    "tanh_backward": _backward_by_result(lambda y: (1 - y) * (1 + y)),
    "sigmoid_backward": _backward_by_result(lambda y: y * (1 - y)),
}
