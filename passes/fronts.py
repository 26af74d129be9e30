"""The dynamic program's states and moves as arrays: all moves into a border meet all earlier states in one go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
FRONT = 256  # states kept per border and kind: beyond this the front is thinned evenly


@dataclass
class Front:
    """States at one border: parallel arrays, and for each the state and move it came from."""

    kept: Floats
    seconds: Floats
    covered: Flags
    anchor: Flags
    parent: Integers
    source: Integers
    move: Integers


@dataclass
class Table:
    """Moves into one border as arrays, so that all of them meet all states at once."""

    first: Integers
    own: Floats
    border: Floats
    forward: Floats
    backward: Floats
    seconds: Floats
    covers_in: Flags
    covers_out: Flags
    invert: Flags


def column(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)


def start() -> Front:
    """The one state before the first block."""
    zero, none = np.zeros(1), np.zeros(1, dtype=np.int64)
    return Front(zero, zero.copy(), np.zeros(1, dtype=bool), np.zeros(1, dtype=bool), none, none, none)


def extend(fronts: Sequence[Front], table: Table, budget: float, states: int = FRONT) -> Front:
    """All moves of a table against all states at the border where each move begins, in one go.

    At most `states` of each kind remain; with one it is that which keeps least.
    """
    counts = np.array([len(front.kept) for front in fronts])
    starts = np.concatenate([[0], np.cumsum(counts)])
    repeats = counts[table.first]
    move = np.repeat(np.arange(len(table.first)), repeats)
    state = np.arange(len(move)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    place = starts[table.first[move]] + state
    kept, seconds, covered, anchor = (
        np.concatenate([getattr(front, name) for front in fronts])[place]
        for name in ("kept", "seconds", "covered", "anchor")
    )
    border = np.where(covered, 0.0, table.border[move])
    before = kept - (table.border[move] - border)
    peak = before + np.maximum(table.forward[move], table.backward[move])
    fits = np.flatnonzero((peak <= budget) & (~anchor | table.covers_in[move]))
    kept = (kept + table.own[move] + border)[fits]
    seconds = (seconds + table.seconds[move])[fits]
    move, state = move[fits], state[fits]
    covered, anchor = table.covers_out[move], table.invert[move]
    chosen = _undominated(kept, seconds, covered, anchor, states)
    move, state = move[chosen], state[chosen]
    return Front(kept[chosen], seconds[chosen], covered[chosen], anchor[chosen], state, table.first[move], move)


def _undominated(kept: Floats, seconds: Floats, covered: Flags, anchor: Flags, states: int) -> Integers:
    chosen = []
    for kind in range(4):
        rows = np.flatnonzero((covered == bool(kind & 1)) & (anchor == bool(kind & 2)))
        if not len(rows):
            continue
        rows = rows[np.lexsort((seconds[rows], kept[rows]))]
        best = np.minimum.accumulate(seconds[rows])
        better = np.ones(len(rows), dtype=bool)
        better[1:] = seconds[rows][1:] < best[:-1]
        rows = rows[better]
        if len(rows) > states:
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, states).astype(np.int64))]
        chosen.append(rows)
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
