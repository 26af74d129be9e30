"""The dynamic program's states and moves as arrays: all moves into a border meet all earlier states in one go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
FRONT = 128  # states kept per border and kind: beyond this the front is thinned
LONG = 1 << 16  # states of all borders together: where there are many, fewer are kept at each
AROUND = 2  # neighbouring runs of a front from which the price of a byte is taken


@dataclass
class Front:
    """States at one border: parallel arrays, and for each the state and move it came from.

    `reach` is the last block that an inverted chain which ends here may be grown to; -1 where none ends here.
    """

    kept: Floats
    seconds: Floats
    covered: Flags
    reach: Integers
    parent: Integers
    source: Integers
    move: Integers


@dataclass
class Table:
    """Moves into one border as arrays, so that all of them meet all states at once.

    `reach` is the last block of a chain that begins with an inverted block, and -1 for other moves.
    """

    first: Integers
    own: Floats
    border: Floats
    forward: Floats
    backward: Floats
    seconds: Floats
    covers_in: Flags
    covers_out: Flags
    reach: Integers


def column(values: Iterable[float]) -> Floats:
    return np.array(list(values), dtype=np.float64)


def start() -> Front:
    """The one state before the first block."""
    zero, none = np.zeros(1), np.zeros(1, dtype=np.int64)
    return Front(zero, zero.copy(), np.zeros(1, dtype=bool), none - 1, none, none, none)


def extend(fronts: Sequence[Front], table: Table, budget: float, states: int) -> Front:
    """All moves of a table against all states at the border where each move begins, in one go.

    An inverted block continues the chain in front of it as far as that reaches; what follows a chain in any other way
    has to cover the border. At most `states` of each kind remain; with one it is that which keeps least.
    """
    last = len(fronts) - 1
    earliest = int(table.first.min(initial=last))
    near = fronts[earliest:]
    counts = np.array([len(front.kept) for front in near])
    starts = np.concatenate([[0], np.cumsum(counts)])
    repeats = counts[table.first - earliest]
    move = np.repeat(np.arange(len(table.first)), repeats)
    state = np.arange(len(move)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    place = starts[table.first[move] - earliest] + state
    kept, seconds, covered, reach = (
        np.concatenate([getattr(front, name) for front in near])[place]
        for name in ("kept", "seconds", "covered", "reach")
    )
    continues = (table.reach[move] >= 0) & (reach >= last)
    border = np.where(covered, 0.0, table.border[move])
    before = kept - (table.border[move] - border)
    peak = before + np.maximum(table.forward[move], table.backward[move])
    fits = np.flatnonzero((peak <= budget) & ((reach < 0) | continues | table.covers_in[move]))
    kept = (kept + table.own[move] + border)[fits]
    seconds = (seconds + table.seconds[move])[fits]
    reach = np.where(continues, reach, table.reach[move])[fits]
    move, state = move[fits], state[fits]
    covered = table.covers_out[move]
    chosen = _undominated(kept, seconds, covered, reach, states)
    move, state = move[chosen], state[chosen]
    return Front(kept[chosen], seconds[chosen], covered[chosen], reach[chosen], state, table.first[move], move)


def _undominated(kept: Floats, seconds: Floats, covered: Flags, reach: Integers, states: int) -> Integers:
    kinds = [(flag, last) for flag in (False, True) for last in np.unique(reach)]
    most, chosen = max(1, 4 * states // max(4, len(kinds))), []
    for flag, last in kinds:
        rows = np.flatnonzero((covered == flag) & (reach == last))
        if not len(rows):
            continue
        rows = rows[_candidates(kept[rows], seconds[rows])]
        rows = rows[np.lexsort((seconds[rows], kept[rows]))]
        best = np.minimum.accumulate(seconds[rows])
        better = np.ones(len(rows), dtype=bool)
        better[1:] = seconds[rows][1:] < best[:-1]
        rows = rows[better]
        chosen.append(rows[_thinned(kept[rows], seconds[rows], most)] if len(rows) > most else rows)
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def _candidates(kept: Floats, seconds: Floats) -> Integers:
    """In order, the places that nothing before them is better than where states are sorted by one key alone, which is
    quick: all that are undominated, and some that are not."""
    order = np.argsort(kept)
    ordered = seconds[order]
    return np.sort(order[ordered <= np.minimum.accumulate(ordered)])


def _thinned(kept: Floats, seconds: Floats, most: int) -> Integers:
    """About `most` places of a front: both ends, and in each of even runs the state that is best at the price of a
    byte there. (An even choice would be one of states that are all a bit worse than those.)

    If one is asked for, that which keeps least.
    """
    if most == 1:
        return np.zeros(1, dtype=np.int64)
    borders = np.linspace(0, len(kept), most + 1).astype(np.int64)
    counts = np.diff(borders)
    low, high = np.maximum(borders[:-1] - AROUND * counts, 0), np.minimum(borders[1:] + AROUND * counts, len(kept)) - 1
    price = (seconds[low] - seconds[high]) / np.maximum(kept[high] - kept[low], 1)
    score = seconds + np.repeat(price, counts) * kept
    run = np.repeat(np.arange(most), counts)
    best = np.flatnonzero(score == np.minimum.reduceat(score, borders[:-1])[run])
    _, first = np.unique(run[best], return_index=True)
    return np.unique(np.concatenate([best[first], [0, len(kept) - 1]]))
