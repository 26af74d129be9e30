"""From a choice of strategies to the two programs of a step: every value is obtained just before its use.

The backward pass walks the segments from last to first. A segment's strategy only decides the *routes*: which edge
gives a value that is not at hand. Emission itself is the same for all of them, on demand and memoised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from .analysis import Analysis
from .drift import Drift, Watch
from .graph import Edge, Ref
from .inverse import Solution, solve
from .program import Builder, Program
from .solutions import Facts


@dataclass(frozen=True)
class Segment:
    """Blocks `first` to `last` under one strategy; `kept` are the values (packed twins apart) that it keeps.

    Of these, `whole` are kept as they are though they could be kept as bits.
    A checkpoint with `inner` segments is computed again only to keep what these keep; then each is a segment.
    """

    first: int
    last: int
    strategy: str
    kept: frozenset[int]
    inner: tuple[Segment, ...] = ()
    whole: frozenset[int] = frozenset()

    @property
    def span(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True)
class Schedule:
    """The forward and the backward program, and the values handed from one to the other, in order.

    Behind the gradients, the backward program returns how far each inverted chain has drifted.
    """

    forward: Program
    backward: Program
    kept: tuple[int, ...]
    drifts: tuple[Drift, ...] = ()


class Unreachable(Exception):
    """A value that the backward pass needs can be neither kept, recomputed nor solved for."""


class BackwardEmitter:
    """Emits segments, last to first. `kept` values and `given` ones (cotangents, borders) are arguments when read."""

    def __init__(
        self,
        facts: Facts,
        kept: Iterable[int],
        given: Iterable[int],
        span: Iterable[int] | None = None,
        watching: bool = False,
        whole: Set[int] = frozenset(),
    ) -> None:
        self.facts, self.analysis, self.graph = facts, facts.analysis, facts.analysis.graph
        self.builder = Builder(self.graph)
        self.kept, self.given = frozenset(kept), frozenset(given)
        self.packs = {v: facts.analysis.packs[v] for v in self.kept if v in facts.analysis.packs and v not in whole}
        self.kept |= {pack.kept for pack in self.packs.values()}
        self.routes: dict[int, Edge] = {}
        self.sides: frozenset[int] = frozenset()  # of the block that is being inverted
        self.watching = watching
        self.drifts: list[tuple[Drift, int]] = []  # with the slot of each
        self.default = self._forward_routes(range(len(self.analysis.blocks)) if span is None else span)

    def _forward_routes(self, span: Iterable[int]) -> Mapping[int, Edge]:
        edges = [edge for index in span for edge in self.analysis.recover(self.analysis.blocks[index])]
        found = solve(edges, self.kept | self.given | self.graph.static, ())
        return found.edge

    def route(self, value: int) -> Edge | None:
        """The edge to emit for a value, or None when it is an argument of the backward program."""
        if value in self.kept:
            pack = self.packs.get(value)
            return None if pack is None else pack.decode
        if value in self.graph.static:
            return self.graph.definition.get(value)
        if value in self.given:
            return None
        edge = self.routes.get(value) or self.default.get(value)
        if edge is None:
            raise Unreachable(self.graph.values[value].name)
        return edge

    def ensure(self, values: Iterable[int], block: int) -> None:
        stack = list(values)[::-1]
        while stack:
            value = stack[-1]
            if value in self.builder.environment:
                stack.pop()
                continue
            edge = self.route(value)
            if edge is None:
                self.builder.input(value)
                stack.pop()
                continue
            waiting = [need for need in edge.needs if need not in self.builder.environment]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                self.builder.emit(edge, block)
                self.builder.forget(self.sides.intersection(edge.gives) - {value})  # those that are kept count
                stack.pop()
            if len(stack) > 100_000:
                raise Unreachable(self.graph.values[value].name)

    def run(self, segment: Segment) -> None:
        if segment.strategy == "moonwalk":
            self.spine(segment)
            self.sweep(segment)
            return
        if segment.inner:
            self._nested(segment)
            return
        there, routes = set(self.builder.environment), dict(self.routes)
        watched = self._watched(segment, segment.span, 0) if segment.strategy == "invert" else None
        for index in reversed(segment.span):
            block, edges = self.analysis.blocks[index], self.analysis.blocks[index].backward
            if segment.strategy == "invert":
                inversion = self.facts.inversion(index)
                edges, self.sides = inversion.backward, inversion.sides
                self._follow(inversion.solution)
                self.ensure(block.live_in, index)
            if watched is not None and watched[0] == index:
                self.builder.input(watched[1].kept)
                self._compare(segment, watched[1])
            self._backward(edges, index)
        if segment.strategy == "invert":
            self.sides, self.routes = frozenset(), routes
            self._forget_forward(there)  # noisy: what the segments before read of them, they have exactly

    def _watched(self, segment: Segment, order: Iterable[int], which: int) -> tuple[int, Watch] | None:
        """The first watch on what a chain recovers: what is kept or given anyway is not recovered."""
        if not self.watching:
            return None
        for index in order:
            watch = self.analysis.watches[index][which]
            if watch is not None and watch.value not in self.kept | self.given:
                return index, watch
        return None

    def _compare(self, segment: Segment, watch: Watch) -> None:
        """As part of the block in front of the chain: the chain's own blocks stay alike, and are compiled once."""
        self.builder.emit(watch.compare, max(segment.first - 1, 0))
        slot = self.builder.environment[watch.drift]
        self.drifts.append((Drift(segment.strategy, segment.first, segment.last), slot))

    def _follow(self, solution: Solution) -> None:
        """What the solution reads of kept values are arguments; the rest is computed as it says."""
        self.routes.update({value: edge for value, edge in solution.edge.items() if edge.label != "residual"})

    def _nested(self, segment: Segment) -> None:
        """Forward again, holding only what the inner segments keep; then these, from last to first."""
        there = set(self.builder.environment)
        for inner in segment.inner:
            self.ensure(sorted(inner.kept - self.kept), inner.first)
        for position in reversed(range(len(segment.inner))):
            held = frozenset().union(*(inner.kept for inner in segment.inner[: position + 1]))
            self._forget_forward(there | held)
            self.run(segment.inner[position])
        self._forget_forward(there)

    def _forget_forward(self, but: Set[int]) -> None:
        """Forward values that are wanted again later are computed again, so that they do not stay alive until then."""
        values = self.graph.values
        self.builder.forget([v for v in self.builder.environment if v not in but and values[v].stage != "backward"])

    def _backward(self, edges: Iterable[Edge], block: int) -> None:
        for edge in edges:
            if all(value in self.builder.environment for value in edge.gives) and edge.gives:
                continue
            self.ensure(edge.needs, block)
            self.builder.emit(edge, block)

    def spine(self, segment: Segment) -> None:
        """The input cotangents of a moonwalk segment, from last block to first."""
        blocks = [self.analysis.blocks[index] for index in segment.span]
        leaving = {*blocks[0].cotangents_out}
        before = set(self.builder.environment)
        watched = self._watched(segment, reversed(segment.span), 1)
        for block in reversed(blocks):
            if watched is not None and watched[0] == block.index:
                self.ensure([watched[1].value], block.index)
                self.builder.emit(watched[1].sample, min(segment.last + 1, len(self.analysis.blocks) - 1))
                leaving.add(watched[1].kept)
            spine = self.facts.spine(block.index)
            self._follow(spine.solution)
            self.ensure((*block.cotangents_out, *spine.fragments), block.index)
            leaving.update(spine.fragments)
        inside = (set(self.builder.environment) - before) | {*blocks[-1].cotangents_in}
        self.builder.forget(inside - leaving)

    def sweep(self, segment: Segment) -> None:
        """The gradients of a moonwalk segment, from first block to last."""
        blocks = [self.analysis.blocks[index] for index in segment.span]
        for block in blocks:
            self.routes.update(self.facts.sweep(block.index).edge)
        for block in blocks:
            self.ensure(block.gradients, block.index)
        watched = self._watched(segment, reversed(segment.span), 1)
        if watched is not None:
            self.ensure([watched[1].value], watched[0])
            self._compare(segment, watched[1])


