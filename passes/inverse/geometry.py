"""The geometry of a convolution, seen as one linear map A from images to features, whichever way it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import left_inverse, right_inverse
from .rule import Call


@dataclass(frozen=True)
class Geometry:
    """A gathers `kernel` taps of the image, o s - p + t d, into output o; its transpose scatters them.

    A convolution computes A x and its input gradient A^T h; a transposed convolution computes A^T x and its input
    gradient A h. `image` and `features` are the sizes of the two sides, and `weight` is (features, image / groups,
    kernel..) in both.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    image: tuple[int, ...]
    features: tuple[int, ...]
    image_channels: int
    feature_channels: int
    groups: int

    @property
    def rows(self) -> int:
        """Feature channels of a group."""
        return self.feature_channels // self.groups

    @property
    def columns(self) -> int:
        """Image channels of a group."""
        return self.image_channels // self.groups

    def gather(self, x: Tensor, weight: Tensor) -> Tensor:
        """A x"""
        return self._apply(x, weight, False, [0] * len(self.kernel))

    def scatter(self, h: Tensor, weight: Tensor) -> Tensor:
        """A^T h"""
        reached = zip(self.image, self.features, self.stride, self.padding, self.dilation, self.kernel, strict=True)
        beyond = [n - ((o - 1) * s - 2 * p + (k - 1) * d + 1) for n, o, s, p, d, k in reached]
        return self._apply(h, weight, True, beyond)

    def _apply(self, x: Tensor, weight: Tensor, transposed: bool, output_padding: Sequence[int]) -> Tensor:
        place = (list(self.stride), list(self.padding), list(self.dilation))
        return torch.ops.aten.convolution(x, weight, None, *place, transposed, list(output_padding), self.groups)


def geometry_of(call: Call, weight: Tensor, first: int, image: Tensor, features: Tensor) -> Geometry | None:
    """The geometry that stands from `args[first]` on (stride, padding, dilation, transposed, output padding, groups).

    None for tensors without a batch, and for anything of size zero.
    """
    stride, padding, dilation, _, _, groups = call.args[first : first + 6]
    kernel = tuple(weight.shape[2:])
    if not image.dim() == features.dim() == weight.dim() or len(stride) != len(kernel):
        return None
    if 0 in (*image.shape, *features.shape, *weight.shape) or not weight.is_floating_point():
        return None
    return Geometry(
        kernel,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        tuple(image.shape[2:]),
        tuple(features.shape[2:]),
        image.shape[1],
        features.shape[1],
        groups,
    )


def per_group(weight: Tensor, groups: int) -> Tensor:
    """One matrix per group: its feature channels by all taps of its image channels."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def right_kernel(weight: Tensor, groups: int) -> Tensor:
    """V, laid out like `weight`, with sum over taps W V^T = 1: gathering with it undoes scattering with `weight`."""
    return right_inverse(per_group(weight, groups)).mT.reshape(weight.shape)


def left_kernel(weight: Tensor, groups: int) -> Tensor:
    """V with V^T W = 1: scattering with it undoes gathering with `weight`."""
    return left_inverse(per_group(weight, groups)).mT.reshape(weight.shape)
