"""Elementwise operations: solved where the map is injective on its whole domain, or linear in the solved argument.

Refused, because a principal branch would be silently wrong: sin, cos, square, pow, abs, ReLU, GELU, SiLU. PReLU is
refused as well: its slope is a parameter, and no shape proves it positive. Their cotangents are `erasing`'s.
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
    call: Call, argument: int, function: Callable[[Tensor, Any], Tensor], divides: bool = False
) -> Iterator[Recipe]:
    """A recipe for `args[argument]` of a binary call; `function(output, other)` with the other tensor or number."""
    position = solvable(call, argument)
    other = call.args[1 - argument]
    if position is None:
        return
    if isinstance(other, Ref) and call.tensors[other.slot].dtype != torch.bool:
        activations = call.tensors[other.slot].shape == call.tensors[position].shape
        note = "divides by what may be zero" if divides else ""
        yield Recipe((position,), function, (other.slot,), note=note, fragile=divides and activations)
    elif is_number(other):
        yield Recipe((position,), lambda y: function(y, other))


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
            yield from _with_other(call, argument, lambda y, other: y / other, divides=True)
            yield from _broadcast_factor(call, argument)


def _broadcast_factor(call: Call, argument: int) -> Iterator[Recipe]:
    """A factor that was broadcast shows in many elements, so that zeros among the others (a mask) do no harm."""
    factor, other, output = call.tensor(argument), call.tensor(1 - argument), call.outputs[0]
    if factor is None or other is None or output is None or factor.shape == output.shape:
        return
    if factor.dtype != output.dtype or other.dtype not in (output.dtype, torch.bool) or not output.numel():
        return
    shape = factor.shape

    def function(y: Tensor, b: Tensor) -> Tensor:
        weight = b.to(y.dtype).expand_as(y)
        return (y * weight).sum_to_size(shape) / (weight * weight).sum_to_size(shape)

    yield Recipe((call.args[argument].slot,), function, (call.args[1 - argument].slot,))


def div(call: Call) -> Iterator[Recipe]:
    """y = a / b, without rounding."""
    if call.kwargs.get("rounding_mode") is not None:
        return
    if isinstance(call.args[1], Ref) or is_nonzero(call.args[1]):
        yield from _with_other(call, 0, lambda y, b: y * b)
    yield from _with_other(call, 1, lambda y, a: a / y, divides=True)


def leaky_relu(call: Call) -> Iterator[Recipe]:
    """A positive slope keeps the sign, so the inverse is the same function with the reciprocal slope."""
    slope = call.constant("negative_slope", 1, 0.01)
    position = solvable(call, 0)
    if position is not None and is_nonzero(slope) and slope > 0:
        yield Recipe((position,), lambda y: torch.ops.aten.leaky_relu(y, 1 / slope))


def _unary(inverse: Callable[[Tensor], Tensor]) -> Rule:
    def rule(call: Call) -> Iterator[Recipe]:
        position = solvable(call, 0)
        if position is not None:
            yield Recipe((position,), inverse)

    return rule


def softplus(call: Call) -> Iterator[Recipe]:
    """Above the threshold (of beta x) it is the identity; where that is low, the two parts take the same values."""
    beta, threshold = call.constant("beta", 1, 1), call.constant("threshold", 2, 20)
    position = solvable(call, 0)
    if position is not None and is_nonzero(beta) and beta > 0 and threshold >= 20:
        yield Recipe((position,), lambda y: y + torch.log(-torch.expm1(-beta * y)) / beta)


def elu(call: Call) -> Iterator[Recipe]:
    yield from _elu(call, *(call.constant(*c) for c in (("alpha", 1, 1), ("scale", 2, 1), ("input_scale", 3, 1))))


def celu(call: Call) -> Iterator[Recipe]:
    alpha = call.constant("alpha", 1, 1.0)
    if is_nonzero(alpha):
        yield from _elu(call, alpha, 1, 1 / alpha)


def _elu(call: Call, alpha: float, scale: float, input_scale: float) -> Iterator[Recipe]:
    """y = scale x above zero, else scale alpha (exp(input_scale x) - 1). Near its lower bound, y says nothing of x."""
    position = solvable(call, 0)
    if position is not None and all(is_nonzero(constant) and constant > 0 for constant in (alpha, scale, input_scale)):
        yield Recipe(
            (position,),
            lambda y: torch.where(y > 0, y / scale, torch.log1p(y / (scale * alpha)) / input_scale),
        )


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
    "erf": _unary(torch.erfinv),
    "leaky_relu": leaky_relu,
    "softplus": softplus,
    "elu": elu,
    "celu": celu,
    "log_sigmoid_forward": _unary(lambda y: y - torch.log(-torch.expm1(y))),
}