class ForwardEmitter:
    """Emits forward edges in their order; what is packed or kept of late values comes right behind its producer."""

    def __init__(self, analysis: Analysis, kept: Iterable[int]) -> None:
        self.analysis, self.graph = analysis, analysis.graph
        self.builder = Builder(analysis.graph)
        self.extras = self._extras(frozenset(kept))
        self.lacking = [set(edge.needs) - self.graph.static - self.graph.mutated for edge in self.extras]
        self.waiting: dict[int, list[int]] = {}  # by value: the extras that wait for it
        for position, lacking in enumerate(self.lacking):
            for value in lacking:
                self.waiting.setdefault(value, []).append(position)

    def _extras(self, kept: frozenset[int]) -> list[Edge]:
        definition = self.analysis.definition
        stack, edges = sorted(kept), {}
        while stack:
            value = stack.pop()
            edge = definition.get(value)
            if edge is not None and edge.stage == "late" and value not in edges:
                edges[value] = edge
                stack.extend(edge.needs)
        unique = {id(edge): edge for edge in edges.values()}
        return sorted(unique.values(), key=lambda e: (e.kind == "codec", self.graph.position.get(e.gives[0], 0)))

    def run(self, edges: Iterable[Edge], block_of: dict[int, int]) -> None:
        self._extra((position for position, lacking in enumerate(self.lacking) if not lacking), 0)
        self._arrived(list(self.builder.environment), 0)
        for edge in edges:
            if edge.gives and self.graph.static.issuperset(edge.gives):
                continue  # a view of an input: emitted by its first reader
            block = block_of.get(edge.gives[0], 0) if edge.gives else len(self.analysis.blocks) - 1
            self._read(edge, block)
            self.builder.emit(edge, block)
            self._arrived(edge.gives, block)

    def _read(self, edge: Edge, block: int) -> None:
        for value in edge.needs:
            self.read_value(value, block)

    def read_value(self, value: int, block: int = 0) -> None:
        """Make an input, or a view of one, available."""
        if value in self.builder.environment:
            return
        edge = self.graph.definition.get(value)
        if edge is None:
            self.builder.input(value)
            return
        self._read(edge, block)
        self.builder.emit(edge, block)

    def _arrived(self, values: Iterable[int], block: int) -> None:
        """Emit the extras that waited for these values alone."""
        ready = []
        for value in values:
            for position in self.waiting.pop(value, ()):
                self.lacking[position].discard(value)
                if not self.lacking[position]:
                    ready.append(position)
        self._extra(sorted(ready), block)

    def _extra(self, positions: Iterable[int], block: int) -> None:
        for position in positions:
            edge = self.extras[position]
            self._read(edge, block)
            self.builder.emit(edge, block)
            self._arrived(edge.gives, block)


