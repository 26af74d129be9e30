"""Inversion watched at run time: a few elements of one border of each chain, before and after it was recovered.

Certificates are measured now and then; weights change at every step. So every step keeps a small sample of a value
that it will recover, compares the two, and returns the relative distance beside the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .graph import Edge

SAMPLE = 1024  # elements, about
TIED = 100  # of so many elements of a cotangent, one may lie on a kink, where another subgradient is taken


@dataclass(frozen=True)
class Watch:
    """`sample` takes a few elements of a value, `compare` gives the relative distance of others from them."""

    value: int
    sample: Edge
    compare: Edge

    @property
    def kept(self) -> int:
        return self.sample.gives[0]

    @property
    def drift(self) -> int:
        return self.compare.gives[0]


@dataclass(frozen=True)
class Drift:
    """Where the backward program's extra results come from: the blocks of a chain, and its strategy."""

    strategy: str
    first: int
    last: int


def steps_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A stride for each dimension that leaves about `SAMPLE` elements; the longest dimensions are thinned first."""
    counts = list(shape)
    while math.prod(counts) > 2 * SAMPLE:
        longest = max(range(len(counts)), key=counts.__getitem__)
        counts[longest] = (counts[longest] + 1) // 2
    return tuple(math.ceil(size / count) for size, count in zip(shape, counts, strict=True))


def sampler(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    steps = steps_of(shape)

    def sample(value: Tensor) -> Tensor:
        for dim, step in enumerate(steps):
            if step > 1:
                value = torch.ops.aten.slice(value, dim, 0, None, step)
        return value.clone(memory_format=torch.contiguous_format)

    return sample


def comparer(shape: tuple[int, ...], ties: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The relative distance; with `ties`, the few elements that differ most are left out."""
    sample = sampler(shape)

    def compare(true: Tensor, recovered: Tensor) -> Tensor:
        true, found = true.float().flatten(), sample(recovered).float().flatten()
        distance = (found - true).abs()
        if ties:
            distance = distance.sort().values[: distance.numel() - math.ceil(distance.numel() / TIED)]
        return distance.norm() / true.norm().clamp_min(1e-30)

    return compare
