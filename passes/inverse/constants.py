"""Rules that rest on values: permutations, index sets and masks of zeros and ones.

`x[:, permutation]` is a bijection only if the indices are distinct, and no shape says so. Buffers hold the same numbers
at every step, so whoever has them hands them over (`Constants`); the compiled step checks that they are still the same
and plans again where they are not. What the graph computes from nothing (`torch.arange(n)`) is the same anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from .._torch_compat import OpOverload
from ..capture import Capture
from ..graph import Edge, Ref
from ..interpret import run_edge
from .reader import Reader
from .rule import Region

LARGEST = 2**16  # elements of a constant that is looked at
PIECES = 4  # index sets that are tried together


@dataclass
class Constants:
    """What is known of values, by value of the graph; `trusted` collects what a region rests on."""

    listed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # integers along one dimension
    masks: Mapping[int, Tensor] = field(default_factory=dict)  # tensors of zeros and ones
    trusted: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, tensors: Mapping[int, Tensor]) -> Constants:
        """Of real tensors, outside of any fake mode."""
        floating = ((value, t) for value, t in tensors.items() if t.is_floating_point())
        masks = {value: t.bool().cpu() for value, t in floating if set(t.unique().tolist()) == {0, 1}}
        listed = (value for value, t in tensors.items() if t.dtype == torch.int64 and t.numel() == max([0, *t.shape]))
        return cls({value: tuple(tensors[value].flatten().tolist()) for value in listed}, masks)

    def indices(self, value: int | None, size: int) -> tuple[int, ...] | None:
        """The distinct indices below `size` that `value` lists, or None."""
        listed = self.listed.get(value) if value is not None else None
        if listed is None:
            return None
        listed = tuple(index + size if index < 0 else index for index in listed)
        sound = len(set(listed)) == len(listed) and all(0 <= index < size for index in listed)
        return listed if sound else None


def is_candidate(tensor: Any) -> bool:
    """Whether a parameter or buffer can be a constant: nothing trains it, and it is small."""
    if not isinstance(tensor, Tensor) or tensor.requires_grad:
        return False
    return (tensor.dtype == torch.int64 or tensor.is_floating_point()) and 0 < tensor.numel() <= LARGEST


@torch.no_grad()
def computed(capture: Capture, anywhere: bool = False) -> dict[int, Tensor]:
    """The small values that the graph makes from nothing: `torch.arange(n)` and what follows from it.

    With `anywhere`, also those that it makes on another device, as a CPU makes them: the last bit may differ.
    """
    found: dict[int, Tensor] = {}
    for edge in capture.graph.stage_edges("forward"):
        fakes = [capture.fake(value) for value in edge.gives]
        made = all(isinstance(o.target, OpOverload) or o.target is getitem for o in edge.operations)
        small = all(
            isinstance(f, Tensor) and (anywhere or f.device.type == "cpu") and f.numel() <= LARGEST for f in fakes
        )
        if fakes and made and small and not edge.random and not edge.effect and found.keys() >= {*edge.needs}:
            here = _on_cpu(edge) if anywhere else edge
            found.update(zip(edge.gives, run_edge(here, [found[value] for value in edge.needs]), strict=True))
    return found


def _on_cpu(edge: Edge) -> Edge:
    cpu = {"device": torch.device("cpu")}
    moved = (replace(o, kwargs={**o.kwargs, **cpu}) if "device" in o.kwargs else o for o in edge.operations)
    return replace(edge, operations=tuple(moved))


def divides_by_mask(capture: Capture, constants: Constants, edge: Edge) -> bool:
    """Whether an inverse of a product divides by a mask or by its complement: both hold zeros."""
    if edge.label != "inverse of mul" or not constants.masks:
        return False
    made = [capture.graph.definition.get(value) for value in edge.needs]
    complements = (e for e in made if e is not None and e.label == "rsub" and len(e.needs) == 1)
    return not constants.masks.keys().isdisjoint((*edge.needs, *(e.needs[0] for e in complements)))


def constant_regions(reader: Reader, constants: Constants) -> Iterator[Region]:
    """The regions of the joint graph that rest on `constants`."""
    if constants.listed or constants.masks:
        yield from _gathered(reader, constants)
        yield from _written(reader, constants)
        yield from _mixtures(reader, constants)
        yield from _repeated(reader, constants)


# -- gathers and writes along one dimension ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What a gather takes of a tensor, or what was written into one: `value` is `whole[..., indices, ...]`."""

    value: int
    dim: int
    index: int
    indices: tuple[int, ...]


