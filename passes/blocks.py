"""Cutting the forward pass into blocks where the set of live values is narrowest, and the backward pass with it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from .graph import Edge, Graph
from .joining import joined_cuts

SHAPED = frozenset(  # made from the shape of what they read
    f"{prefix}{name}{suffix}"
    for name in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("new_", ""), ("", "_like"), ("new_", "_strided"))
)


@dataclass(frozen=True)
class Block:
    """A contiguous piece of the forward pass, and the backward edges that belong to it.

    `live_in` and `live_out` are the forward values that cross its borders (inputs of the step apart, and what only
    mutations still read), `demanded` the forward values that its backward edges read, `cotangents_in` those it receives
    from later blocks and `cotangents_out` those that it hands to earlier ones, `gradients` the results of the step that
    it produces.
    """

    index: int
    forward: tuple[Edge, ...]
    late: tuple[Edge, ...]
    backward: tuple[Edge, ...]
    live_in: tuple[int, ...]
    live_out: tuple[int, ...]
    demanded: tuple[int, ...]
    cotangents_in: tuple[int, ...]
    cotangents_out: tuple[int, ...]
    gradients: tuple[int, ...]

    @cached_property
    def name(self) -> str:
        return f"block {self.index}"


def forward_chain(graph: Graph) -> list[Edge]:
    """The forward edges in order, views of the step's inputs apart: these are available everywhere."""
    return [
        edge for edge in graph.stage_edges("forward") if not edge.effect and not graph.static.issuperset(edge.gives)
    ]


def live_sets(graph: Graph, chain: Sequence[Edge]) -> list[frozenset[int]]:
    """For each position p, the values produced before edge p and still wanted by the forward pass from p on.

    New running statistics are not among them once they only wait for the mutation behind it: no block wants them.
    """
    live = {value for value in graph.output_values if value not in graph.static} - set(graph.primals)
    sets = [frozenset(live)]
    for edge in reversed(chain):
        live.difference_update(edge.gives)
        live.update(value for value in edge.needs if value not in graph.static and value not in graph.primals)
        sets.append(frozenset(live))
    return sets[::-1]


def _inputs_still_read(graph: Graph, chain: Sequence[Edge]) -> list[set[int]]:
    """For each position, the activations among the step's inputs that the forward pass still reads."""
    reading: set[int] = set()
    sets: list[set[int]] = [set()]
    for edge in reversed(chain):
        roots = {graph.values[value].storage for value in edge.needs}
        reading |= {root for root in roots if graph.values[root].role == "input"}
        sets.append(set(reading))
    return sets[::-1]


def cut_positions(graph: Graph, chain: Sequence[Edge], live: Sequence[frozenset[int]]) -> list[int]:
    """One candidate between each two expensive operations, where the live set is smallest; local minima stay."""
    landmarks = [p for p, edge in enumerate(chain) if edge.expensive] or [
        p for p, e in enumerate(chain) if not e.is_view
    ]
    reading = _inputs_still_read(graph, chain)
    # Outputs are alive wherever the step is cut behind them: counted, each one would make all later cuts look wide.
    last_read = {value: position for position, edge in enumerate(chain) for value in edge.needs}
    roots = [
        {graph.values[value].storage for value in values if last_read.get(value, -1) >= position} | inputs
        for position, (values, inputs) in enumerate(zip(live, reading, strict=True))
    ]
    size = [sum(graph.values[root].bytes for root in at) for at in roots]
    candidates = []
    for left, right in pairwise(landmarks):
        gap = range(left + 1, right + 1)
        if gap:
            candidates.append(min(gap, key=lambda p: (size[p], -p)))
    kept = []
    for i, p in enumerate(candidates):
        neighbours = [size[candidates[j]] for j in (i - 1, i + 1) if 0 <= j < len(candidates)]
        single = len(roots[p]) <= 1
        if all(size[p] <= other for other in neighbours) or single:
            kept.append(p)
    return kept


def assign_backward(graph: Graph, forward_block: dict[int, int], count: int) -> dict[int, int]:
    """The block of every backward edge, by the index of the edge in the graph.

    An edge belongs to the block of its forward operation (tied by `sequence`, or to the next one, as the number of an
    operation in place is lost), but never to a later block than its cotangents. The sum that accumulates a fan-out
    carries a sequence of its own: it goes where its last summand is. A constant, made from no input or from its shape
    alone, carries the sequence of the operation before it: that says nothing.
    """
    by_sequence: dict[int, int] = {}
    constants: set[int] = set()
    for edge in graph.stage_edges("forward"):
        if constants.issuperset(edge.needs) or edge.label in SHAPED:
            constants.update(edge.gives)
        elif edge.sequence is not None and edge.gives and edge.gives[0] in forward_block:
            block = forward_block[edge.gives[0]]
            by_sequence[edge.sequence] = max(block, by_sequence.get(edge.sequence, 0))
    sequences = sorted(by_sequence)
    latest = sequences[-1] if sequences else -1
    block_of: dict[int, int] = dict.fromkeys(graph.tangents, count - 1)
    assigned: dict[int, int] = {}
    for position, edge in enumerate(graph.edges):
        if edge.stage != "backward" or edge.effect:
            continue
        cotangents = [block_of[value] for value in edge.needs if value in block_of]
        block = min(cotangents, default=count - 1)
        accumulates = edge.label == "add" and len(cotangents) > 1
        if not accumulates and edge.sequence is not None and edge.sequence <= latest:
            block = min(block, by_sequence[sequences[bisect_left(sequences, edge.sequence)]])
        assigned[position] = block
        block_of.update(dict.fromkeys(edge.gives, block))
    return assigned


