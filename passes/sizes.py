"""How many bytes an allocator takes for a tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor, device

# Of torch's caching allocator for CUDA: what it rounds up to, what it does not split off, and its segments.
BLOCK, UNSPLIT, SEGMENT, LARGE, ROUNDED = 512, 1 << 20, 20 << 20, 10 << 20, 2 << 20
EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
LEFT = 0.01  # part of a peak by which what is left unsplit was seen to exceed its prediction


def storage_bytes(value: Any) -> int:
    """What a (fake) tensor's storage takes; zero for anything else, such as a symbolic integer."""
    return allocated(exact_bytes(value), value.device) if isinstance(value, Tensor) else 0


def exact_bytes(tensor: Tensor) -> int:
    """What its storage holds: whether two are laid out alike is a question of these."""
    return int(tensor.untyped_storage().nbytes())


def allocated(size: int, place: device) -> int:
    """Bytes taken where `size` are asked for.

    A CUDA tensor of more than a mebibyte may get up to another one that the allocator does not split off. How much
    depends on what was freed before; here it is what tensors of one size get in segments of their own. Of the
    allocator's settings only segments that grow are looked at, and only in the environment.
    """
    if place.type != "cuda":
        return size
    taken = _rounded(size, BLOCK)
    if taken <= UNSPLIT or expandable():
        return taken
    if taken < LARGE:
        count = SEGMENT // taken
        rest = SEGMENT - count * taken
        return taken + (rest // count if rest <= UNSPLIT else 0)
    whole = _rounded(taken, ROUNDED)
    return whole if whole - taken <= UNSPLIT else taken


def promised(peak: int, places: Iterable[device]) -> int:
    """A budget that a plan of this predicted peak keeps, whatever the allocator's state."""
    return math.ceil(peak * (1 + LEFT)) if _leaves(places) else peak


def left_unused(budget: float, places: Iterable[device]) -> int:
    """The part of a budget that a plan should leave to the allocator: what is left keeps the budget as promised."""
    return math.ceil(budget - budget / (1 + LEFT)) if _leaves(places) and budget < math.inf else 0


def advice(places: Iterable[device]) -> str:
    """What would make measured peaks on these devices the predicted ones; empty where nothing is left to do."""
    return f"; with {EXPANDABLE} in the environment peaks are as predicted" if _leaves(places) else ""


def _leaves(places: Iterable[device]) -> bool:
    return any(place.type == "cuda" for place in places) and not expandable()


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@cache
def expandable() -> bool:
    """Whether segments grow, and all that is left of them is split off."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in setting.lower().replace(" ", "") for setting in settings)
