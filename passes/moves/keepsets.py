"""What a block may keep: minimum cuts between keeping bytes and recomputing, at several prices of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import networkx as nx

from ..analysis import Analysis
from ..blocks import Block
from ..graph import Edge
from ..inverse import solve

_FOREVER = float("inf")


def min_cut_keep(analysis: Analysis, block: Block, price: float) -> frozenset[int]:
    """The values of a block to keep when a second of recomputation costs `price` bytes (Boykov-style closure).

    Each value has two switches: available (A) and recomputed (R). Available without being recomputed means kept
    and costs its bytes, recomputed costs its time and makes all that its edge needs available.
    """
    cut = nx.DiGraph()
    edges = {value: edge for edge in analysis.recover(block) for value in edge.gives}
    for edge in edges.values():
        _add_recomputation(analysis, cut, edge, price)
    wanted = set(block.demanded)
    for value in wanted:
        cut.add_edge("source", ("A", _root(analysis, value)), capacity=_FOREVER)
    for value in wanted | {need for edge in edges.values() for need in edge.needs}:
        if value not in analysis.graph.static:
            _add_value(analysis, cut, value, edges, price)
    if "source" not in cut:
        return frozenset()
    cut.add_node("sink")
    _, (reachable, _) = nx.minimum_cut(cut, "source", "sink")
    return frozenset(
        value
        for value in _candidates(analysis, edges, wanted)
        if ("A", value) in reachable and ("R", value) not in reachable
    )


def _root(analysis: Analysis, value: int) -> int:
    """Views share their base's switches: keeping either keeps the storage."""
    return analysis.graph.values[value].storage if value not in analysis.packs else value


def _candidates(analysis: Analysis, edges: dict[int, Edge], wanted: set[int]) -> Iterator[int]:
    seen = {_root(analysis, v) for v in (*wanted, *edges, *(n for e in edges.values() for n in e.needs))}
    return (value for value in sorted(seen) if value not in analysis.graph.static)


def _kept_bytes(analysis: Analysis, value: int, price: float) -> float:
    """What keeping a value costs, as bits or as it is."""
    saved, seconds = _packing(analysis, value)
    return float(_bytes(analysis, value) - max(saved - seconds * price, 0))


def _packing(analysis: Analysis, value: int) -> tuple[int, float]:
    """The bytes that packing a value saves, and the seconds that it takes. What is overwritten has to be copied."""
    pack = analysis.packs.get(value)
    if pack is None:
        return 0, 0.0
    saved = _bytes(analysis, value) - _bytes(analysis, pack.kept)
    overwritten = analysis.graph.values[value].storage in analysis.graph.mutated
    return saved, 0.0 if overwritten else pack.encode.seconds + pack.decode.seconds


def _bytes(analysis: Analysis, value: int) -> int:
    return analysis.graph.values[analysis.graph.values[value].storage].bytes


def not_packed(analysis: Analysis, kept: Iterable[int], price: float) -> frozenset[int]:
    """What to keep as it is though it could be kept as bits, when a second costs `price` bytes."""
    costs = {value: _packing(analysis, value) for value in kept if value in analysis.packs}
    return frozenset(value for value, (saved, seconds) in costs.items() if seconds and saved < seconds * price)


def _add_value(analysis: Analysis, cut: nx.DiGraph, value: int, edges: dict[int, Edge], price: float) -> None:
    root = _root(analysis, value)
    cut.add_edge(("A", root), ("R", root), capacity=_kept_bytes(analysis, root, price) + 1e-3)
    if root not in edges:
        cut.add_edge(("R", root), "sink", capacity=_FOREVER)


def _add_recomputation(analysis: Analysis, cut: nx.DiGraph, edge: Edge, price: float) -> None:
    for value in edge.gives:
        root = _root(analysis, value)
        if root != value:
            continue
        cut.add_edge(("R", root), "sink", capacity=edge.seconds * price)
        for need in edge.needs:
            if need not in analysis.graph.static:
                cut.add_edge(("R", root), ("A", _root(analysis, need)), capacity=_FOREVER)


def keep_sets(analysis: Analysis, block: Block, prices: Iterable[float]) -> list[tuple[frozenset[int], float]]:
    """The distinct kept sets over `prices` (bytes per second), from keeping everything to keeping least, each with the
    highest price at which it is the cheapest."""
    found = {frozenset(_everything(analysis, block)): _FOREVER}
    for price in sorted(prices, reverse=True):
        found.setdefault(min_cut_keep(analysis, block, price), price)
    return list(found.items())


def kept_as_one(analysis: Analysis, blocks: Sequence[Block], kept: frozenset[int], price: float) -> frozenset[int]:
    """What a run of blocks has to keep of what they keep one by one: values at the borders between them may follow
    from the rest, by cheap operations that save more bytes than their time is worth."""
    values = analysis.graph.values
    edges = [edge for block in blocks for edge in analysis.recover(block) if not edge.expensive]
    for block in reversed(blocks[1:]):
        for root in sorted({values[value].storage for value in block.live_in if value in kept}):
            shared = {value for value in kept if values[value].storage == root}
            found = solve(edges, {*analysis.graph.static, *kept} - shared, shared)
            if found.missing:
                continue
            seconds = sum(edge.seconds for edge in found.program(sorted(shared)))
            if seconds * price < values[root].bytes:
                kept -= shared
    return kept


def _everything(analysis: Analysis, block: Block) -> Iterator[int]:
    """What plain backpropagation saves: forward values that backward edges read, or that late ones derive from."""
    late = {value: edge for edge in block.late for value in edge.gives}
    stack = list(block.demanded)
    while stack:
        value = stack.pop()
        if value in late and value not in analysis.packs:
            stack.extend(late[value].needs)
        elif value not in analysis.graph.static:
            yield value
