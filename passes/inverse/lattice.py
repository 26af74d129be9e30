"""Outputs whose taps no other output shares: they are solved each on its own, by one matrix.

Where all outputs have such taps, nothing is kept. Otherwise the outputs of a sublattice are solved, and the others
are kept as a fragment: every second one in a checkerboard, or all but every m-th along a dimension. What remains is
a gathering convolution by a pseudo-inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Geometry, right_kernel

Tap = tuple[int, ...]
ROOMY = 0.4  # unknowns per equation, below which more equations would gain little


@dataclass(frozen=True)
class Lattice:
    """The outputs that are solved: every `periods`-th along each dimension, or those with an even sum of indices."""

    periods: tuple[int, ...]
    checkered: bool = False

    def holds(self, shift: Sequence[int]) -> bool:
        """Whether a solved output, shifted, is another one."""
        if self.checkered:
            return sum(shift) % 2 == 0
        return all(step % period == 0 for step, period in zip(shift, self.periods, strict=True))

    @cached_property
    def classes(self) -> list[Tap]:
        return list(product(*map(range, self.periods)))

    @cached_property
    def solved(self) -> list[Tap]:
        return [offset for offset in self.classes if self.holds(offset)]

    @cached_property
    def kept(self) -> list[Tap]:
        return [offset for offset in self.classes if not self.holds(offset)]

    def take(self, h: Tensor) -> tuple[Tensor, ...]:
        """The fragment: what is not solved."""
        return tuple(self._part(h, offset).clone(memory_format=torch.contiguous_format) for offset in self.kept)

    def _part(self, h: Tensor, offset: Tap) -> Tensor:
        for dim, (first, period) in enumerate(zip(offset, self.periods, strict=True), 2):
            h = torch.ops.aten.slice(h, dim, first, None, period)
        return h

    def assemble(self, parts: dict[Tap, Tensor], sizes: Sequence[int]) -> Tensor:
        """All outputs from the parts, by offset."""
        for axis in reversed(range(len(sizes))):
            size, period = sizes[axis], self.periods[axis]
            prefixes = dict.fromkeys(offset[:axis] for offset in parts)
            parts = {p: _interleave([parts[(*p, i)] for i in range(period)], axis + 2, size) for p in prefixes}
        return parts[()]


def _interleave(parts: Sequence[Tensor], dim: int, size: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    longest = parts[0].shape[dim]
    behind = [0] * (2 * (parts[0].dim() - dim) - 1)
    padded = [part if part.shape[dim] == longest else F.pad(part, (*behind, 1)) for part in parts]
    return torch.stack(padded, dim + 1).flatten(dim, dim + 1).narrow(dim, 0, size)


@dataclass(frozen=True)
class _Run:
    """Neighbours along one dimension, `count` from the `first` on, that see the same sound taps inside of the image."""

    first: int
    count: int
    taps: frozenset[int]


@dataclass(frozen=True)
class _Piece:
    """A box of solved outputs: what they read of the image, and the taps they are solved from."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    box: tuple[range, ...]
    taps: frozenset[Tap]


