"""What the engine may use inside a layer: the operations of its step, their inverses, and cheaper ways of the spine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..passes.analysis import Analysis, Pack, analyse
from ..passes.capture import Capture
from ..passes.cost import DEVICES
from ..passes.graph import Edge, Graph
from ..passes.inverse import inverse_edges, solve

DEVICE = DEVICES["cpu"]  # its rates decide only between ways that lead to the same values


@dataclass(frozen=True)
class Spine:
    """How the input's cotangent follows from the output's, and what of the forward pass that reads."""

    graph: Graph
    edges: tuple[Edge, ...]
    encoders: tuple[Edge, ...]
    residuals: tuple[int, ...]


class LayerEdges:
    """The edges of one layer's step. `state` are its parameters and buffers."""

    def __init__(self, capture: Capture, state: Sequence[int]) -> None:
        self.capture, self.graph, self.state = capture, capture.graph, state

    @cached_property
    def again(self) -> list[Edge]:
        """The operations of the joint graph that may be run more than once."""
        return [edge for edge in self.graph.edges if not edge.random and not edge.effect]

    @cached_property
    def solving(self) -> list[Edge]:
        """Forward operations and inverse rules alike."""
        return [*self.again, *inverse_edges(self.capture, DEVICE)]

    @cached_property
    def sweeping(self) -> list[Edge]:
        """The same, with signs as their bits give them: an exact zero counts as negative, as it does in the spine."""
        if not any(edge.label in ("sgn", "sign") for edge in self.again):
            return self.solving
        strict = [edge for block in self.analysis.strict_signs for edge in block]
        replaced = {edge.gives for edge in strict}
        return [*strict, *(edge for edge in self.solving if edge.kind != "forward" or edge.gives not in replaced)]

    @cached_property
    def analysis(self) -> Analysis:
        """Of the step without its input: what is at hand in a whole model is here the output of another layer."""
        graph = replace(self.graph, primals=tuple(self.state))
        return analyse(replace(self.capture, graph=graph), DEVICE)

    def spine(self, known: int, wanted: int) -> Spine | None:
        """The cotangent `wanted` from `known`, with light residuals: the heaviest that can be left out is, then the
        next. Reading a value is an edge from nothing.
        """
        graph, packs = self.analysis.graph, self._packs()
        edges = [*self._spine_edges(), *(pack.decode for pack in packs)]
        sources = [Edge((value,), (), (), (), "residual") for value in sorted(self._readable(edges, packs))]
        if solve([*sources, *edges], {*self.state, known}, [wanted]).missing:
            return None
        for edge in sorted(sources, key=lambda edge: -graph.storage_bytes(edge.gives)):
            fewer = [other for other in sources if other is not edge]
            if not solve([*fewer, *edges], {*self.state, known}, [wanted]).missing:
                sources = fewer
        residuals = tuple(value for edge in sources for value in edge.gives)
        return Spine(graph, tuple(edges), tuple(pack.encode for pack in packs), residuals)

    def _packs(self) -> list[Pack]:
        """What stands for values of the forward pass in bits."""
        return [*self.analysis.packs.values(), *(pack for block in self.analysis.signs for pack in block)]

    def _spine_edges(self) -> Iterator[Edge]:
        yield from self._of_state
        yield from (edge for edge in self.again if edge.stage == "backward")
        for block in self.analysis.shortcuts:
            yield from block

    def _readable(self, edges: Sequence[Edge], packs: Sequence[Pack]) -> set[int]:
        """Values of the forward pass that the spine may read."""
        forward = {value for edge in self.again if edge.stage != "backward" for value in edge.gives}
        x = {value for value in self.graph.primals if value not in set(self.state)}
        fixed = {value for edge in self._of_state for value in edge.gives}
        read = {value for edge in edges for value in edge.needs}
        return (read & (forward | x)) - fixed | {pack.kept for pack in packs}

    @cached_property
    def _of_state(self) -> list[Edge]:
        """What follows from parameters and buffers alone."""
        known, edges = set(self.state), []
        for edge in self.again:
            if known.issuperset(edge.needs):
                edges.append(edge)
                known.update(edge.gives)
        return edges
