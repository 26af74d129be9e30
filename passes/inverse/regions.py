"""Rules over several nodes at once: what no single operation's inverse can give.

A tensor in all its slices, and the sum of disjoint slice gradients, which is a concatenation in disguise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .composites import find_composites, find_softsigns
from .contraction import find_contractions
from .folds import find_folds
from .pooling import shape_only
from .reader import Reader
from .rule import Region
from .sums import added_up, subtract, sum_roots

Step = tuple[int, slice | int]  # one slice or selection along a dimension


def find_regions(reader: Reader) -> Iterator[Region]:
    """Every region of the joint graph that belongs to no family of its own."""
    yield from _tilings(reader)
    yield from _disjoint_sums(reader)
    yield from find_folds(reader)
    yield from find_softsigns(reader)
    yield from find_composites(reader)
    yield from find_contractions(reader)
    for edge in reader.graph.edges:
        if edge.label.endswith(("pool2d_backward", "pool3d_backward", "with_indices_backward")):
            region = shape_only(edge, reader.shape(edge.gives[0]))
            if region is not None:
                yield region


# -- a tensor in all its slices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """What a slice or a selection covers of its source along one dimension."""

    value: int
    covers: range
    selected: bool


def _pieces(reader: Reader, source: int) -> dict[int, list[_Piece]]:
    """The pieces of `source` that are read, by dimension."""
    shape = reader.shape(source)
    found: dict[int, list[_Piece]] = {}
    for edge in reader.uses.get(source, ()):
        if edge.label in ("slice", "select") and shape:
            dim, part = _step(edge.label, reader.args(edge)[1:])
            dim %= len(shape)
            covers = _restrict(range(shape[dim]), part)
            found.setdefault(dim, []).append(_Piece(edge.gives[0], covers, isinstance(part, int)))
    return found


def _step(label: str, constants: Sequence[Any]) -> Step:
    """The dimension and the part of it that `slice` or `select` (or their gradients) take."""
    dim = constants[0] if constants else 0
    return (dim, constants[1]) if label.startswith("select") else (dim, slice(*_padded(constants[1:])))


def _padded(bounds: Sequence[Any]) -> tuple[Any, Any, Any]:
    start, stop, step = (*bounds, None, None, None)[:3]
    return start, stop, step


def _restrict(covers: range, part: slice | int) -> range:
    if isinstance(part, slice):
        return covers[part]
    index = part % len(covers)
    return covers[index : index + 1]


def _tilings(reader: Reader) -> Iterator[Region]:
    """A value from pieces that cover it without overlap along one dimension."""
    for source in list(reader.uses):
        for dim, pieces in _pieces(reader, source).items():
            size = reader.shape(source)[dim]
            for first in [piece for piece in pieces if piece.covers[:1] == range(1)][:8]:
                chain = _chain(pieces, first, size)
                if chain is not None:
                    function = partial(_concatenate, dim, tuple(piece.selected for piece in chain))
                    yield Region((source,), tuple(piece.value for piece in chain), function, "inverse of slices")
            comb = _comb(pieces, size)
            if comb is not None:
                values = tuple(piece.value for piece in comb)
                yield Region((source,), values, partial(_interleave, dim), "inverse of strided slices")


def _chain(pieces: Sequence[_Piece], first: _Piece, size: int) -> list[_Piece] | None:
    """Contiguous pieces from `first` to the end, each starting where the one before stops."""
    contiguous = [p for p in pieces if len(p.covers) and (p.covers.step == 1 or len(p.covers) == 1)]
    if first not in contiguous:
        return None
    dead: set[int] = set()

    def extend(position: int) -> list[_Piece] | None:
        if position == size:
            return []
        for piece in contiguous:
            if piece.covers.start == position and position not in dead:
                rest = extend(position + len(piece.covers))
                if rest is not None:
                    return [piece, *rest]
        dead.add(position)
        return None

    rest = extend(len(first.covers))
    return None if rest is None else [first, *rest]


def _comb(pieces: Sequence[_Piece], size: int) -> list[_Piece] | None:
    """Slices `[k::step]` for every k below the step."""
    for step in sorted({piece.covers.step for piece in pieces if piece.covers.step > 1}):
        teeth = {p.covers.start: p for p in pieces if p.covers.step == step and len(p.covers) * step == size}
        if set(range(step)) <= set(teeth):
            return [teeth[k] for k in range(step)]
    return None


def _concatenate(dim: int, selected: Sequence[bool], *pieces: Tensor) -> Tensor:
    return torch.cat([p.unsqueeze(dim) if s else p for p, s in zip(pieces, selected, strict=True)], dim)


def _interleave(dim: int, *pieces: Tensor) -> Tensor:
    return torch.stack(pieces, dim + 1).flatten(dim, dim + 1)


# -- the sum of disjoint slice gradients ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Embedded:
    """A cotangent placed into zeros by slice gradients: the steps from the outside, and what it covers."""

    source: int
    steps: tuple[tuple[int, Any], ...]
    box: tuple[range, ...]

    def overlaps(self, other: _Embedded) -> bool:
        return all(_meet(a, b) for a, b in zip(self.box, other.box, strict=True))


def _meet(a: range, b: range) -> bool:
    if a.step == b.step == 1:
        return max(a.start, b.start) < min(a.stop, b.stop)
    return not set(a).isdisjoint(b)


def _embedded(reader: Reader, value: int) -> _Embedded | None:
    box = [range(size) for size in reader.shape(value)]
    dims = list(range(len(box)))
    steps: list[tuple[int, Any]] = []
    while (edge := reader.made_by(value, "slice_backward", "select_backward")) is not None:
        dim, part = _step(edge.label, reader.args(edge)[2:])
        dim %= len(dims)
        box[dims[dim]] = _restrict(box[dims[dim]], part)
        if isinstance(part, int):
            del dims[dim]
        # A slice is not hashable before Python 3.12, and the steps are part of a cache key.
        steps.append((dim, part if isinstance(part, int) else (part.start, part.stop, part.step)))
        value = edge.needs[0]
    return _Embedded(value, tuple(steps), tuple(box)) if steps else None


def _disjoint_sums(reader: Reader) -> Iterator[Region]:
    """The cotangents of the pieces from the cotangent of the whole."""
    for root in sum_roots(reader):
        summands = added_up(reader, root)
        leaves = {value: leaf for value in summands if (leaf := _embedded(reader, value)) is not None}
        parts = list(leaves.values())
        sources = [leaf.source for leaf in parts]
        others = [value for value in summands if value not in leaves]
        repeated = len(set(summands)) < len(summands) or len(set(sources)) < len(sources) or set(sources) & set(others)
        if len(parts) < 2 or repeated or any(a.overlaps(b) for i, a in enumerate(parts) for b in parts[:i]):
            continue
        function = partial(_cut, tuple(leaf.steps for leaf in parts))
        yield Region(tuple(sources), (root.gives[0], *others), function, "inverse of slice gradients")


def _cut(paths: Sequence[Sequence[tuple[int, Any]]], total: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    total = subtract(total, others)
    return tuple(_follow(total, path) for path in paths)


def _follow(tensor: Tensor, path: Sequence[tuple[int, Any]]) -> Tensor:
    for dim, part in path:
        if isinstance(part, int):
            tensor = tensor.select(dim, part)
        else:
            tensor = torch.ops.aten.slice(tensor, dim, part[0], part[1], part[2] or 1)
    return tensor