def stored(analysis: Analysis, value: int) -> int:
    """The value that is really handed over for a kept one: its packed twin where there is one."""
    pack = analysis.packs.get(value)
    return value if pack is None else pack.kept


def kept_whole(segments: Iterable[Segment]) -> frozenset[int]:
    """What any of the segments, or of those inside them, keeps as it is."""
    return frozenset().union(*(segment.whole | kept_whole(segment.inner) for segment in segments))


def emit(facts: Facts, segments: Sequence[Segment], sweeps_last: bool = False) -> Schedule:
    """The two programs of a plan. Raises `Unreachable` when the segments do not keep enough.

    With `sweeps_last`, the sweep of a moonwalk segment waits until all before the segment has run backward: then the
    cotangents that it begins with need not stay alive to its end.
    """
    analysis, graph = facts.analysis, facts.analysis.graph
    kept = {value for segment in segments for value in segment.kept}
    given = {*graph.tangents, *graph.output_values}
    emitter = BackwardEmitter(facts, kept, given, watching=True, whole=kept_whole(segments))
    waiting = []
    for segment in reversed(segments):
        if sweeps_last and segment.strategy == "moonwalk":
            emitter.spine(segment)
            waiting.append(segment)
        else:
            emitter.run(segment)
    for segment in reversed(waiting):
        emitter.sweep(segment)
    emitter.ensure(graph.gradient_values, 0)
    for edge in graph.stage_edges("backward"):
        if edge.effect:
            emitter.ensure(edge.needs, 0)
            emitter.builder.emit(edge, 0)
    tangents = list(graph.tangents)
    results = (*_resolve(graph.gradients, emitter.builder), *(Ref(slot) for _, slot in emitter.drifts))
    handed = [value for value in emitter.builder.read_inputs(results) if value not in set(tangents)]
    backward = emitter.builder.finish(results, [*handed, *tangents])
    forward = emit_forward(analysis, handed)
    return Schedule(forward, backward, tuple(handed), tuple(drift for drift, _ in emitter.drifts))


def emit_forward(analysis: Analysis, handed: Sequence[int]) -> Program:
    graph = analysis.graph
    emitter = ForwardEmitter(analysis, handed)
    emitter.run(graph.stage_edges("forward"), analysis.block_of)
    for value in (*graph.output_values, *handed):
        emitter.read_value(value, len(analysis.blocks) - 1)
    outputs = (*_resolve(graph.outputs, emitter.builder), *(Ref(emitter.builder.environment[v]) for v in handed))
    return emitter.builder.finish(outputs, graph.primals)


def _resolve(results: Iterable[Any], builder: Builder) -> tuple[Any, ...]:
    return tuple(Ref(builder.environment[item.slot]) if isinstance(item, Ref) else item for item in results)
