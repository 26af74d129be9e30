"""Normalizations computed again with their statistics at hand: what is left of them is elementwise.

The mean and the scale are small, and the backward pass reads them anyway. Only for lowerings that fuse: the formula is
the one that Inductor decomposes a normalization to, not that of the kernels that eager PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .capture import Capture
from .cost import Device
from .graph import Edge, Ref
from .inverse.rule import result_places
from .sizes import storage_bytes

TINY = 256  # statistics that are this many times smaller than what they are of are kept whatever is done

Shape = tuple[int, ...]
Trace = Callable[..., Any]
# The positions of weight and bias; input, output, mean and scale come first everywhere.
NORMS = {
    "native_layer_norm": (2, 3),
    "native_group_norm": (1, 2),
    "native_batch_norm": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "_native_batch_norm_legit_functional": (1, 2),
}


def with_statistics(capture: Capture, device: Device, trace: Trace) -> Iterator[Edge]:
    """For each normalization of the forward pass: its output from its input, mean and scale."""
    for edge in capture.graph.edges if device.fused else ():
        if edge.label in NORMS and edge.stage == "forward":
            yield from _again(capture, device, trace, edge)


def _again(capture: Capture, device: Device, trace: Trace, edge: Edge) -> Iterator[Edge]:
    given = dict(zip(result_places(edge), edge.gives, strict=True))
    args, target = edge.operations[0].args, edge.operations[0].target
    named = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False))
    if not {0, 1, 2} <= given.keys() or not named.get("training", True):
        return
    affine = [args[place] for place in NORMS[edge.label]]
    needs = tuple(edge.needs[ref.slot] for ref in (args[0], *affine) if isinstance(ref, Ref))
    needs = (given[1], given[2], *needs)
    fakes = [capture.fake(value) for value in needs]
    output, mean = capture.fake(given[0]), fakes[0]
    size, statistics, weights = _shapes(edge.label, args, output, mean)
    given_affine = tuple(isinstance(ref, Ref) for ref in affine)
    function = partial(_normalized, size, statistics, weights, given_affine)
    operations, results, found = trace((edge.label, size, statistics, weights, given_affine), function, *fakes)
    if (found[0].shape, found[0].dtype, found[0].stride()) == (output.shape, output.dtype, output.stride()):
        again = Edge((given[0],), needs, operations, results, f"{edge.label}, statistics kept", stage=edge.stage)
        moved = storage_bytes(fakes[2]) + storage_bytes(output)
        yield replace(again, seconds=moved / 2 / device.bandwidth, sequence=edge.sequence)  # one loop


def _shapes(label: str, args: tuple[Any, ...], output: Tensor, mean: Tensor) -> tuple[Shape, Shape, Shape]:
    """Those in which the input is normalized, and those in which statistics and weights meet it."""
    size, channels = tuple(output.shape), [1, -1] + [1] * (output.dim() - 2)
    if label == "native_layer_norm":
        return size, tuple(mean.shape), tuple(args[1])
    if label == "native_group_norm":
        return (size[0], args[6], -1), (size[0], args[6], 1), tuple(channels)
    return size, tuple(channels), tuple(channels)


def _normalized(
    size: Shape,
    statistics: Shape,
    weights: Shape,
    given: tuple[bool, ...],
    mean: Tensor,
    scale: Tensor,
    x: Tensor,
    *others: Tensor,
) -> Tensor:
    rest = [other.view(weights) for other in others]
    y = (x.view(size).to(mean.dtype) - mean.view(statistics)) * scale.view(statistics)
    y = y.view(x.shape)
    y = y * rest[0] if given[0] else y
    y = y + rest[-1] if given[1] else y
    return y.to(x.dtype)
