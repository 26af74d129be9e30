"""Inputs that share memory, one of which the model writes to.

A graph that was captured without that computes something else when it is called so, and the other way round; neither
Dynamo nor AOTAutograd looks. Such calls run as the model is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def share_memory(arguments: Sequence[Any], written: Iterable[int], inputs: Iterable[int]) -> bool:
    """Whether one of the `written` arguments overlaps with another one of `inputs`; both are positions."""
    spans = {place: _span(arguments[place]) for place in {*written, *inputs} if isinstance(arguments[place], Tensor)}
    others = [spans.get(place) for place in inputs]
    return any(
        other is not None and mine is not other and mine[0] == other[0] and mine[1] < other[2] and other[1] < mine[2]
        for place in written
        if (mine := spans.get(place)) is not None
        for other in others
    )


def _span(tensor: Tensor) -> tuple[Any, int, int] | None:
    """A storage, and the elements that lie between the first and the last one of the tensor, in bytes."""
    if not tensor.numel():
        return None
    reach = 1 + sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return tensor.untyped_storage()._cdata, start, start + reach * tensor.itemsize
