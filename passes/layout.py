"""Dense layouts: the order of dimensions in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .graph import Call
    from .trials import Like

aten = torch.ops.aten
# Convolutions, with how many images they begin their arguments with.
CONVOLUTIONS: dict[Any, int] = {aten.convolution.default: 1, aten.convolution_backward.default: 2}


def lay_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """`tensor` with these dense strides; copied only where they differ in a dimension longer than one."""
    if _alike(tensor.shape, tensor.stride(), strides):
        return tensor
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def _alike(size: Sequence[int], strides: Sequence[int], others: Sequence[int]) -> bool:
    """Of a dimension of one element the stride says nothing."""
    return all(a == b for n, a, b in zip(size, strides, others, strict=True) if n != 1)


def channels_last(size: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides of an image in that order; what is no image keeps its own."""
    if len(size) != 4:
        return tuple(strides)
    return torch.empty(tuple(size), device="meta", memory_format=torch.channels_last).stride()


def _is_contiguous(image: Like) -> bool:
    """Whether it is laid out as tensors are by default."""
    return _alike(image.size, image.stride, torch.empty(image.size, device="meta").stride())


def laid_out(call: Call, as_plain: bool = False) -> Call:
    """A call as it is made where operations are fused: a convolution on a CPU on images channels last.

    With `as_plain` as plain `torch.compile` makes it. Its backward graphs lay nothing out, but the images that the
    forward graph hands over are channels last, and most cotangents follow. Where one comes from a permutation (networks
    that hold their images channels last by themselves) layouts meet, as they did when captured.
    """
    target, args, kwargs = call
    if as_plain and target is aten.convolution_backward.default and not _is_contiguous(args[0]):
        return call
    images = CONVOLUTIONS.get(target, 0)
    return target, (*map(_channels_last, args[:images]), *args[images:]), kwargs


def _channels_last(image: Like) -> Like:
    return replace(image, stride=channels_last(image.size, image.stride)) if image.device.type == "cpu" else image
