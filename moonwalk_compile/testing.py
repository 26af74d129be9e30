"""The universal tester of inverse rules, public: does solving recover what the forward and backward passes computed?

    check_rule(torch.ops.mylib.scale, torch.randn(4, 8), torch.rand(8) + 0.5)

It captures forward and backward of a function in double precision, and asks both questions of a rule. What is solved
must equal the true values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .passes._torch_compat import aot_function
from .passes.capture import Capture, read_joint
from .passes.cost import DEVICES
from .passes.graph import Edge, Role
from .passes.interpret import run_edges
from .passes.inverse import inverse_edges, solve

__all__ = ["capture_joint", "check_rule"]

LARGEST_ERROR = 1e-8  # relative, in double precision


class _Captured(Exception):
    """Stops AOTAutograd once the joint graph is there."""


def check_rule(
    function: Callable[..., Any], *arguments: Tensor, invert: bool = True, vijp: bool = True, seed: int = 0
) -> set[str]:
    """Check the rules of all operations that `function(x, *parameters)` runs, forward and backward.

    Args:
        arguments: x, then the parameters; they are taken in double precision.
        invert: x must follow from the result and the parameters; with False it must be refused.
        vijp: the cotangent of the result must follow from that of x, x, the parameters, what was drawn at random, and
            the fragments that rules keep of cotangents; or be refused.

    Returns the names of the operations and inverses that were used. Raises AssertionError.
    """
    doubles = [a.double() if a.is_floating_point() else a for a in arguments]
    capture = capture_joint(function, doubles)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        truth = true_values(capture, doubles)
    graph, edges = capture.graph, all_edges(capture)
    x, parameters = graph.primals[0], graph.primals[1:]
    fragments = take_fragments(edges, truth)
    used = check_reached(edges, truth, [*graph.output_values, *parameters], [x], invert)
    drawn = [value for edge in graph.edges if edge.random for value in edge.gives]
    known = [*graph.primals, graph.gradients[0].slot, *fragments, *drawn]
    return used | check_reached(edges, {**truth, **fragments}, known, graph.tangents, vijp)


def capture_joint(
    function: Callable[..., Any],
    arguments: Sequence[Tensor],
    trained: Sequence[bool] | None = None,
    rewrite: Callable[[fx.Graph, int], fx.Graph] = lambda graph, _: graph,
) -> Capture:
    """The joint graph of `function`; the first argument is an input, the others are parameters.

    `trained` says which arguments get a gradient; by default, all that are floating-point. `rewrite` is given the graph
    and the number of its forward outputs.
    """
    found: list[Capture] = []

    def partition(joint: Any, joint_inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        tokens = len(joint_inputs[0]) - len(arguments)  # of effects; they come first
        roles: dict[int, Role] = {
            tokens: "input",
            **dict.fromkeys(range(tokens + 1, tokens + len(arguments)), "parameter"),
        }
        found.append(read_joint(joint, num_fwd_outputs, DEVICES["cpu"], roles, lambda g: rewrite(g, num_fwd_outputs)))
        raise _Captured

    wanted = trained or [a.is_floating_point() for a in arguments]
    leaves = [a.detach().clone().requires_grad_(want) for a, want in zip(arguments, wanted, strict=True)]
    try:
        aot_function(function, lambda gm, _: gm, lambda gm, _: gm, partition_fn=partition)(*leaves)
    except _Captured:
        return found[0]
    raise AssertionError("the function has no gradient")


def true_values(capture: Capture, arguments: Sequence[Tensor]) -> dict[int, Any]:
    """Every value of the step, computed by the joint graph itself with random tangents."""
    graph = capture.graph
    tokens = [torch.empty(0)] * (len(graph.primals) - len(arguments))
    environment = dict(zip(graph.primals, [*tokens, *(a.detach() for a in arguments)], strict=True))
    for value in graph.tangents:
        fake = capture.fake(value)
        empty = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
        environment[value] = empty.copy_(torch.randn(fake.shape, dtype=fake.dtype))
    return run_edges(graph.edges, environment)


def all_edges(capture: Capture) -> list[Edge]:
    forward = [edge for edge in capture.graph.edges if not edge.effect and not edge.random]
    return [*forward, *inverse_edges(capture, DEVICES["cpu"])]


def take_fragments(edges: Sequence[Edge], truth: dict[int, Any]) -> dict[int, Any]:
    """What the spine would keep for the rules that need it."""
    found = run_edges([edge for edge in edges if edge.kind == "fragment"], truth)
    return {value: tensor for value, tensor in found.items() if value not in truth}


def check_reached(
    edges: Sequence[Edge], truth: dict[int, Any], known: Sequence[int], wanted: Sequence[int], expected: bool
) -> set[str]:
    """Solve, run, compare; returns the labels of the edges that were used."""
    solution = solve(edges, known, wanted)
    assert (not solution.missing) == expected, f"missing {solution.missing}" if expected else "must be refused"
    if not expected:
        return set()
    program = solution.program(wanted)
    reached = run_edges(program, {value: truth[value] for value in known})
    for edge in program:
        for value in edge.gives if edge.kind == "inverse" else set(edge.gives) & set(wanted):
            assert_same(reached[value], truth[value], edge.label)
    return {edge.label for edge in program}


def assert_same(found: Tensor, true: Tensor, label: str) -> None:
    assert (found.shape, found.dtype) == (true.shape, true.dtype), label
    error = (found - true).norm() / true.norm().clamp_min(1e-30) if true.is_floating_point() else found.ne(true).sum()
    assert error < LARGEST_ERROR, f"{label}: relative error {error:.1e}"
