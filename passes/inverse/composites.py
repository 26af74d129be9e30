"""Elementwise functions written as several operations: their derivative is what the backward pass makes of ones.

Wherever the backward pass leads from one cotangent h through elementwise operations alone to a cotangent g = h D,
h = g / D; where it leads to several (a product of two activations), h = sum g_i D_i / sum D_i^2. Where the D are all
small, h is kept as a fragment. Softsign, x^2, sin, handwritten activations and gates are of this kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor

from ..bits import put_marked
from ..graph import Edge, Graph, Ref
from ..interpret import filled, run_steps
from . import erasing
from .reader import Reader
from .rule import Region

SEVERAL = ("_prelu_kernel_backward", "glu_backward")  # not from one element to one
# By operation, the arguments in which it is linear and elementwise.
LINEAR = {
    **{name: (0,) for name in erasing.RULES if name.endswith("_backward") and name not in SEVERAL},
    **dict.fromkeys("add sub mul".split(), (0, 1)),
    **dict.fromkeys("neg div masked_fill zeros_like".split(), (0,)),
    "where": (1, 2),
}
# What a derivative is made of that vanishes among ordinary activations, and what only scales it.
VANISHING = frozenset("sin cos pow relu bernoulli gt ge lt le eq ne".split())
SCALING = frozenset("neg mul div alias detach _to_copy".split())
MOST_STEPS = 40

Step = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]  # operator, arguments, keyword arguments; with slots


def find_composites(reader: Reader) -> Iterator[Region]:
    graph = reader.graph
    for edge in graph.stage_edges("backward"):
        if _is_root(reader, edge):
            yield from _solved(graph, [edge])
    for value, uses in reader.uses.items():
        if graph.values[value].stage == "backward":
            products = [edge for edge in uses if edge.label == "mul" and _is_elementwise(graph, edge)]
            for pair in islice(combinations(products, 2), 4):
                yield from _solved(graph, pair)


def _is_root(reader: Reader, edge: Edge) -> bool:
    if not _is_elementwise(reader.graph, edge):
        return False
    return edge.label in ("add", "sub") or (edge.label == "mul" and _vanishes(reader, edge))


def _vanishes(reader: Reader, edge: Edge) -> bool:
    factor = next((v for v in edge.needs if reader.graph.values[v].stage != "backward"), None)
    for _ in range(MOST_STEPS):
        scaled = reader.made_by(factor, *SCALING)
        if scaled is None or len(scaled.needs) != 1:
            break
        factor = scaled.needs[0]
    return reader.made_by(factor, *VANISHING) is not None


def _is_elementwise(graph: Graph, edge: Edge | None) -> bool:
    """Linear in its cotangents, element by element: all of one shape and type, without broadcasting of any."""
    if edge is None or edge.label not in LINEAR or len(edge.operations) != 1 or len(edge.gives) != 1:
        return False
    alike = {(graph.values[v].shape, graph.values[v].dtype) for v in (*edge.gives, *_cotangents(graph, edge))}
    return len(alike) == 1 and _is_linear(graph, edge)


def _is_linear(graph: Graph, edge: Edge) -> bool:
    """Cotangents stand in `LINEAR` places only, once in a product, and sums and selections have nothing else there."""
    operation = edge.operations[0]
    read = {slot for slot, value in enumerate(edge.needs) if graph.values[value].stage == "backward"}
    places = [operation.args[place] for place in LINEAR[edge.label]]
    linear = [isinstance(place, Ref) and place.slot in read for place in places]
    if not read <= {place.slot for place in places if isinstance(place, Ref)}:
        return False
    if edge.label in ("add", "sub"):
        return all(linear)
    if edge.label == "where":
        return all(one or _is_zero(graph, edge, place) for one, place in zip(linear, places, strict=True))
    if edge.label == "masked_fill":
        return bool(operation.args[2] == 0)
    return sum(linear) == 1 and not (edge.label == "div" and operation.kwargs)


def _is_zero(graph: Graph, edge: Edge, place: Any) -> bool:
    made = graph.definition.get(edge.needs[place.slot]) if isinstance(place, Ref) else None
    return made is not None and made.label == "scalar_tensor" and made.operations[0].args[0] == 0


def _cotangents(graph: Graph, edge: Edge) -> list[int]:
    return [value for value in edge.needs if graph.values[value].stage == "backward"]


@dataclass(frozen=True)
class _Chain:
    """The elementwise `edges` that lead from one cotangent, `source`, to `target`, in order."""

    source: int
    target: int
    edges: tuple[Edge, ...]


def _chain(graph: Graph, root: Edge) -> _Chain | None:
    """Back from the root until all that is left to go back to is one cotangent."""
    edges, open_values = [root], set(_cotangents(graph, root))
    while len(open_values) > 1:
        latest = max(open_values)
        edge = graph.definition.get(latest)
        if edge is None or not _is_elementwise(graph, edge) or len(edges) > MOST_STEPS:
            return None
        edges.append(edge)
        open_values.remove(latest)
        open_values.update(_cotangents(graph, edge))
    return _Chain(open_values.pop(), root.gives[0], tuple(edges[::-1])) if open_values else None


def _solved(graph: Graph, roots: Sequence[Edge]) -> Iterator[Region]:
    """The common source of the roots from what they give: with fragments, or, as a fragile way, without."""
    found = [_chain(graph, root) for root in roots]
    chains = [chain for chain in found if chain is not None]
    if len(chains) < len(roots) or len({chain.source for chain in chains}) > 1:
        return
    source, targets = chains[0].source, tuple(dict.fromkeys(chain.target for chain in chains))
    described = _steps(graph, source, chains)
    if described is None or len(targets) < len(roots):
        return
    reads, steps = described
    label, needs = "inverse of an elementwise derivative", (*targets, *reads)
    counts = (len(targets), steps)
    yield Region((source,), needs, partial(_divide, *counts), label, fragile=True)
    yield Region(
        (source,), needs, partial(_restore, *counts), label, fragment=partial(_faint, *counts), fragment_needs=reads
    )


def _steps(graph: Graph, source: int, chains: Sequence[_Chain]) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    """What the chains read of the forward pass, and their calls in slots: the source, these, then the results."""
    own = {value for chain in chains for edge in chain.edges for value in edge.gives} | {source}
    reads = tuple(dict.fromkeys(v for chain in chains for edge in chain.edges for v in edge.needs if v not in own))
    if any(graph.values[value].stage == "backward" for value in reads):
        return None
    steps = tuple(_calls(chain, (source, *reads)) for chain in chains)
    return (reads, steps) if _is_hashable(steps) else None


def _calls(chain: _Chain, inputs: Sequence[int]) -> tuple[Step, ...]:
    slots = {value: slot for slot, value in enumerate(inputs)}
    calls: list[Step] = []
    for edge in chain.edges:
        operation = edge.operations[0]
        places = [slots[value] for value in edge.needs]
        args, kwargs = filled((tuple(operation.args), dict(operation.kwargs)), [Ref(place) for place in places])
        calls.append((operation.target, args, tuple(sorted(kwargs.items()))))
        slots[edge.gives[0]] = len(slots)
    return tuple(calls)


def _is_hashable(steps: tuple[Any, ...]) -> bool:
    return not any(
        isinstance(item, (list, dict)) for calls in steps for _, args, kwargs in calls for item in (*args, *kwargs)
    )


def _derivatives(steps: Sequence[Sequence[Step]], like: Tensor, reads: Sequence[Tensor]) -> list[Tensor]:
    """What each chain makes of ones."""
    return [run_steps(calls, [torch.ones_like(like), *reads])[-1] for calls in steps]


def _divide(count: int, steps: Sequence[Sequence[Step]], *values: Tensor) -> Tensor:
    totals, reads = values[:count], values[count:]
    slopes = _derivatives(steps, totals[0], reads)
    if count == 1:
        return totals[0] / slopes[0]
    return _sum(g * d for g, d in zip(totals, slopes, strict=True)) / _sum(d * d for d in slopes)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _restore(count: int, steps: Sequence[Sequence[Step]], *values: Tensor) -> Tensor:
    *others, marks, taken = values
    return put_marked(_divide(count, steps, *others), marks, taken)


def _faint(count: int, steps: Sequence[Sequence[Step]], h: Tensor, *reads: Tensor) -> tuple[Tensor, Tensor]:
    slopes = _derivatives(steps, h, reads)
    return erasing.take(h, erasing.faint(_sum(d * d for d in slopes)), erasing.FAINT_PART[min(count, 2) - 1])


def find_softsigns(reader: Reader) -> Iterator[Region]:
    """y = x / (1 + |x|), forward."""
    for edge in reader.graph.stage_edges("forward"):
        if edge.label != "div" or edge.operations[0].kwargs or len(edge.needs) != 2:
            continue
        x, total = reader.value(edge, 0), reader.made_by(reader.value(edge, 1), "add")
        if x is None or total is None or total.operations[0].args[1:] != (1,) or total.operations[0].kwargs:
            continue
        size = reader.made_by(reader.value(total, 0), "abs")
        if size is not None and reader.value(size, 0) == x:
            yield Region((x,), edge.gives, partial(_undo_softsign), "inverse of softsign")


def _undo_softsign(y: Tensor) -> Tensor:
    return y / (1 - y.abs())
