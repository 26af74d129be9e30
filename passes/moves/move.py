"""What the planner chooses among."""

from __future__ import annotations

from dataclasses import dataclass

from ..costs import Cost
from ..emit import Segment
from .nesting import Piece


@dataclass(frozen=True)
class Move:
    """One candidate segment with its cost, and the gradient error that its certificates predict.

    What an inverted chain keeps is put together when it is chosen (`MoveMaker.segment`), and so are the inner segments
    of a nested checkpoint, from its `pieces`.
    """

    segment: Segment
    cost: Cost
    error: float = 0.0
    pieces: tuple[Piece, ...] = ()
