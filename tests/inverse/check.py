"""The universal tester: does solving recover what the forward and backward passes computed?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_function

from moonwalk_compile.passes.capture import Capture, read_joint
from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.graph import Edge
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.passes.inverse import inverse_edges, solve

SIZES = {"b": (1, 4), "n": (3, 4), "m": (1, 2), "w": (5, 6), "k": (1, 5)}  # by letter, inclusive


class _Captured(Exception):
    """Stops AOTAutograd once the joint graph is there."""


@dataclass(frozen=True)
class Case:
    """`function(x, *parameters)` with one shape per argument, spelled by letters of `SIZES` or digits ("b4 nn").

    `invert`: x can be recovered from the result and the parameters. `vijp`: the cotangent of the result can be
    recovered from that of x, with x and the parameters at hand. What is not promised must be refused.
    """

    name: str
    function: Callable[..., Tensor]
    shapes: str
    invert: bool = True
    vijp: bool = True


def capture_joint(function: Callable[..., Any], arguments: Sequence[Tensor]) -> Capture:
    """The joint graph of `function`; the first argument is an input, the others are parameters."""
    found: list[Capture] = []

    def partition(joint: Any, joint_inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        tokens = len(joint_inputs[0]) - len(arguments)  # of effects; they come first
        roles = {tokens: "input", **dict.fromkeys(range(tokens + 1, tokens + len(arguments)), "parameter")}
        found.append(read_joint(joint, num_fwd_outputs, DEVICES["cpu"], roles))
        raise _Captured

    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in arguments]
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
    assert error < 1e-8, f"{label}: relative error {error:.1e}"


@cache
def _orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator)
    q = torch.linalg.qr(tall).Q
    return q if rows >= columns else q.T


def draw_arguments(shapes: str, sizes: dict[str, int], seed: int) -> list[Tensor]:
    """Double-precision arguments; all but the first are well-conditioned matrices, or vectors away from zero."""
    found = []
    for position, spelled in enumerate(shapes.split()):
        shape = [sizes[letter] if letter in sizes else int(letter) for letter in spelled]
        noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + position))
        if position == 0:
            found.append(noise)
        elif len(shape) < 2:
            found.append(noise.sign() * (0.5 + noise.abs()))
        else:
            flat = noise.flatten(1)
            found.append((_orthonormal(*flat.shape, seed) + 0.05 * flat).reshape(shape))
    return found


def check_inverse_rule(case: Case, sizes: dict[str, int], seed: int) -> set[str]:
    """Both questions to one case; returns the labels of the edges that answered."""
    torch.manual_seed(seed)
    arguments = draw_arguments(case.shapes, sizes, seed)
    capture = capture_joint(case.function, arguments)
    graph, edges, truth = capture.graph, all_edges(capture), true_values(capture, arguments)
    x, parameters = graph.primals[0], graph.primals[1:]
    used = check_reached(edges, truth, [*graph.output_values, *parameters], [x], case.invert)
    gradient = graph.gradients[0].slot
    return used | check_reached(edges, truth, [*graph.primals, gradient], graph.tangents, case.vijp)