def _place(reader: Reader, edge: Edge) -> tuple[int, int] | None:
    """The dimension and the index tensor of `index`, `index_put` (one index) or `index_select`."""
    args = reader.args(edge)
    if edge.label == "index_select":
        index = reader.value(edge, 2)
        return None if index is None else (args[1], index)
    listed: Sequence[Any] = args[1]
    found = [(dim, edge.needs[item.slot]) for dim, item in enumerate(listed) if isinstance(item, Ref)]
    return found[0] if len(found) == 1 and len(found) == sum(item is not None for item in listed) else None


def _part(reader: Reader, constants: Constants, edge: Edge, value: int | None) -> _Part | None:
    place, whole = _place(reader, edge), reader.value(edge, 0)
    if place is None or whole is None or value is None or not reader.shape(whole) or len(reader.shape(place[1])) != 1:
        return None
    dim = place[0] % len(reader.shape(whole))
    indices = constants.indices(place[1], reader.shape(whole)[dim])
    return None if indices is None else _Part(value, dim, place[1], indices)


def _gathered(reader: Reader, constants: Constants) -> Iterator[Region]:
    """A value from gathers that together take each of its indices once; a permutation is one such gather."""
    for source in list(reader.uses):
        edges = [
            edge
            for edge in reader.uses[source]
            if edge.label in ("index", "index_select") and reader.value(edge, 0) == source
        ]
        parts = [p for edge in edges if (p := _part(reader, constants, edge, edge.gives[0])) is not None]
        for chosen in _covers(parts, reader.shape(source)):
            indices = tuple(part.index for part in chosen)
            constants.trusted.update(indices)
            function = partial(_ungather, chosen[0].dim, len(chosen))
            yield Region(
                (source,), (*(p.value for p in chosen), *dict.fromkeys(indices)), function, "inverse of gathers"
            )


def _covers(parts: Sequence[_Part], shape: Sequence[int]) -> Iterator[tuple[_Part, ...]]:
    for count in range(1, min(PIECES, len(parts)) + 1):
        for chosen in combinations(parts, count):
            dim = chosen[0].dim
            listed = [index for part in chosen for index in part.indices]
            distinct = len({part.index for part in chosen}) == count and len(set(listed)) == len(listed)
            if distinct and len(listed) == shape[dim] and all(part.dim == dim for part in chosen):
                yield chosen
                return


def _ungather(dim: int, count: int, *tensors: Tensor) -> Tensor:
    pieces, indices = tensors[:count], tensors[count:]
    size = sum(index.numel() for index in indices)
    order = torch.cat([torch.where(index < 0, index + size, index) for index in indices]).argsort()
    return torch.cat(pieces, dim).index_select(dim, order)


def _written(reader: Reader, constants: Constants) -> Iterator[Region]:
    """`y[:, indices] = v` gives v back, from the last of the writes into the same tensor."""
    for edge in reader.edges("index_put"):
        if _next_write(reader, edge.gives[0]) is None:
            yield from _chain_of_writes(reader, constants, edge)


def _next_write(reader: Reader, value: int) -> Edge | None:
    """The write that goes on from `value`, if nobody else reads it."""
    uses = reader.uses.get(value, [])
    if len(uses) != 1 or value in reader.results or uses[0].label != "index_put":
        return None
    return uses[0] if reader.value(uses[0], 0) == value else None


