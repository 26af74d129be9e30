"""The geometry of a convolution, seen as one linear map A from images to features, whichever way it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear import left_inverse, right_inverse


@dataclass(frozen=True)
class Geometry:
    """A gathers `kernel` taps of the image, o s - p + t d, into output o; its transpose scatters them.

    A convolution computes A x and its input gradient A^T h; a transposed convolution computes A^T x and its input
    gradient A h. `image` and `features` are the sizes of the two sides, and `weight` is (features, image / groups,
    kernel..) in both. `padding` is what stands before the image (a crop, if negative); how much stands behind it
    follows from the sizes. `spoilt` lists, by dimension, indices at which A^T h has had something else added to it;
    `circular` says that this is what a circular convolution, of features as large as the image, adds.
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
    spoilt: tuple[frozenset[int], ...] = ()
    circular: bool = False

    @property
    def rows(self) -> int:
        """Feature channels of a group."""
        return self.feature_channels // self.groups

    @property
    def columns(self) -> int:
        """Image channels of a group."""
        return self.image_channels // self.groups

    @property
    def behind(self) -> tuple[int, ...]:
        """The padding behind the image."""
        sides = zip(self.features, self.stride, self.kernel, self.dilation, self.padding, self.image, strict=True)
        return tuple((o - 1) * s + (k - 1) * d + 1 - p - n for o, s, k, d, p, n in sides)

    @property
    def beyond(self) -> list[int] | None:
        """The rest of the image that no output reads, as `output_padding`, where ATen's one `padding` says it all."""
        rest = [p - q for p, q in zip(self.padding, self.behind, strict=True)]
        usual = min(self.padding) >= 0 and all(0 <= more < s for more, s in zip(rest, self.stride, strict=True))
        return rest if usual else None

    def gather(self, x: Tensor, weight: Tensor) -> Tensor:
        """A x"""
        if self.beyond is not None:
            return self._apply(x, weight, self.padding)
        return self._apply(_padded(x, self.padding, self.behind), weight)

    def scatter(self, h: Tensor, weight: Tensor) -> Tensor:
        """A^T h"""
        if self.beyond is not None:
            return self._apply(h, weight, self.padding, True, self.beyond)
        full = self._apply(h, weight, transposed=True)
        return _padded(full, [-p for p in self.padding], [-q for q in self.behind])

    def _apply(
        self,
        x: Tensor,
        weight: Tensor,
        padding: Sequence[int] | None = None,
        transposed: bool = False,
        beyond: Sequence[int] | None = None,
    ) -> Tensor:
        zero = [0] * len(self.kernel)
        place = (list(self.stride), list(padding or zero), list(self.dilation))
        return torch.ops.aten.convolution(x, weight, None, *place, transposed, list(beyond or zero), self.groups)


def _padded(x: Tensor, before: Sequence[int], behind: Sequence[int]) -> Tensor:
    """With zeros around it, along all dimensions but two; negative numbers crop."""
    sides = [side for both in reversed(list(zip(before, behind, strict=True))) for side in both]
    return torch.ops.aten.constant_pad_nd(x, sides)


def geometry_of(settings: Sequence[Any], weight: Tensor, image: Tensor, features: Tensor) -> Geometry | None:
    """The geometry by a call's settings: stride, padding, dilation, transposed, output padding, groups.

    None for tensors without a batch, and for anything of size zero.
    """
    stride, padding, dilation, _, _, groups = settings
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
