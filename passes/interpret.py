"""Running edges on real tensors, one operation at a time: for certificates and for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .graph import Edge, map_refs


def filled(tree: Any, items: Sequence[Any]) -> Any:
    """`tree` with an item in the place of each reference."""
    return map_refs(tree, lambda ref: items[ref.slot])


def run_steps(steps: Iterable[tuple[Any, Any, Any]], inputs: Iterable[Any]) -> list[Any]:
    """The inputs, and behind them the result of each step: an operator, arguments, keyword arguments."""
    slots = list(inputs)
    for operator, args, kwargs in steps:
        given, named = filled((tuple(args), dict(kwargs)), slots)
        slots.append(operator(*given, **named))
    return slots


def run_edge(edge: Edge, needs: Iterable[Any]) -> tuple[Any, ...]:
    """The values `edge.gives` from the values `edge.needs`."""
    slots = run_steps(((o.target, o.args, o.kwargs) for o in edge.operations), needs)
    return tuple(slots[result] for result in edge.results)


@torch.no_grad()
def run_edges(edges: Iterable[Edge], environment: Mapping[int, Any]) -> dict[int, Any]:
    """The environment (by value index) after running `edges` in order; every value that is reached stays in it."""
    reached = dict(environment)
    for edge in edges:
        reached.update(zip(edge.gives, run_edge(edge, [reached[value] for value in edge.needs]), strict=True))
    return reached
