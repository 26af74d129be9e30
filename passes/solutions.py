"""What each block can solve for: its inversion, its cotangent spine, its sweep; and what each has to keep for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

from .analysis import Analysis
from .blocks import Block, demanded
from .fusion import edges_seconds
from .graph import Edge, Graph
from .inverse import CUSTOM, WAITING_BYTES_PER_S, Solution, jumps, kinks, solve
from .workspace import Workspaces

SMALL = 16  # a residual that is this many times smaller than what a block has anyway is not worth avoiding


@dataclass(frozen=True)
class Inversion:
    """How a block's inputs, and all that its `backward` edges read, follow from its outputs and the kept `residuals`.

    Of these, the `sides` say where noise must not decide anew (see `block_sides`).
    """

    solution: Solution
    residuals: tuple[int, ...]
    missing: tuple[int, ...]
    sides: frozenset[int]
    backward: tuple[Edge, ...]


def block_inversion(analysis: Analysis, block: Block) -> Inversion:
    """Solve a block backward; where its outputs alone do not say enough, with small values of it kept beside them."""
    sides, decode, backward = block_sides(analysis, block)
    edges = (*analysis.recover(block), *analysis.inverse[block.index], *decode)
    known = {*block.live_out, *analysis.graph.static, *residue(analysis, block), *sides}
    wanted = (*block.live_in, *demanded(analysis.graph, backward))
    found, used = solve(edges, known, wanted), tuple[int, ...]()
    if found.missing:
        reading = [_reading(analysis.graph, value) for value in sorted(_small_values(analysis, block) - known)]
        found, used = _leanest(edges, reading, known, wanted)
        edges = (*(edge for edge in reading if edge.gives[0] in used), *edges)
    if found.missing:
        return Inversion(found, (), found.missing, frozenset(), backward)
    found = _through(edges, known, block.live_in, wanted)
    read = {value for edge in found.program(wanted) for value in edge.needs} | {*wanted}
    sides &= read
    return Inversion(found, tuple(sorted({*used, *sides})), (), sides, backward)


def _through(edges: Sequence[Edge], known: Set[int], borders: Sequence[int], wanted: Sequence[int]) -> Solution:
    """The `wanted` values from those at the `borders`, and what was solved on the way to these, by no further inverse.

    One that leads elsewhere may amplify noise, and certificates would not see it.
    """
    way = solve(edges, known, borders)
    path = [] if way.missing else way.program(borders)
    there = {value: edge for edge in path for value in edge.gives}
    rest = solve([edge for edge in edges if edge.kind != "inverse"], {*known, *there}, wanted)
    if way.missing or rest.missing:
        return solve(edges, known, wanted)
    return Solution({**rest.edge, **there}, way.known, ())


def block_sides(analysis: Analysis, block: Block) -> tuple[frozenset[int], list[Edge], tuple[Edge, ...]]:
    """What a block keeps when it is inverted, so that noise cannot take the other side of a kink; and the edges that
    unpack it; and the block's backward edges, reading that.

    A part e of the elements is nearer to a kink than a noise of e, and each of them that changes sides is wrong by all
    of its cotangent: a gradient would be wrong by the root of e.
    """
    graph = analysis.graph
    packs = {pack.decode.gives[0]: pack for pack in analysis.signs[block.index]}
    readers = {(e.label, e.gives): e for e in analysis.shortcuts[block.index] if not packs.keys().isdisjoint(e.needs)}
    sides, decode, backward = set[int](), dict[int, Edge](), list[Edge]()
    for edge in (*block.forward, *block.late):
        noisy = not edge.random and any(v not in graph.static and not _is_discrete(graph, v) for v in edge.needs)
        sides |= {v for v in edge.gives if noisy and jumps(edge.label, graph.values[v].dtype)}
    sides |= {v for v in (*block.live_in, *block.demanded) if _is_discrete(graph, v)}
    for edge in block.backward:
        twin = readers.get((f"{edge.label} from bits", edge.gives))
        if twin is not None:
            unpacked = {need: packs[need] for need in twin.needs if need in packs}
            sides |= {pack.kept for pack in unpacked.values()}
            decode |= {need: pack.decode for need, pack in unpacked.items()}
        else:
            read = {v for v in edge.needs if graph.values[v].stage != "backward"} - graph.static
            sides |= set() if edge.label in CUSTOM else read & kinks(edge)
        backward.append(twin or edge)
    return frozenset(sides - drawn(analysis, block)), list(decode.values()), tuple(backward)


def _is_discrete(graph: Graph, value: int) -> bool:
    return value not in graph.static and jumps("", graph.values[value].dtype)


def _small_values(analysis: Analysis, block: Block) -> set[int]:
    """What a block computes that is next to nothing beside its inputs: a mean, a norm, a scale."""
    graph, charges = analysis.graph, analysis.charges
    entering = sum(size for _, size in {charges[value] for value in block.live_in})
    values = {value for edge in (*block.forward, *block.late) for value in edge.gives}
    return {v for v in values - graph.static if graph.storage_bytes([v]) * SMALL <= entering}


def residue(analysis: Analysis, block: Block) -> frozenset[int]:
    """What a block keeps under every strategy that computes it again: what was drawn, inputs overwritten since, and
    tiny statistics."""
    overwritten = {v for edge in analysis.recover(block) for v in edge.needs if v in analysis.graph.mutated}
    return drawn(analysis, block) | analysis.statistics(block) | overwritten


def drawn(analysis: Analysis, block: Block) -> frozenset[int]:
    """Results of random operations: drawn once, so kept under every strategy (as bits where they are masks)."""
    edges = (edge for edge in (*block.forward, *block.late) if edge.random)
    return frozenset(value for edge in edges for value in random_residue(analysis, edge))


def random_residue(analysis: Analysis, edge: Edge) -> tuple[int, ...]:
    """What is kept of a random operation: of a dropout the mask, of anything else all of its results."""
    replay = analysis.replays.get(edge.gives)
    return edge.gives if replay is None else tuple(v for v in replay.needs if v in edge.gives)


@dataclass(frozen=True)
class Spine:
    """How a block's input cotangents follow from its output cotangents, and what of the forward pass that reads.

    The `fragments` are taken of the cotangents on the way, and wait for the sweep.
    """

    solution: Solution
    residuals: tuple[int, ...]
    missing: tuple[int, ...]
    fragments: tuple[int, ...] = ()


def block_spine(analysis: Analysis, block: Block, fragments: Sequence[int] = ()) -> Spine:
    """The cheapest spine: reading a value of the forward pass costs its bytes, a bit per element where bits will do.

    On its way it takes the `fragments` that the block's sweep wants.
    """
    graph, reads = analysis.graph, _spine_reads(analysis, block)
    packs = [*analysis.signs[block.index], *(analysis.packs[v] for v in reads if v in analysis.packs)]
    packs += [analysis.packs[v] for e in analysis.shortcuts[block.index] for v in e.needs if v in analysis.packs]
    packs = list({pack.kept: pack for pack in packs}.values())
    edges = (
        *(pack.decode for pack in packs),
        *block.backward,
        *analysis.shortcuts[block.index],
        *analysis.fragments[block.index],
    )
    reading = [_reading(graph, value) for value in sorted({*(pack.kept for pack in packs), *reads})]
    known, wanted = {*block.cotangents_in, *graph.static}, (*block.cotangents_out, *fragments)
    found, used = _leanest(edges, reading, known, wanted)
    return Spine(found, tuple(sorted(used)), found.missing, tuple(fragments))


def _reading(graph: Graph, value: int) -> Edge:
    """Having a value of the forward pass at hand, at the price of its bytes."""
    seconds = graph.values[graph.values[value].storage].bytes / WAITING_BYTES_PER_S
    return Edge((value,), (), (), (), "residual", seconds=seconds)


def _leanest(
    edges: Sequence[Edge], reading: Sequence[Edge], known: Set[int], wanted: Sequence[int]
) -> tuple[Solution, tuple[int, ...]]:
    """The solution that reads little, and what it reads.

    The engine weighs each path alone and does not see that two of them read different things. So it is asked again
    without each of the heavier ones, as long as that makes the whole cheaper.
    """

    def attempt(barred: Set[int]) -> tuple[float, Solution, list[Edge]]:
        allowed = [edge for edge in reading if edge.gives[0] not in barred]
        found = solve((*allowed, *edges), known, wanted)
        program = [] if found.missing else found.program(wanted)
        seconds = math.inf if found.missing else sum(edge.seconds for edge in program)
        return seconds, found, [edge for edge in program if edge.label == "residual"]

    barred: frozenset[int] = frozenset()
    best = attempt(barred)
    read = sorted(best[2], key=lambda edge: -edge.seconds)
    heavy = [edge.gives[0] for edge in read if edge.seconds * SMALL >= read[0].seconds]
    for value in heavy if len(heavy) > 1 else ():
        leaner = attempt(barred | {value})
        if leaner[0] < best[0]:
            barred, best = barred | {value}, leaner
    return best[1], tuple(edge.gives[0] for edge in best[2])


def _spine_reads(analysis: Analysis, block: Block) -> set[int]:
    graph = analysis.graph
    edges = (*block.backward, *analysis.shortcuts[block.index], *analysis.fragments[block.index])
    return {
        v
        for e in edges
        for v in e.needs
        if v < len(analysis.capture.graph.values) and graph.values[v].stage != "backward"
    } - graph.static


def block_sweep(analysis: Analysis, block: Block) -> Solution:
    """Solve a block's output cotangents and its parameter gradients from its input values and input cotangents."""
    strict = analysis.strict_signs[block.index]
    replaced = {value for edge in strict for value in edge.gives}
    original = len(analysis.capture.graph.values)
    edges = (
        *(edge for edge in analysis.recover(block) if not replaced.intersection(edge.gives)),
        *strict,
        *block.backward,
        *analysis.vijp[block.index],
        *(edge for edge in analysis.shortcuts[block.index] if all(value < original for value in edge.needs)),
    )
    taken = _taken_values(analysis, block.index)
    known = {*block.live_in, *block.cotangents_out, *analysis.graph.static, *residue(analysis, block), *taken}
    return _through(edges, known, (*block.live_out, *block.cotangents_in), swept(block))


