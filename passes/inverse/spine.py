"""Other ways to input gradients, for the cotangent spine: from less than the backward operation reads.

`convolution_backward` gives the gradients of the input and of the weight in one call, and so reads the input. The
input's gradient alone needs the cotangent and the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capture import Capture
from ..graph import Edge, Ref
from .rule import Region, result_places


def find_input_gradients(capture: Capture) -> Iterator[Region]:
    """The input gradient of every convolution, from its output's cotangent and its weight."""
    for edge in capture.graph.edges:
        if edge.label == "convolution_backward" and edge.operations[0].args[10][0]:
            region = _input_gradient(capture, edge)
            if region is not None:
                yield region


def _input_gradient(capture: Capture, edge: Edge) -> Region | None:
    cotangent, _, weight, _, *geometry = edge.operations[0].args
    given = next((value for value, place in zip(edge.gives, result_places(edge), strict=True) if place == 0), None)
    if given is None or not all(isinstance(ref, Ref) for ref in (cotangent, weight)):
        return None
    needs = (edge.needs[cotangent.slot], edge.needs[weight.slot])
    size, kernel = (capture.fake(value).shape for value in (given, needs[1]))
    if len(size) != len(kernel) or len(set(needs)) < 2:
        return None
    stride, padding, dilation, transposed, _, groups = (_listed(item) for item in geometry[:6])
    function = partial(_gradient, tuple(size[2:]), stride, padding, dilation, transposed, groups)
    return Region((given,), needs, function, "convolution's input gradient", inverse=False)


def _listed(item: Any) -> Any:
    """Hashable: equal regions are traced once."""
    return tuple(item) if isinstance(item, (list, tuple)) else item


def _gradient(
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    cotangent: Tensor,
    weight: Tensor,
) -> Tensor:
    """A convolution's input gradient is the transposed convolution of its cotangent, and the other way round."""
    least = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(cotangent.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    ]
    beyond = [0 if transposed else n - m for n, m in zip(size, least, strict=True)]
    lists = [list(item) for item in (stride, padding, dilation)]
    return torch.ops.aten.convolution(cotangent, weight, None, *lists, not transposed, beyond, groups)