@dataclass(frozen=True)
class Solver:
    """h from A^T h, with the outputs that are not of the lattice as a fragment."""

    geometry: Geometry
    lattice: Lattice

    @cached_property
    def taps(self) -> frozenset[Tap]:
        """The taps that an output of the lattice shares with no other one."""
        g = self.geometry
        sides = zip(g.kernel, g.stride, g.dilation, g.features, strict=True)
        shifts = [[_shifts(t, *side) for t in range(side[0])] for side in sides]
        return frozenset(
            tap
            for tap in product(*map(range, g.kernel))
            if not any(
                any(shift) and self.lattice.holds(shift)
                for shift in product(*(shifts[dim][t] for dim, t in enumerate(tap)))
            )
        )

    @property
    def kept(self) -> float:
        """The part of all outputs that is kept."""
        sides = list(zip(self.geometry.features, self.lattice.periods, strict=True))
        solved = sum(
            math.prod(len(range(first, size, period)) for first, (size, period) in zip(offset, sides, strict=True))
            for offset in self.lattice.solved
        )
        return 1 - solved / math.prod(self.geometry.features)

    def take(self, h: Tensor) -> tuple[Tensor, ...]:
        """The fragment."""
        return self.lattice.take(h)

    @property
    def crowding(self) -> float:
        """Unknowns per equation, away from the border."""
        return self.geometry.rows / (self.geometry.columns * len(self.taps)) if self.taps else math.inf

    @property
    def is_whole(self) -> bool:
        """Whether all taps are used, so that nothing is gained by keeping more."""
        return len(self.taps) == math.prod(self.geometry.kernel)

    @property
    def is_possible(self) -> bool:
        """Whether every output has as many equations as unknowns."""
        return self.is_roomy(1.0)

    def is_roomy(self, crowding: float) -> bool:
        """Whether no output, those at the border included, has more unknowns per equation."""
        pieces = (piece for pieces in self.pieces.values() for piece in pieces)
        return bool(self.taps) and all(self._fits(piece, crowding) for piece in pieces)

    def _fits(self, piece: _Piece, crowding: float) -> bool:
        return self.geometry.rows <= crowding * self.geometry.columns * len(piece.taps)

    @cached_property
    def pieces(self) -> dict[Tap, list[_Piece]]:
        """The solved outputs, by offset and from first to last: all at once where that leaves many equations."""
        return {offset: self._pieces(offset) for offset in self.lattice.solved}

    def _pieces(self, offset: Tap) -> list[_Piece]:
        runs = [self._runs(axis, first) for axis, first in enumerate(offset)]
        joined = [
            _Run(0, sum(run.count for run in of), frozenset.intersection(*(run.taps for run in of))) for of in runs
        ]
        alike = self._piece(offset, joined)
        if self._fits(alike, ROOMY) or all(len(of) == 1 for of in runs):
            return [alike]
        return [self._piece(offset, choice) for choice in product(*runs)]

    def _runs(self, axis: int, offset: int) -> list[_Run]:
        g, period = self.geometry, self.lattice.periods[axis]
        s, p, d, k = g.stride[axis], g.padding[axis], g.dilation[axis], g.kernel[axis]
        sound = set(range(g.image[axis])) - (g.spoilt[axis] if g.spoilt else frozenset())

        def inside(output: int) -> frozenset[int]:
            return frozenset(t for t in range(k) if output * s - p + t * d in sound)

        outputs = range(offset, g.features[axis], period)
        found: list[_Run] = []
        for taps, alike in groupby(outputs, inside):
            found.append(_Run(sum(run.count for run in found), len(list(alike)), taps))
        return found

    def _piece(self, offset: Tap, runs: Sequence[_Run]) -> _Piece:
        taps = frozenset(tap for tap in self.taps if all(t in run.taps for t, run in zip(tap, runs, strict=True)))
        box = tuple(range(min(side), max(side) + 1) for side in zip(*taps, strict=True)) if taps else ()
        g, start, size = self.geometry, [], []
        for axis, (side, run) in enumerate(zip(box, runs, strict=False)):
            period = self.lattice.periods[axis]
            first = offset[axis] + run.first * period
            start.append(first * g.stride[axis] - g.padding[axis] + side.start * g.dilation[axis])
            size.append((run.count - 1) * period * g.stride[axis] + (len(side) - 1) * g.dilation[axis] + 1)
        return _Piece(tuple(start), tuple(size), box, taps)

    def solve(self, g: Tensor, weight: Tensor, *fragment: Tensor) -> Tensor:
        """The outputs from the image gradient `g`."""
        sizes = self.geometry.features
        kept = dict(zip(self.lattice.kept, fragment, strict=True))
        if kept:
            blanks = {offset: self._blank(g, offset) for offset in self.lattice.solved}
            g = g - self.geometry.scatter(self.lattice.assemble({**kept, **blanks}, sizes), weight)
        kernels = self._kernels(weight)
        solved = {offset: self._solve_class(g, kernels, offset) for offset in self.lattice.solved}
        return self.lattice.assemble({**kept, **solved}, sizes)

    def _kernels(self, weight: Tensor) -> dict[frozenset[Tap], Tensor]:
        """The inverse of every piece; many are alike."""
        boxes = {piece.taps: piece.box for pieces in self.pieces.values() for piece in pieces}
        return {taps: self._kernel(weight, taps, box) for taps, box in boxes.items()}

    def _kernel(self, weight: Tensor, taps: frozenset[Tap], box: Sequence[range]) -> Tensor:
        unused = [tap not in taps for tap in product(*box)]
        return right_kernel(_blanked(_cut(weight, box), unused), self.geometry.groups)

    def _blank(self, g: Tensor, offset: Tap) -> Tensor:
        sides = zip(self.geometry.features, offset, self.lattice.periods, strict=True)
        counts = [len(range(first, size, period)) for size, first, period in sides]
        return g.new_zeros(g.shape[0], self.geometry.feature_channels, *counts)

    def _solve_class(self, g: Tensor, kernels: dict[frozenset[Tap], Tensor], offset: Tap) -> Tensor:
        runs = [len({p.start[axis] for p in self.pieces[offset]}) for axis in range(len(self.geometry.kernel))]
        parts = [self._solve_piece(g, kernels[piece.taps], piece) for piece in self.pieces[offset]]
        for axis in reversed(range(len(runs))):
            parts = [_joined(parts[i : i + runs[axis]], axis + 2) for i in range(0, len(parts), runs[axis])]
        return parts[0]

    def _solve_piece(self, g: Tensor, kernel: Tensor, piece: _Piece) -> Tensor:
        read = _cut(g, [range(start, start + size) for start, size in zip(piece.start, piece.size, strict=True)])
        step = [s * period for s, period in zip(self.geometry.stride, self.lattice.periods, strict=True)]
        zero = [0] * len(step)
        dilation = list(self.geometry.dilation)
        return torch.ops.aten.convolution(read, kernel, None, step, zero, dilation, False, zero, self.geometry.groups)


def _cut(tensor: Tensor, box: Sequence[range]) -> Tensor:
    for dim, side in enumerate(box, 2):
        if len(side) < tensor.shape[dim]:
            tensor = tensor.narrow(dim, side.start, len(side))
    return tensor


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _shifts(tap: int, kernel: int, stride: int, dilation: int, outputs: int) -> list[int]:
    """How far away the outputs lie that read the same element with another tap (or with this one: 0)."""
    steps = [(tap - t) * dilation for t in range(kernel)]
    return [step // stride for step in steps if step % stride == 0 and abs(step // stride) < outputs]


def _blanked(weight: Tensor, unused: Sequence[bool]) -> Tensor:
    """Zeros at unused taps: the pseudo-inverse is zero there too."""
    if not any(unused):
        return weight
    runs = [weight.new_full((len(list(run)),), float(not blank)) for blank, run in groupby(unused)]
    return weight * torch.cat(runs).view(weight.shape[2:])
