"""Derivatives that vanish somewhere: what they erase of a cotangent, or nearly so, is kept as a fragment.

The fragment holds its own mask, as bits: the sweep computes the forward values again, and where another kernel rounds
them differently, an element on the threshold must not change sides. Outside the mask the cotangent is divided by the
derivative, which is what the backward operation makes of ones.

How much a fragment will hold only the values decide. What is expected is what standard normal ones give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..bits import pack_bits, put_marked, take_marked
from ..graph import Ref, map_refs, refs_in
from .pointwise import is_nonzero, solvable
from .rule import Call, Recipe, Rule

SMALL = 0.3  # derivatives below this part of the largest are not divided by: GELU then keeps 40%, at a growth of 0.80
FAINT = 0.5  # of a derivative of unknown scale: below this part of its root mean square
FAINT_PART = (0.42, 0.24)  # how much that is of one factor, and of two together
FLAT = 0.45  # a slope below this is as good as zero: dividing by it would double the noise

Marks = Callable[..., Tensor]  # from what a call reads beside its cotangent: bits that say where that is erased


def take(cotangent: Tensor, marks: Tensor, expected: float) -> tuple[Tensor, Tensor]:
    """The fragment: bits that say where, and the elements there; `expected` is the part of all that they are."""
    return marks, take_marked(cotangent, marks, expected)


def faint(squares: Tensor) -> Tensor:
    """Where squared derivatives are small among their like."""
    return pack_bits(squares <= squares.mean(dtype=torch.float32) * FAINT**2)


def normal_part(low: float, high: float, slack: float = 0.05) -> float:
    """The part of standard normal values outside of an interval, and some more."""
    inside = max(0.0, math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return min(1.0, 1 - inside + slack)


def _reads(call: Call, cotangent: int = 0) -> tuple[int, ...]:
    """What the call reads beside its cotangent, each once."""
    slots = dict.fromkeys(ref.slot for ref in refs_in((call.args, call.kwargs)))
    return tuple(slot for slot in slots if slot != call.args[cotangent].slot)


def derivative(call: Call, like: int = 1) -> Callable[..., Tensor]:
    """What a call that is linear in its first argument makes of ones; a function of what it reads beside that."""
    reads, operator = _reads(call), getattr(torch.ops.aten, call.name)
    cotangent, shape = call.args[0].slot, list(call.tensors[call.args[0].slot].shape)

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(reads, values, strict=True))
        given[cotangent] = torch.ones_like(values[0]) if like else values[0].new_ones(shape)
        args, kwargs = map_refs((call.args, dict(call.kwargs)), lambda ref: given[ref.slot])
        found = operator(*args, **kwargs)
        return found if isinstance(found, Tensor) else found[0]

    return function


def _unmarked(call: Call, marks: Marks, expected: float, restore: Callable[..., Tensor] | None = None) -> Recipe:
    """The cotangent of a call is `restore(g, *reads)`, but what the fragment holds where there are marks."""
    position, reads = call.args[0].slot, _reads(call)

    def function(g: Tensor, *values: Tensor) -> Tensor:
        *read, marked, taken = values
        return put_marked(g if restore is None else restore(g, *read), marked, taken)

    return Recipe(
        (position,),
        function,
        reads if restore is not None else (),
        fragment=lambda h, *read: take(h, marks(*read), expected),
        fragment_reads=reads,
    )


def _erasing(
    marks: Callable[[Call], Marks],
    expected: Callable[[Call], float],
    restore: Callable[[Call], Callable[..., Tensor]] | None = None,
    bounded: bool = False,
) -> Rule:
    """Rules of one cotangent, the first argument. With `bounded`, the derivative is nowhere exactly zero: without
    fragments it may be divided by everywhere, where values are small enough."""

    def rule(call: Call) -> Iterator[Recipe]:
        position = solvable(call, 0)
        if position is None or call.tensor(0) is None:
            return
        if bounded:
            divide = derivative(call)
            yield Recipe((position,), lambda g, *read: g / divide(*read), _reads(call), fragile=True)
        yield _unmarked(call, marks(call), expected(call), None if restore is None else restore(call))

    return rule


def _divided(call: Call) -> Callable[..., Tensor]:
    slope = derivative(call)
    return lambda g, *read: g / slope(*read)


def _below(limit: float) -> Marks:
    """Where the (first) value lies below a limit."""
    return lambda x, *_: pack_bits(x, -math.inf, limit)


def _outside(low: float, high: float) -> Marks:
    return lambda x: pack_bits((x <= low).logical_or(x >= high))


# -- activations with a kink -----------------------------------------------------------------------------------------


def leaky_relu_backward(call: Call) -> Iterator[Recipe]:
    """g = h where x > 0, else slope h. A slope near zero (or a steep one) is taken for ReLU's."""
    slope, is_result = call.args[2], call.args[3]
    position = solvable(call, 0)
    if position is None or not is_nonzero(slope) or slope <= 0:
        return
    level = min(slope, 1 / slope)
    yield Recipe(
        (position,),
        lambda g, x: torch.ops.aten.leaky_relu_backward(g, x, 1 / slope, is_result),
        _reads(call),
        fragile=level < FLAT,
    )
    if level < FLAT:
        yield _unmarked(call, lambda x: pack_bits(x <= 0), normal_part(0, math.inf))


def prelu_backward(call: Call) -> Iterator[Recipe]:
    """The same with a slope that is a value: no shape says that it is not zero, but dividing by zero is not silent."""
    position, weight = solvable(call, 0), call.tensor(2)
    if position is None or weight is None:
        return
    yield Recipe((position,), lambda g, x, w: torch.where(x > 0, g, g / w), _reads(call), fragile=True)
    yield _unmarked(call, lambda x, w: pack_bits(x <= 0), normal_part(0, math.inf))


