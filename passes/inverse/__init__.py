"""Inverse rules and the engine that chains them. One table per family; the whole registry is the union below."""

from __future__ import annotations

from .contraction import CONTRACTION
from .edges import CUSTOM, RULES, WAITING_BYTES_PER_S, inverse_edges, make_call
from .residuals import jumps, kinks, packing_of_reader, packing_of_value
from .rule import Call, Packing, Recipe, Region, Rule
from .solve import Solution, solve

INVERTED = ("invert", "moonwalk")  # the strategies that follow inverse rules

__all__ = [
    "CONTRACTION",
    "CUSTOM",
    "INVERTED",
    "RULES",
    "WAITING_BYTES_PER_S",
    "Call",
    "Packing",
    "Recipe",
    "Region",
    "Rule",
    "Solution",
    "inverse_edges",
    "jumps",
    "kinks",
    "make_call",
    "packing_of_reader",
    "packing_of_value",
    "solve",
]
