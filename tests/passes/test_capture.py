"""What capture says of single calls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from moonwalk_compile.passes.nodes import is_effect, is_random
from moonwalk_compile.testing import capture_joint

aten = torch.ops.aten


def call(target: object, *args: object) -> fx.Node:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") if argument is Tensor else argument for i, argument in enumerate(args)]
    return graph.call_function(target, tuple(nodes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "args", "random"),
    [
        (aten.bernoulli.p, (Tensor, 0.5), True),
        (aten.native_dropout.default, (Tensor, 0.5, True), True),
        (aten.mm.default, (Tensor, Tensor), False),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (Tensor, Tensor, Tensor), False),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (Tensor, Tensor, Tensor, 0.0, True), False),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (Tensor, Tensor, Tensor, 0.1), True),
        (aten._scaled_dot_product_efficient_attention.default, (Tensor, Tensor, Tensor, None, True, 0.2), True),
        (aten._scaled_dot_product_efficient_attention.default, (Tensor, Tensor, Tensor, None, True, 0.0), False),
    ],
)
def test_attention_is_random_only_with_dropout(target: object, args: tuple[object, ...], random: bool) -> None:
    assert is_random(call(target, *args)) is random


def test_mutations_and_assertions_are_effects() -> None:
    assert is_effect(call(aten.copy_.default, Tensor, Tensor))
    assert is_effect(call(aten._assert_async.default, Tensor))
    assert not is_effect(call(aten.add.Tensor, Tensor, Tensor))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_read_by_the_gradient_only_where_they_count(training: bool) -> None:
    def norm(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        running = mean.detach(), variance.detach()
        if training:
            return aten._native_batch_norm_legit_functional(x, None, None, *running, True, 0.1, 1e-5)[0]
        return aten._native_batch_norm_legit_no_training(x, None, None, *running, 0.1, 1e-5)[0]

    graph = capture_joint(norm, [torch.randn(4, 3), torch.zeros(3), torch.ones(3)]).graph
    (backward,) = (edge for edge in graph.edges if edge.label == "native_batch_norm_backward")
    assert (backward.operations[0].args[3:5] == (None, None)) is training