def split_blocks(graph: Graph, chain: Sequence[Edge], cuts: Iterable[int]) -> list[list[Edge]]:
    borders = [0, *cuts, len(chain)]
    return [list(chain[a:b]) for a, b in pairwise(borders) if b > a]


def find_blocks(graph: Graph, inverse: Iterable[Edge] = ()) -> tuple[Block, ...]:
    """Cut the step. Every forward, late and backward edge belongs to exactly one block.

    With `inverse` edges, what can be inverted together stays together.
    """
    chain = forward_chain(graph)
    live = live_sets(graph, chain)
    cuts = joined_cuts(graph, chain, live, cut_positions(graph, chain, live), inverse)
    pieces = split_blocks(graph, chain, cuts)
    borders = [0, *cuts, len(chain)]
    forward_block = {value: i for i, piece in enumerate(pieces) for edge in piece for value in edge.gives}
    assigned = assign_backward(graph, forward_block, len(pieces))
    backward: list[list[Edge]] = [[] for _ in pieces]
    for position, block in assigned.items():
        backward[block].append(graph.edges[position])
    late = _assign_late(graph, forward_block, backward, [live[border] for border in borders])
    producer = {value: i for i, edges in enumerate(backward) for edge in edges for value in edge.gives}
    producer.update(dict.fromkeys(graph.tangents, len(pieces)))
    gradients = set(graph.gradient_values)
    arriving: list[list[int]] = [[] for _ in pieces]  # by block: the cotangents that it receives, and hands on
    leaving: list[list[int]] = [[] for _ in pieces]
    reader: dict[int, int] = {}  # the earliest block whose backward edges read a cotangent
    for i, edges in enumerate(backward):
        for edge in edges:
            for value in edge.needs:
                if value in producer:
                    reader[value] = min(i, reader.get(value, i))
    for value in sorted(reader):
        for i in range(reader[value], producer[value]):
            arriving[i].append(value)
        for i in range(reader[value] + 1, min(producer[value] + 1, len(pieces))):  # the tangents have no producer
            leaving[i].append(value)
    return tuple(
        Block(
            index=i,
            forward=tuple(piece),
            late=tuple(late[i]),
            backward=tuple(backward[i]),
            live_in=tuple(sorted(live[borders[i]])),
            live_out=tuple(sorted(live[borders[i + 1]])),
            demanded=demanded(graph, backward[i]),
            cotangents_in=tuple(arriving[i]),
            cotangents_out=tuple(leaving[i]),
            gradients=tuple(sorted(v for e in backward[i] for v in e.gives if v in gradients)),
        )
        for i, piece in enumerate(pieces)
    )


def _assign_late(
    graph: Graph, block: dict[int, int], backward: Sequence[Sequence[Edge]], live_in: Sequence[frozenset[int]]
) -> list[list[Edge]]:
    """Late edges live with their first reader if the values they read are alive there, else with these values.

    (`x.t()` in the gradient of `x @ w` belongs to the product's block, though x is made by the block before.) Views of
    the step's inputs live with nobody.
    """
    late: list[list[Edge]] = [[] for _ in backward]
    edges = [edge for edge in graph.stage_edges("late") if not graph.static.issuperset(edge.gives)]
    readers = _first_readers(edges, backward)
    place = dict(block)
    for edge in edges:
        made = max((place[value] for value in edge.needs if value in place), default=0)
        read = min((readers[value] for value in edge.gives if value in readers), default=len(backward) - 1)
        at_hand = all(value in live_in[read] or place.get(value, read) == read for value in edge.needs)
        home = read if at_hand and read > made else made
        late[home].append(edge)
        place.update(dict.fromkeys(edge.gives, home))
    return late


def _first_readers(late: Sequence[Edge], backward: Sequence[Sequence[Edge]]) -> dict[int, int]:
    """The first block whose backward edges read a value, directly or through late edges."""
    readers = {value: i for i in reversed(range(len(backward))) for edge in backward[i] for value in edge.needs}
    for edge in reversed(late):
        first = min((readers[value] for value in edge.gives if value in readers), default=None)
        if first is not None:
            readers.update({value: min(first, readers.get(value, first)) for value in edge.needs})
    return readers


def demanded(graph: Graph, edges: Iterable[Edge]) -> tuple[int, ...]:
    """The forward values that backward edges read."""
    return tuple(
        sorted(
            {
                value
                for edge in edges
                for value in edge.needs
                if graph.values[value].stage != "backward" and value not in graph.static
            }
        )
    )
