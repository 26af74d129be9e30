"""Residual blocks y = x + F(x) whose branch F contracts: x is the fixed point of x <- y - F(x), as in an i-ResNet.

The backward pass of such a block is another one, h_in = h_out + J^T h_out, and the iteration is Neumann's series.
Whether a branch contracts no shape says. If it does not, the rounds end far from the solution, or at another one, and
the certificate shows it. One operator holds the loop, as its rounds would be hundreds of operations in the program.

Nearly every net is made of residual blocks. Branches that normalize, attend or draw random numbers are left alone: they
hardly ever contract, and each would be one more thing to plan and to measure.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from ..graph import Edge, Graph, Ref
from ..interpret import filled, run_steps
from . import convolution, erasing, pointwise, shape
from .reader import Reader
from .rule import Region
from .sums import added_up, is_sum

Step = tuple[Callable[..., Any], Any, Any]  # an operator, arguments and keyword arguments, with slots

ACTIVATIONS = "abs clamp cos gelu hardsigmoid hardswish hardtanh maximum minimum mish relu silu sin threshold"
OPERATIONS = frozenset(
    {*pointwise.RULES, *erasing.RULES, *shape.RULES, *convolution.RULES, *ACTIVATIONS.split()}
    | {"mm", "addmm", "slice", "select"}
) - {"exp", "log", "sqrt", "rsqrt", "reciprocal", "cumsum"}  # what normalizations are spelled with
MOST_STEPS = 24
MOST_LOOKED_AT = 100  # edges behind a sum, among them those that make its weights
CONTRACTION = "inverse of a contraction"
ROUNDS = {torch.float32: 20, torch.float64: 40}  # twice as many digits take twice as many rounds


def find_contractions(reader: Reader) -> Iterator[Region]:
    """The argument of every residual block, and the cotangent of what it gives."""
    for edge in reader.edges("add", "sub"):
        first, second = reader.value(edge, 0), reader.value(edge, 1)
        if is_sum(reader, edge):
            summands = [value for value in added_up(reader, edge) if not _is_constant(reader.graph, value)]
            # Whatever is computed from another summand comes after it.
            yield from _solved(reader, edge, min(summands, default=None), summands)
        elif second is not None:  # x - F(x), x + dt F(x)
            yield from _solved(reader, edge, first, [first, second])


def _solved(reader: Reader, total: Edge, x: int | None, summands: Sequence[int | None]) -> Iterator[Region]:
    graph, (y,) = reader.graph, total.gives
    rounds = ROUNDS.get(reader.capture.fake(y).dtype)
    if x is None or rounds is None or summands.count(x) != 1 or graph.values[x].stage != graph.values[y].stage:
        return
    path = _path(graph, x, y)
    own = {x}.union(*(edge.gives for edge in path))
    reads = tuple(dict.fromkeys(value for edge in path for value in edge.needs if value not in own))
    if any(value in own for value in summands if value != x) and _is_branch(path):
        text = _written(path, (x, *reads))
        if text is not None:
            yield Region((x,), (y, *reads), partial(_undo, text, rounds), CONTRACTION, fragile=True)


def _is_constant(graph: Graph, value: int) -> bool:
    """Parameters, buffers, their views, and what is made of nothing."""
    return value in graph.static and graph.values[graph.values[value].storage].role != "input"


def _path(graph: Graph, x: int, y: int) -> list[Edge]:
    """The edges that lead from x to y, in order; none if too many lie behind y."""
    behind: dict[int, Edge] = {}
    waiting = [y]
    while waiting:
        edge = graph.definition.get(waiting.pop())
        if edge is None or edge.gives[0] in behind:
            continue
        behind[edge.gives[0]] = edge
        # A value with a smaller number than x was there before it, and a forward value before any cotangent.
        waiting += [v for v in edge.needs if v > x and graph.values[v].stage == graph.values[x].stage]
        if len(behind) > MOST_LOOKED_AT:
            return []
    reached, path = {x}, []
    for first in sorted(behind):
        if not reached.isdisjoint(behind[first].needs):
            path.append(behind[first])
            reached.update(behind[first].gives)
    return path


def _is_branch(path: Sequence[Edge]) -> bool:
    """Weights multiply something (x - tanh(x) is an activation), and nothing is normalized, drawn or written."""
    plain = all(edge.label in OPERATIONS and not edge.random and not edge.effect for edge in path)
    return plain and len(path) <= MOST_STEPS and any(edge.expensive for edge in path)


# -- a path as text, for the operator -------------------------------------------------------------------------------


def _written(path: Sequence[Edge], inputs: Sequence[int]) -> str | None:
    """The operations of a path, a line each; slots count the inputs, then the results."""
    slots, lines = {value: slot for slot, value in enumerate(inputs)}, list[str]()
    for edge in path:
        own = [slots[value] for value in edge.needs]
        for operation in edge.operations:
            placed = filled((_arguments(edge, operation.args), operation.kwargs), [Ref(slot) for slot in own])
            own.append(len(inputs) + len(lines))
            try:
                lines.append(json.dumps([_name(operation.target), *placed], default=asdict))
            except TypeError:  # a type or a layout among the arguments
                return None
        slots.update(zip(edge.gives, (own[result] for result in edge.results), strict=True))
    return "\n".join(lines)


def _arguments(edge: Edge, args: Sequence[Any]) -> Sequence[Any]:
    """Of a convolution, the gradient of its image is all that is wanted."""
    if edge.label == "convolution_backward" and len(args) > 10:
        return (*args[:10], [True, False, False], *args[11:])
    return args


def _name(target: Any) -> str:
    """Within the loop the layout of a tensor may be another one than where it was captured."""
    name = "getitem" if target is operator.getitem else str(target)
    return re.sub(r"^aten\.(_unsafe_)?view\.", "aten.reshape.", name)


@lru_cache(maxsize=256)
def _read(text: str) -> tuple[Step, ...]:
    lines = [json.loads(line, object_hook=_slot) for line in text.splitlines()]
    return tuple((_operator(name), args, kwargs) for name, args, kwargs in lines)


def _slot(found: dict[str, Any]) -> Any:
    return Ref(**found) if found.keys() == {"slot"} else found


def _operator(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = operator.getitem if name == "getitem" else operator.attrgetter(name)(torch.ops)
    return found


def _run(text: str, inputs: Sequence[Tensor]) -> Tensor:
    result: Tensor = run_steps(_read(text), inputs)[-1]
    return result


# -- the operator ---------------------------------------------------------------------------------------------------

_library = Library("moonwalk_compile", "FRAGMENT")
_library.define("solve_residual(Tensor result, Tensor[] reads, str path, int rounds) -> Tensor")


def _solve(result: Tensor, reads: Sequence[Tensor], path: str, rounds: int) -> Tensor:
    """The x that the operations of `path` turn into the `result`."""
    x = result.clone()
    for _ in range(rounds):
        x += result - _run(path, [x, *reads])
    return x


_library.impl("solve_residual", _solve, "CompositeExplicitAutograd")


@register_fake("moonwalk_compile::solve_residual")
def _fake(result: Tensor, reads: Sequence[Tensor], path: str, rounds: int) -> Tensor:
    return torch.empty_like(result)


@register_flop_formula(torch.ops.moonwalk_compile.solve_residual, get_raw=True)
def _flops(result: Tensor, reads: Sequence[Tensor], path: str, rounds: int, **_: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        _run(path, [result, *reads])
    return rounds * counter.get_total_flops()


def _undo(path: str, rounds: int, y: Tensor, *reads: Tensor) -> Tensor:
    found: Tensor = torch.ops.moonwalk_compile.solve_residual(y, list(reads), path, rounds)
    return found