def _chain_of_writes(reader: Reader, constants: Constants, last: Edge) -> Iterator[Region]:
    """From the last write to the first; what a later one overwrites is lost."""
    whole, later = last.gives[0], set[int]()
    edge: Edge | None = last
    dims: set[int] = set()
    while edge is not None:
        part = _part(reader, constants, edge, reader.value(edge, 2))
        accumulates = len(reader.args(edge)) > 3 and reader.args(edge)[3]
        if part is None or accumulates or dims - {part.dim}:
            return
        dims.add(part.dim)
        shape = [*reader.shape(whole)]
        shape[part.dim] = len(part.indices)
        if later.isdisjoint(part.indices) and reader.shape(part.value) == tuple(shape):
            constants.trusted.add(part.index)
            yield Region((part.value,), (whole, part.index), partial(_pick, part.dim), "inverse of an indexed write")
        later.update(part.indices)
        before = reader.made_by(reader.value(edge, 0), "index_put")
        edge = before if before is not None and _next_write(reader, before.gives[0]) is edge else None


def _pick(dim: int, whole: Tensor, index: Tensor) -> Tensor:
    return torch.ops.aten.index(whole, [None] * dim + [index])


# -- every element at least once: upsampling -----------------------------------------------------------------------


def _repeated(reader: Reader, constants: Constants) -> Iterator[Region]:
    """`x[:, :, rows, columns]` in which every row and every column of x stands: read one of each, at even distances."""
    for edge in reader.edges("index", "_unsafe_index"):
        source, indices = reader.value(edge, 0), outer_indices(reader, edge)
        if source is None or not indices:
            continue
        steps, shape = [], [*reader.shape(source)]
        for dim, index in indices.items():
            step = _even_step(constants.listed.get(index, ()), shape[dim])
            if step is None:
                break
            steps.append((dim, step))
            shape[dim] = len(constants.listed[index])
        if len(steps) == len(indices) and reader.shape(edge.gives[0]) == tuple(shape):
            constants.trusted.update(indices.values())
            yield Region((source,), (edge.gives[0],), partial(_every, tuple(steps)), "inverse of repeated elements")


def outer_indices(reader: Reader, edge: Edge) -> dict[int, int]:
    """The index of each dimension, if each result is picked by one row, one column, .. of its own; or nothing."""
    listed: Sequence[Any] = reader.args(edge)[1]
    found = {dim: edge.needs[item.slot] for dim, item in enumerate(listed) if isinstance(item, Ref)}
    behind = range(len(found) - 1, -1, -1)
    shapes = [reader.shape(index) for index in found.values()]
    adjacent = bool(found) and list(found) == list(range(min(found), max(found) + 1))
    apart = all(shape and shape[1:] == (1,) * count for shape, count in zip(shapes, behind, strict=True))
    return found if adjacent and apart else {}


def _even_step(listed: Sequence[int], size: int) -> int | None:
    """The distance at which `listed` holds 0, 1, ... up to `size`, if it does."""
    step = len(listed) // size if size else 0
    return step if step and list(listed[: step * size : step]) == list(range(size)) else None


