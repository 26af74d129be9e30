"""What a block may keep: minimum cuts between keeping bytes and recomputing, at several prices of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import networkx as nx

from .analysis import Analysis
from .blocks import Block
from .emit import stored
from .graph import Edge

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
            _add_value(analysis, cut, value, edges)
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


def _add_value(analysis: Analysis, cut: nx.DiGraph, value: int, edges: dict[int, Edge]) -> None:
    root = _root(analysis, value)
    twin = stored(analysis, root)
    size = analysis.graph.values[analysis.graph.values[twin].storage].bytes
    cut.add_edge(("A", root), ("R", root), capacity=float(size) + 1e-3)
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


def keep_sets(analysis: Analysis, block: Block, prices: Iterable[float]) -> list[frozenset[int]]:
    """The distinct kept sets over `prices` (bytes per second), from keeping everything to keeping least."""
    found: dict[frozenset[int], None] = {frozenset(_everything(analysis, block)): None}
    for price in sorted(prices, reverse=True):
        found.setdefault(min_cut_keep(analysis, block, price), None)
    return list(found)


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
