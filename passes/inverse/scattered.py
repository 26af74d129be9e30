"""Which way to solve for the features h from A^T h: what is kept, against how well the rest can be solved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, product

from .clusters import Clusters
from .geometry import Geometry
from .lattice import Lattice, Solver

CROWDED = 0.45  # unknowns per equation; random matrices of .4 amplify noise by about 1, of .5 by 1.5, of 1 by 20 to 100
LONGEST = 6  # outputs along a side of a cluster


def direct_solver(geometry: Geometry) -> Solver | None:
    """The solver that keeps nothing, if shapes allow."""
    solver = Solver(geometry, Lattice((1,) * len(geometry.kernel)))
    return solver if solver.is_possible else None


def solver_with_fragment(geometry: Geometry, batch: int) -> Solver | Clusters | None:
    """The solver that keeps least, of those with enough equations; or the one that cannot be had with more."""
    found: list[Solver | Clusters] = [*_lattices(geometry), *_clusters(geometry, batch)]
    found.sort(key=lambda solver: solver.kept)
    for _, alike in groupby(found, lambda solver: solver.kept):
        for solver in sorted(alike, key=lambda solver: solver.crowding):
            if (solver.crowding <= CROWDED or solver.is_whole) and solver.is_possible:
                return solver
    return None


def _lattices(geometry: Geometry) -> Iterator[Solver]:
    """A period is no longer than what no two footprints share, or than the side."""
    sides = zip(geometry.kernel, geometry.stride, geometry.dilation, geometry.features, strict=True)
    longest = [min(size, -(-((k - 1) * d + 1) // s)) for k, s, d, size in sides]
    for periods in product(*(range(1, most + 1) for most in longest)):
        yield Solver(geometry, Lattice(periods))
    if len(longest) > 1 and min(longest) > 1:
        yield Solver(geometry, Lattice((2,) * len(longest), checkered=True))


def _clusters(geometry: Geometry, batch: int) -> Iterator[Clusters]:
    """Those whose pseudo-inverse takes no more arithmetic than two forward passes."""
    outputs = batch * geometry.feature_channels * math.prod(geometry.features)
    forward = 2.0 * outputs * geometry.columns * math.prod(geometry.kernel)
    for length in range(2, min(LONGEST, *geometry.features) + 1):
        clusters = Clusters(geometry, length)
        if clusters.flops() <= 2 * forward:
            yield clusters
