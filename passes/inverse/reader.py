"""How rules over several nodes look at the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..capture import Capture
from ..graph import Edge, Graph, Ref
from .rule import result_places


class Reader:
    """Looks at the arguments of edges by value index."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.graph: Graph = capture.graph
        self.uses = self.graph.uses
        self.results = {*self.graph.output_values, *self.graph.gradient_values}

    def args(self, edge: Edge) -> tuple[Any, ...]:
        return edge.operations[0].args

    def value(self, edge: Edge, argument: int) -> int | None:
        """The value that stands at an argument's place."""
        args = self.args(edge)
        place = args[argument] if argument < len(args) else None
        return edge.needs[place.slot] if isinstance(place, Ref) else None

    def made_by(self, value: int | None, *labels: str) -> Edge | None:
        """The edge that gives `value`, if it is one of these operations."""
        edge = self.graph.definition.get(value) if value is not None else None
        return edge if edge is not None and edge.label in labels else None

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def edges(self, *labels: str) -> list[Edge]:
        return [edge for edge in self.graph.edges if edge.label in labels]

    def convolutions(self) -> Iterator[tuple[Edge, int, int]]:
        """Convolutions and gradients of their images, each with what it is linear in and its weight."""
        for edge in self.edges("convolution", "convolution_backward"):
            argument, weight = self.value(edge, 0), self.value(edge, 1 if edge.label == "convolution" else 2)
            if argument is not None and weight is not None and 0 in result_places(edge):
                yield edge, argument, weight