def _every(steps: Sequence[tuple[int, int]], y: Tensor) -> Tensor:
    for dim, step in steps:
        y = torch.ops.aten.slice(y, dim, 0, y.shape[dim] // step * step, step)
    return y


# -- masks ---------------------------------------------------------------------------------------------------------


def _mixtures(reader: Reader, constants: Constants) -> Iterator[Region]:
    """RealNVP with a mask b of zeros and ones: y = b x + (1 - b) f(x), f one elementwise step after the other.

    Where b is one, y is x; elsewhere y is f(x).
    """
    for root in reader.edges("add"):
        for position in (0, 1) if len(root.needs) == 2 and not root.operations[0].kwargs else ():
            kept, changed = reader.value(root, position), reader.value(root, 1 - position)
            found = _masked_input(reader, constants, kept)
            if found is None or changed is None or kept is None:
                continue
            mask, source = found
            y = root.gives[0]
            if reader.shape(y) != reader.shape(source) or not _under_complement(reader, changed, mask):
                continue
            constants.trusted.add(mask)
            yield Region((kept,), (y, mask), _kept_part, "kept part of a mixture")
            yield Region((changed,), (y, mask), _changed_part, "changed part of a mixture")
            yield from _unmixed(reader, source, changed, kept, mask)


def _masked_input(reader: Reader, constants: Constants, value: int | None) -> tuple[int, int] | None:
    """(b, x) of a product b x with a mask."""
    product = reader.made_by(value, "mul")
    if product is None or len(product.needs) != 2:
        return None
    a, b = reader.value(product, 0), reader.value(product, 1)
    if a is None or b is None:
        return None
    return (a, b) if a in constants.masks else (b, a) if b in constants.masks else None


def _is_complement(reader: Reader, value: int | None, mask: int) -> bool:
    """1 - b"""
    edge = reader.made_by(value, "rsub")
    return (
        edge is not None and edge.needs == (mask,) and reader.args(edge)[1:] == (1,) and not edge.operations[0].kwargs
    )


def _factors(reader: Reader, edge: Edge) -> tuple[int | None, int | None]:
    return reader.value(edge, 0), reader.value(edge, 1)


def _under_complement(reader: Reader, value: int, mask: int) -> bool:
    """Whether `value` is a product in which 1 - b is a factor, so that it is zero where b is one."""
    product = reader.made_by(value, "mul")
    while product is not None:
        factors = _factors(reader, product)
        if any(_is_complement(reader, factor, mask) for factor in factors):
            return True
        product = reader.made_by(factors[0], "mul")
    return False


_UNDO: dict[str, Callable[..., Tensor]] = {"add": torch.sub, "sub": torch.add, "mul": torch.div, "div": torch.mul}


def _unmixed(reader: Reader, source: int, changed: int, kept: int, mask: int) -> Iterator[Region]:
    """x from b x and (1 - b) f(x): undo f step by step, each with its other operand at hand."""
    steps: list[str] = []
    others: list[int] = []
    value: int | None = changed
    while value != source and len(steps) < 6:
        edge = reader.made_by(value, *_UNDO)
        if edge is None or len(edge.needs) != 2 or edge.operations[0].kwargs:
            return
        first, second = _factors(reader, edge)
        if edge.label == "mul" and (_is_complement(reader, first, mask) or _is_complement(reader, second, mask)):
            value = second if _is_complement(reader, first, mask) else first
            continue
        swaps = edge.label in ("add", "mul") and not _leads_to(reader, first, source, kept)
        value, other = (second, first) if swaps else (first, second)
        if other is None or value is None or value == kept or reader.shape(value) != reader.shape(edge.gives[0]):
            return
        steps.append(edge.label)
        others.append(other)
    needs = (changed, kept, mask, *others)
    if value == source and len(set(needs)) == len(needs) and source not in needs:
        yield Region((source,), needs, partial(_unmix, tuple(steps)), "inverse of a mixture")


def _leads_to(reader: Reader, value: int | None, source: int, kept: int, depth: int = 6) -> bool:
    """Whether elementwise steps lead from `source` to `value`, past b x."""
    if value == source:
        return True
    edge = reader.made_by(value, *_UNDO) if depth and value != kept else None
    return edge is not None and any(_leads_to(reader, v, source, kept, depth - 1) for v in _factors(reader, edge))


def _kept_part(y: Tensor, mask: Tensor) -> Tensor:
    return mask * y


def _changed_part(y: Tensor, mask: Tensor) -> Tensor:
    return (1 - mask) * y


def _unmix(steps: Sequence[str], changed: Tensor, kept: Tensor, mask: Tensor, *others: Tensor) -> Tensor:
    for label, other in zip(steps, others, strict=True):
        changed = _UNDO[label](changed, other)
    return torch.where(mask == 1, kept, changed)
