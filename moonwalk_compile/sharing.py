"""Inputs that share memory, one of which the model writes to.

A graph that was captured without that computes something else when it is called so, and the other way round; neither
Dynamo nor AOTAutograd looks. Such calls run as the model is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def share_memory(arguments: Sequence[Any], written: Iterable[int], inputs: Iterable[int]) -> bool:
    """Whether one of the `written` among the `inputs` overlaps with another one; both are positions."""
    tensors = {place: arguments[place] for place in inputs if isinstance(arguments[place], Tensor)}
    spans = {place: _span(tensor) for place, tensor in tensors.items() if tensor.numel()}
    return any(
        one != other and spans[one][0] == storage and spans[one][1] < stop and start < spans[one][2]
        for one in spans.keys() & set(written)
        for other, (storage, start, stop) in spans.items()
    )


def _span(tensor: Tensor) -> tuple[Any, int, int]:
    """A storage, and the first byte of the tensor and the one behind its last."""
    reach = 1 + sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return tensor.untyped_storage()._cdata, start, start + reach * tensor.itemsize
