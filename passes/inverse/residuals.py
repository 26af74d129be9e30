"""Residuals that take one bit per element."""

from __future__ import annotations

from .rule import Call, Packing


def packing_of_value(call: Call, position: int = 0) -> Packing | None:
    return None


def packing_of_reader(call: Call, position: int) -> Packing | None:
    return None
