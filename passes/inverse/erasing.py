"""Derivatives that are zero somewhere: what they erase of a cotangent is kept as a fragment.

The fragment holds its own mask, as bits: the sweep computes the forward values again, and where another kernel rounds
them differently, an element on the threshold must not change sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from ..bits import pack_bits, put_marked, take_marked
from .pointwise import solvable
from .rule import Call, Recipe, Rule

Erased = Callable[[Call], Callable[[Tensor], Tensor]]  # from a call's constants to "where is its argument erased?"


def take(cotangent: Tensor, erased: Tensor, expected: float) -> tuple[Tensor, Tensor]:
    """The fragment: bits that say where, and the elements there; `expected` is the part of all that they are."""
    marks = pack_bits(erased)
    return marks, take_marked(cotangent, marks, expected)


def _zero_where(erased: Erased, expected: float) -> Rule:
    """g = h, but zero where `args[1]` says so."""

    def rule(call: Call) -> Iterator[Recipe]:
        position, reader = solvable(call, 0), call.tensor(1)
        if position is None or reader is None:
            return
        where = erased(call)
        yield Recipe(
            (position,),
            lambda g, marks, taken: put_marked(g, marks, taken),
            fragment=lambda h, x: take(h, where(x), expected),
            fragment_reads=(call.args[1].slot,),
        )

    return rule


def _below(call: Call) -> Callable[[Tensor], Tensor]:
    return lambda x: x <= call.args[2]


RULES: dict[str, Rule] = {
    "threshold_backward": _zero_where(_below, 0.55),
}
