"""What fused programs are expected to take: counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moonwalk_compile.passes.cost import Device
from moonwalk_compile.passes.fusion import edges_seconds, unmaterialised
from moonwalk_compile.passes.graph import Ref
from moonwalk_compile.passes.program import Builder
from moonwalk_compile.testing import capture_joint

FUSING = Device("hand", flops=1e30, bandwidth=4.0, overhead=0.0, transcendental=1e30, fused=True)
ONE = 1000  # elements of 4 bytes: a pass over them takes as many seconds


def seconds(function: Callable[..., Tensor], *arguments: Tensor) -> float:
    """Of the forward pass, of which the output alone is wanted."""
    graph = capture_joint(function, arguments).graph
    edges = [edge for edge in graph.edges if edge.stage == "forward"]
    return edges_seconds(edges, graph.output_values, graph, FUSING) / ONE


def test_a_chain_reads_once_and_writes_once() -> None:
    assert seconds(lambda x: x.sin().exp().tanh().neg(), torch.randn(ONE)) == 2


def test_what_is_read_twice_in_a_loop_counts_once() -> None:
    assert seconds(lambda x: x.sin() * x + x.cos(), torch.randn(ONE)) == 2


def test_every_input_is_read() -> None:
    assert seconds(lambda x, y: x.sin() + y, torch.randn(ONE), torch.randn(ONE)) == 3


def test_products_read_what_loops_write() -> None:
    def function(x: Tensor) -> Tensor:
        return ((x.sin().exp() @ x.exp().neg()).tanh() * 2).cos()

    side = 40
    size = side * side / ONE
    before = 2 * size + size  # two results, one input
    product = 3 * size
    assert seconds(function, torch.randn(side, side)) == pytest.approx(before + product + 2 * size)


def test_statistics_of_images_take_a_pass() -> None:
    def normalized(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True).relu()

    def rows(x: Tensor) -> Tensor:
        return F.layer_norm(x, [10]).relu()

    assert seconds(normalized, torch.randn(10, 4, 25)) == pytest.approx(3, rel=0.05)
    assert seconds(rows, torch.randn(100, 10)) == pytest.approx(2, rel=0.2)


def test_what_only_its_own_loop_reads_takes_no_memory() -> None:
    """A chain in front of a product, one behind it, and a value that both the product and a later loop read."""

    def function(x: Tensor) -> Tensor:
        shared = x.sin().exp()
        return (shared @ shared).tanh().cos() + shared

    graph = capture_joint(function, (torch.randn(4, 4),)).graph
    builder = Builder(graph)
    for value in graph.primals:
        builder.input(value)
    for edge in graph.edges:
        if edge.stage == "forward":
            builder.emit(edge)
    program = builder.finish([Ref(builder.environment[value]) for value in graph.output_values])
    names = [str(i.operation.target).split(".")[1] for i in program.instructions]
    sizes = dict(zip(names, [sum(i.operation.new) for i in unmaterialised(program).instructions], strict=True))
    assert sizes == {"sin": 0, "exp": 64, "mm": 64, "tanh": 0, "cos": 0, "add": 64}
