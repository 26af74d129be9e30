"""The moves of the planner: every segment that it may append, with what it costs."""

from __future__ import annotations

from .maker import MoveMaker
from .move import Move

__all__ = ["Move", "MoveMaker"]