# -- masks -----------------------------------------------------------------------------------------------------------


def dropout_backward(call: Call) -> Iterator[Recipe]:
    """g = h mask scale. The mask is kept anyway, as bits: it says what was erased."""
    position, scale = solvable(call, 0), call.args[2]
    if position is None or not is_nonzero(scale) or scale < 1:
        return
    rate, count = 1 - 1 / scale, max(1, call.tensors[position].numel())
    expected = min(1.0, rate + 4 * math.sqrt(rate * (1 - rate) / count))  # four standard deviations
    yield Recipe(
        (position,),
        lambda g, mask, taken: put_marked(g / scale, pack_bits(~mask), taken),
        (call.args[1].slot,),
        fragment=lambda h, mask: (take_marked(h, pack_bits(~mask), expected),),
        fragment_reads=(call.args[1].slot,),
    )


def _masked(call: Call, argument: int, mask: int, erased_where: bool, expected: float = 0.55) -> Iterator[Recipe]:
    """What stands at `argument` shows where the mask is not `erased_where`."""
    position, chooser = solvable(call, argument), call.tensor(mask)
    if position is None or chooser is None or chooser.dtype != torch.bool:
        return

    def fragment(h: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
        erased = chosen if erased_where else ~chosen
        return take(h, pack_bits(erased.expand_as(h)), expected)

    yield Recipe((position,), put_marked, fragment=fragment, fragment_reads=(call.args[mask].slot,))


def where(call: Call) -> Iterator[Recipe]:
    """Either side, where the other is taken. clamp's gradient is one of these."""
    if len(call.args) == 3:
        yield from _masked(call, 1, 0, erased_where=False)
        yield from _masked(call, 2, 0, erased_where=True)


def masked_fill(call: Call) -> Iterator[Recipe]:
    yield from _masked(call, 0, 1, erased_where=True)


def glu_backward(call: Call) -> Iterator[Recipe]:
    """Both halves hold h, times the gate and times the gate's slope."""
    cotangent, source, dim = call.tensor(0), call.tensor(1), call.args[2]
    if cotangent is None or source is None or not cotangent.is_floating_point():
        return
    slope = derivative(call, like=0)

    def squares(x: Tensor) -> Tensor:
        return _halves(slope(x).square(), dim)

    def divide(g: Tensor, x: Tensor) -> Tensor:
        slopes = slope(x)
        return _halves(g * slopes, dim) / _halves(slopes * slopes, dim)

    yield Recipe((call.args[0].slot,), divide, _reads(call), fragile=True)
    yield _unmarked(call, lambda x: faint(squares(x)), FAINT_PART[1], divide)


def _halves(tensor: Tensor, dim: int) -> Tensor:
    first, second = tensor.chunk(2, dim)
    return first + second


# -- the table -------------------------------------------------------------------------------------------------------


def _constants(call: Call) -> list[Any]:
    return [argument for argument in call.args if not isinstance(argument, Ref)]


def _rising(limit: float, expected: float) -> Rule:
    """GELU and its like: the derivative is below `SMALL` exactly where x is below `limit`, and vanishes there."""
    return _erasing(lambda call: _below(limit), lambda call: expected, _divided)


def _faintly(call: Call) -> Marks:
    slope = derivative(call)
    return lambda *read: faint(slope(*read).square())


def _increasing(rule: Rule, positive: int) -> Rule:
    """`rule` where the first `positive` constants are positive numbers."""

    def guarded(call: Call) -> Iterator[Recipe]:
        if all(is_nonzero(constant) and constant > 0 for constant in _constants(call)[:positive]):
            yield from rule(call)

    return guarded


RULES: dict[str, Rule] = {
    "threshold_backward": _erasing(
        lambda call: lambda x: pack_bits(x <= call.args[2]), lambda call: normal_part(call.args[2], math.inf)
    ),
    "hardtanh_backward": _erasing(
        lambda call: _outside(*_constants(call)[:2]), lambda call: normal_part(*_constants(call)[:2])
    ),
    "hardsigmoid_backward": _erasing(lambda call: _outside(-3, 3), lambda call: normal_part(-3, 3), _divided),
    "hardswish_backward": _rising(-0.6, 0.29),
    "gelu_backward": _rising(-0.2562, 0.42),
    "silu_backward": _rising(-0.4113, 0.36),
    "mish_backward": _rising(-0.4815, 0.34),
    "leaky_relu_backward": leaky_relu_backward,
    "_prelu_kernel_backward": prelu_backward,
    "native_dropout_backward": dropout_backward,
    "glu_backward": glu_backward,
    "where": where,
    "masked_fill": masked_fill,
    "tanh_backward": _erasing(
        lambda call: lambda y: pack_bits(y.abs() > math.sqrt(1 - SMALL)), lambda call: 0.25, _divided, bounded=True
    ),
    "sigmoid_backward": _erasing(
        lambda call: lambda y: pack_bits((y - 0.5).abs() > math.sqrt(1 - SMALL) / 2),
        lambda call: 0.05,
        _divided,
        bounded=True,
    ),
    "softplus_backward": _increasing(
        _erasing(
            lambda call: _below(math.log(SMALL / (1 - SMALL)) / call.args[2]), lambda call: 0.22, _divided, bounded=True
        ),
        positive=1,
    ),
    "elu_backward": _increasing(_erasing(_faintly, lambda call: 0.2, _divided, bounded=True), positive=3),
    "log_sigmoid_backward": _erasing(
        lambda call: lambda x, *_: pack_bits(x, -math.log(SMALL / (1 - SMALL)), math.inf),
        lambda call: 0.1,
        _divided,
        bounded=True,
    ),
}
