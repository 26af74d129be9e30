"""Clusters of neighbouring outputs, so far apart that none reads what another reads; what lies between is kept.

A cluster of L outputs along each dimension reads fewer elements per output than a single one, so less has to be kept
than with a `Lattice`: of a 3x3 convolution 16/25 for L = 3, instead of 5/6. The price is one larger matrix. A cluster
is a single output, with more channels, of a convolution by a larger kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Geometry
from .lattice import Lattice, Solver

BORDER = 0.7  # unknowns per equation where a part of what a cluster reads is outside of the image


@dataclass(frozen=True)
class Clusters:
    """h from A^T h, in clusters of `length` outputs along each dimension; the others are the fragment."""

    geometry: Geometry
    length: int

    @property
    def reach(self) -> tuple[int, ...]:
        """Elements that a cluster reads along each dimension."""
        sides = zip(self.geometry.kernel, self.geometry.stride, strict=True)
        return tuple((self.length - 1) * s + k for k, s in sides)

    @property
    def period(self) -> tuple[int, ...]:
        """From the first output of a cluster to that of the next."""
        return tuple(-(-reach // s) for reach, s in zip(self.reach, self.geometry.stride, strict=True))

    @property
    def counts(self) -> tuple[int, ...]:
        """Whole clusters along each dimension."""
        sides = zip(self.geometry.features, self.period, strict=True)
        return tuple((size - self.length) // period + 1 for size, period in sides)

    @cached_property
    def inner(self) -> Solver:
        """The same problem with a cluster as one output."""
        wide = replace(
            self.geometry,
            kernel=self.reach,
            stride=tuple(s * period for s, period in zip(self.geometry.stride, self.period, strict=True)),
            features=self.counts,
            feature_channels=self.geometry.feature_channels * self.length ** len(self.reach),
        )
        return Solver(wide, Lattice((1,) * len(self.reach)))

    @property
    def kept(self) -> float:
        """The part of all outputs that is kept."""
        return 1 - math.prod(count * self.length for count in self.counts) / math.prod(self.geometry.features)

    @property
    def crowding(self) -> float:
        return self.inner.crowding

    @property
    def is_whole(self) -> bool:
        return False

    @property
    def is_possible(self) -> bool:
        """Enough equations for each output, more than enough for every cluster, and taps that leave no holes."""
        sides = zip(self.geometry.features, self.geometry.kernel, self.geometry.stride, strict=True)
        apart = all(size >= self.length and k > s for size, k, s in sides) and set(self.geometry.dilation) == {1}
        return apart and Solver(self.geometry, Lattice(self.period)).is_possible and self.inner.is_roomy(BORDER)

    def flops(self) -> float:
        """Floating-point operations of the pseudo-inverses."""
        rows, columns = self.inner.geometry.rows, self.geometry.columns * math.prod(self.reach)
        return self.geometry.groups * (4.0 * rows**2 * columns + 2.0 * rows**3)

    def take(self, h: Tensor) -> tuple[Tensor, ...]:
        """The fragment: what lies between clusters along the first dimension, in their rows along the second, ..."""
        kept = []
        for axis in range(len(self.reach)):
            h, between = self._split(h, axis)
            kept.append(between.clone(memory_format=torch.contiguous_format))
        return tuple(kept)

    def _split(self, h: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        dim, period = axis + 2, self.period[axis]
        whole = min(self.counts[axis] * period, h.shape[dim])
        short = self.counts[axis] * period - whole  # the last gap may be cut off by the border
        head = F.pad(h.narrow(dim, 0, whole), _behind(h, dim, short)).unflatten(dim, (-1, period))
        gaps = head.narrow(dim + 1, self.length, period - self.length).flatten(dim, dim + 1)
        gaps = gaps.narrow(dim, 0, gaps.shape[dim] - short)
        tail = h.narrow(dim, whole, h.shape[dim] - whole)
        return head.narrow(dim + 1, 0, self.length).flatten(dim, dim + 1), torch.cat([gaps, tail], dim)

    def _join(self, clustered: Tensor, between: Tensor, axis: int) -> Tensor:
        dim, gap, count = axis + 2, self.period[axis] - self.length, self.counts[axis]
        short = max(0, count * gap - between.shape[dim])
        gaps = F.pad(between, _behind(between, dim, short)).narrow(dim, 0, count * gap)
        tail = between.narrow(dim, count * gap - short, between.shape[dim] + short - count * gap)
        pairs = [clustered.unflatten(dim, (count, -1)), gaps.unflatten(dim, (count, -1))]
        head = torch.cat(pairs, dim + 1).flatten(dim, dim + 1)
        return torch.cat([head.narrow(dim, 0, head.shape[dim] - short), tail], dim)

    def _assemble(self, clustered: Tensor, fragment: Sequence[Tensor]) -> Tensor:
        for axis in reversed(range(len(fragment))):  # none where the clusters are all there is
            clustered = self._join(clustered, fragment[axis], axis)
        return clustered

    def solve(self, g: Tensor, weight: Tensor, *fragment: Tensor) -> Tensor:
        """The outputs from the image gradient `g`."""
        sizes = [count * self.length for count in self.counts]
        blank = g.new_zeros(g.shape[0], self.geometry.feature_channels, *sizes)
        g = g - self.geometry.scatter(self._assemble(blank, fragment), weight)
        solved = self.inner.solve(g, self._wide(weight))
        return self._assemble(self._spread(solved), fragment)

    def _wide(self, weight: Tensor) -> Tensor:
        """The kernel of a whole cluster: (groups, outputs of a cluster, features of a group) channels."""
        stride, last = self.geometry.stride, self.length - 1
        padded = []
        for place in product(range(self.length), repeat=len(stride)):
            sides = [(at * s, (last - at) * s) for at, s in zip(place, stride, strict=True)]
            padded.append(F.pad(weight, [pad for side in reversed(sides) for pad in side]))
        grouped = torch.stack(padded).unflatten(1, (self.geometry.groups, -1))
        return grouped.transpose(0, 1).flatten(0, 2)

    def _spread(self, solved: Tensor) -> Tensor:
        """Clusters as channels -> outputs in their places."""
        axes = len(self.reach)
        split = solved.unflatten(1, (self.geometry.groups, *[self.length] * axes, -1))
        places = [dim for axis in range(axes) for dim in (3 + axes + axis, 2 + axis)]
        sizes = [count * self.length for count in self.counts]
        return split.permute(0, 1, 2 + axes, *places).reshape(len(solved), -1, *sizes)


def _behind(tensor: Tensor, dim: int, count: int) -> list[int]:
    """Padding for `F.pad`: `count` zeros at the end of a dimension."""
    return [0] * (2 * (tensor.dim() - dim) - 1) + [count]