def swept(block: Block) -> tuple[int, ...]:
    """What the sweep of a block has to give."""
    return (*block.live_out, *block.cotangents_in, *block.gradients)


def wanted_fragments(analysis: Analysis, block: Block, sweep: Solution) -> tuple[int, ...]:
    """The fragments that a block's sweep reads."""
    if sweep.missing:
        return ()
    read = {value for edge in sweep.program(swept(block)) for value in edge.needs}
    return tuple(value for value in _taken_values(analysis, block.index) if value in read)


def _taken_values(analysis: Analysis, index: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(value for edge in analysis.fragments[index] for value in edge.gives))


def block_passing(analysis: Analysis, block: Block) -> frozenset[int]:
    """Forward values and cotangents that are alive before and behind a block, and that no edge of it touches."""
    index = block.index
    own = (block.forward, block.late, block.backward)
    rules = (analysis.inverse[index], analysis.vijp[index], analysis.shortcuts[index], analysis.fragments[index])
    touched = {v for edges in (*own, *rules) for edge in edges for v in (*edge.needs, *edge.gives)}
    through = {*block.live_in}.intersection(block.live_out) | {*block.cotangents_in}.intersection(block.cotangents_out)
    return frozenset(through - touched)


def block_seconds(analysis: Analysis, block: Block) -> tuple[float, float]:
    graph, device = analysis.graph, analysis.device
    forward = edges_seconds(block.forward, {*block.live_out, *block.demanded}, graph, device)
    backward = edges_seconds(block.backward, {*block.cotangents_out, *block.gradients}, graph, device)
    return forward, backward + waiting_seconds(analysis, block.demanded)


