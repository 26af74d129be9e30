"""Running edges on real tensors, one operation at a time: for certificates and for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .graph import Edge, map_refs


def run_edge(edge: Edge, needs: Iterable[Any]) -> tuple[Any, ...]:
    """The values `edge.gives` from the values `edge.needs`."""
    slots = list(needs)
    for operation in edge.operations:
        args = map_refs(tuple(operation.args), lambda ref: slots[ref.slot])
        kwargs = {name: map_refs(item, lambda ref: slots[ref.slot]) for name, item in operation.kwargs.items()}
        slots.append(operation.target(*args, **kwargs))
    return tuple(slots[result] for result in edge.results)


@torch.no_grad()
def run_edges(edges: Iterable[Edge], environment: Mapping[int, Any]) -> dict[int, Any]:
    """The environment (by value index) after running `edges` in order; every value that is reached stays in it."""
    reached = dict(environment)
    for edge in edges:
        reached.update(zip(edge.gives, run_edge(edge, [reached[value] for value in edge.needs]), strict=True))
    return reached
