"""Dense layouts: the order of dimensions in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def lay_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """`tensor` with these dense strides; copied only where they differ in a dimension longer than one."""
    if all(a == b for a, b, size in zip(tensor.stride(), strides, tensor.shape, strict=True) if size != 1):
        return tensor
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)