def waiting_seconds(analysis: Analysis, kept: Iterable[int]) -> float:
    """What the step takes longer because these values wait for the backward pass."""
    static, charges, device = analysis.graph.static, analysis.charges, analysis.device
    if not (device.fused and device.far):
        return 0.0
    return device.far * sum(size for _, size in {charges[value] for value in kept if value not in static})


class Facts:
    """The solutions of single blocks, computed when first asked for.

    `reuse` says that the programs will be lowered with results written over dying operands, `workspace` what an
    operation holds within its call, `freed` which gradients are used up where they are produced.
    """

    def __init__(
        self,
        analysis: Analysis,
        reuse: bool = False,
        workspace: Workspaces | None = None,
        freed: frozenset[int] = frozenset(),
    ) -> None:
        self.analysis, self.reuse, self.workspace, self.freed = analysis, reuse, workspace, freed
        self._cache: dict[tuple[str, int], Any] = {}

    def _once(self, kind: str, index: int, function: Callable[[Analysis, Block], Any]) -> Any:
        if (kind, index) not in self._cache:
            self._cache[kind, index] = function(self.analysis, self.analysis.blocks[index])
        return self._cache[kind, index]

    def inversion(self, index: int) -> Inversion:
        return cast(Inversion, self._once("inversion", index, block_inversion))

    def spine(self, index: int) -> Spine:
        return cast(Spine, self._once("spine", index, self._spine))

    def _spine(self, analysis: Analysis, block: Block) -> Spine:
        return block_spine(analysis, block, wanted_fragments(analysis, block, self.sweep(block.index)))

    def sweep(self, index: int) -> Solution:
        return cast(Solution, self._once("sweep", index, block_sweep))

    def gradients(self, index: int) -> list[int]:
        """The gradients of a block that add up until the end of the step."""
        return [value for value in self.analysis.blocks[index].gradients if value not in self.freed]

    def seconds(self, index: int) -> tuple[float, float]:
        """What a block's forward and backward pass take."""
        return cast(tuple[float, float], self._once("seconds", index, block_seconds))

    def passing(self, span: Iterable[int]) -> frozenset[int]:
        """The values that only pass through some blocks: alive on both sides, and touched by none of them."""
        return frozenset.intersection(*(self._once("passing", index, block_passing) for index in span))
