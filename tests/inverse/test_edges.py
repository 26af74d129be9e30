"""The inverse edges themselves: layouts, stages, labels, cost, and how orthogonal weights are solved with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations

from moonwalk_compile.passes.bits import strict_sign
from moonwalk_compile.passes.cost import DEVICES, qualified_name
from moonwalk_compile.passes.graph import Edge
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.passes.inverse import inverse_edges, solve
from moonwalk_compile.passes.inverse.linear import inverse
from moonwalk_compile.passes.inverse.orthogonal import orthogonal_values
from moonwalk_compile.passes.layout import lay_out
from moonwalk_compile.testing import capture_joint, true_values

CPU = DEVICES["cpu"]


@pytest.mark.parametrize("strides", [(12, 4, 1), (1, 2, 6), (4, 8, 1)])
def test_layout(strides: tuple[int, ...]) -> None:
    source = torch.randn(2, 3, 4)
    found = lay_out(source, strides)
    assert torch.equal(found, source) and found.stride() == strides


def test_layout_ignores_dimensions_of_one() -> None:
    source = torch.randn(4, 1, 5)
    assert lay_out(source, (5, 77, 1)) is source


def test_solved_values_are_laid_out_like_the_originals() -> None:
    arguments = [torch.randn(2, 3, 4, 6), torch.randn(12, 3, 2, 2)]
    capture = capture_joint(lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w, stride=2), arguments)
    truth = true_values(capture, arguments)
    for edge in inverse_edges(capture, CPU):
        reached = run_edges([edge], truth)
        for value in edge.gives:
            assert reached[value].stride() == truth[value].stride() == capture.fake(value).stride()


def test_a_piece_of_a_storage_is_solved_densely() -> None:
    arguments = [torch.randn(4, 8)]
    capture = capture_joint(lambda x: torch.cat([piece + 1 for piece in x.chunk(2, 1)], 1), arguments)
    piece = next(edge for edge in capture.graph.edges if edge.label == "split").gives[0]
    edge = next(edge for edge in inverse_edges(capture, CPU) if edge.gives == (piece,))
    assert capture.fake(piece).stride() == (8, 1)
    assert run_edges([edge], true_values(capture, arguments))[piece].stride() == (4, 1)


def test_stages_and_labels() -> None:
    capture = capture_joint(lambda x: F.leaky_relu(x, 0.2), [torch.randn(4, 8)])
    found = {edge.label: (edge.kind, edge.stage) for edge in inverse_edges(capture, CPU)}
    assert found["inverse of leaky_relu"] == ("inverse", "forward")
    assert found["inverse of leaky_relu_backward"] == ("inverse", "backward")


def test_parameters_are_not_solved_for() -> None:
    capture = capture_joint(lambda x, w: x @ w, [torch.randn(4, 4), torch.randn(4, 4)])
    assert all(edge.gives != (capture.graph.primals[1],) for edge in inverse_edges(capture, CPU))


def _maxmin(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)


def test_maxmin_from_its_mask_equals_the_backward_pass() -> None:
    arguments = [torch.randn(4, 8)]
    capture = capture_joint(_maxmin, arguments)
    truth = true_values(capture, arguments)
    shortcut = next(edge for edge in inverse_edges(capture, CPU) if edge.label == "maxmin from its mask")
    reached = run_edges([shortcut], truth)
    assert all(torch.equal(reached[value], truth[value]) for value in shortcut.gives)


def test_the_factor_of_a_sign_is_solved_in_one_pass() -> None:
    arguments = [torch.tensor([-2.0, 3.0, 0.0, -0.0])]
    capture = capture_joint(torch.abs, arguments)
    edge = next(e for e in inverse_edges(capture, CPU) if e.label == "inverse of times sign")
    assert len(edge.operations) == 1
    cotangent, (needed, argument) = torch.tensor([1.0, 2.0, 3.0, 4.0]), edge.needs
    reached = run_edges([edge], {needed: cotangent, argument: arguments[0]})[edge.gives[0]]
    assert torch.equal(reached, cotangent * strict_sign(arguments[0]))


FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs by its sign": torch.abs,
    "maxmin by its mask": _maxmin,
    "sort by its indices": lambda x: x.sort(dim=0, descending=True, stable=True).values * 2,
}


@pytest.mark.parametrize("label", FOLDS)
def test_a_fold_is_undone_by_what_says_which_side_was_which(label: str) -> None:
    arguments = [torch.randn(4, 8, dtype=torch.float64)]
    arguments[0][0, :5] = 0.0
    arguments[0][:, 1] = arguments[0][:, 5]
    capture = capture_joint(FOLDS[label], arguments)
    graph, edges = capture.graph, inverse_edges(capture, CPU)
    truth = true_values(capture, arguments)
    unfold = next(edge for edge in edges if edge.label == f"inverse of {label}")
    fold = next(edge for edge in edges if edge.label == label)
    for edge in (fold, unfold):
        reached = run_edges([edge], {value: truth[value] for value in edge.needs})
        assert all(torch.equal(reached[value], truth[value]) for value in edge.gives)
    sides = {*unfold.needs}.difference(fold.gives)
    usable = [*graph.edges, *edges]
    assert not solve(usable, {*graph.output_values, *sides}, graph.primals).missing
    assert solve(usable, graph.output_values, graph.primals).missing


def test_identical_layers_are_traced_once() -> None:
    def deep(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = F.layer_norm(_maxmin(F.leaky_relu(x @ weight, 0.5)), [8])
        return x

    capture = capture_joint(deep, [torch.randn(4, 8), *(torch.randn(8, 8) for _ in range(64))])
    start = time.perf_counter()
    edges = inverse_edges(capture, CPU)
    assert time.perf_counter() - start < 2.0
    assert len(edges) > 64 * 10
    assert len({id(edge.operations) for edge in edges}) < 100


MAPS: list[dict[str, Any]] = [
    {"orthogonal_map": "matrix_exp"},
    {"orthogonal_map": "cayley"},
    {"orthogonal_map": "cayley", "use_trivialization": False},
]


@pytest.mark.parametrize("shape", [(8, 8), (4, 8), (8, 4)])
@pytest.mark.parametrize("settings", MAPS, ids=str)
def test_orthogonal_weights_are_transposed(settings: dict[str, Any], shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    layer = parametrizations.orthogonal(linear, **settings)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(state, values, strict=True)), (x,))

    arguments = [torch.randn(16, shape[1], dtype=torch.float64), *state.values()]
    capture = capture_joint(function, arguments)
    truth = true_values(capture, arguments)
    buffer = state.get("parametrizations.weight.0.base")
    primals = capture.graph.primals[-len(arguments) :]  # effect tokens come before them
    base = [v for v, a in zip(primals, arguments, strict=True) if a is buffer]
    for value in orthogonal_values(capture, base.__contains__):
        assert_orthonormal(truth[value])
    wanted = capture.graph.tangents[0] if shape[0] <= shape[1] else primals[0]
    found = [edge for edge in inverse_edges(capture, CPU, base.__contains__) if edge.gives == (wanted,)]
    assert found and not any(_inverts(edge) for edge in found)
    torch.testing.assert_close(run_edges(found[:1], truth)[wanted], truth[wanted])
    if base:
        unproved = [edge for edge in inverse_edges(capture, CPU) if edge.gives == (wanted,)]
        assert any(_inverts(edge) for edge in unproved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["orthogonal", "transposed", "nearly orthogonal", "any", "batch"])
def test_inverses_are_those_of_double_precision(name: str, dtype: torch.dtype) -> None:
    square = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = torch.linalg.qr(square).Q
    skew = (square - square.mT) * 1e-6
    matrix = {
        "orthogonal": rotation,
        "transposed": rotation.to(dtype).mT,
        "nearly orthogonal": rotation + rotation @ skew + 1e-6 * square,
        "any": square,
        "batch": torch.stack([rotation, rotation.mT]),
    }[name].to(dtype)
    found, truth = inverse(matrix), torch.linalg.inv(matrix.double())
    roundings = 1 if dtype == torch.float32 else 8  # double precision has none better to be computed in
    limit = roundings * torch.linalg.cond(matrix.double()).max() * torch.finfo(dtype).eps
    assert torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth) < limit
    assert found.is_contiguous() and found.dtype == dtype


def test_a_singular_matrix_has_no_finite_inverse() -> None:
    assert not inverse(torch.ones(4, 4)).isfinite().all()


def _inverts(edge: Edge) -> bool:
    return any(qualified_name(operation.target) == "moonwalk_compile::inverse" for operation in edge.operations)


def assert_orthonormal(matrix: Tensor) -> None:
    gram = matrix.mT @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.mT
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize(
    "function",
    [lambda x, w: x @ w, lambda x, w: x @ (w - w), lambda x, w: x @ torch.linalg.matrix_exp(w + w.mT)],
    ids=["a parameter", "not skew", "symmetric"],
)
def test_other_weights_are_not_orthogonal(function: Any) -> None:
    capture = capture_joint(function, [torch.randn(4, 4), torch.randn(4, 4)])
    assert not orthogonal_values(capture)
