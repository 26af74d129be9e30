"""What operations are counted as."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import flop_registry

from moonwalk_compile.passes.cost import DEVICES, FRESH, count_flops, operation_seconds
from moonwalk_compile.passes.graph import Operation, Ref
from moonwalk_compile.passes.trials import frozen_call

aten = torch.ops.aten


def gradients_node(groups: int, mask: list[bool], transposed: bool = False) -> fx.Node:
    """The call of the gradients of a convolution of 8 to 16 channels (transposed: the other way round)."""
    image = torch.empty(2, 16 if transposed else 8, 9, 9, device="meta")
    weight = torch.empty(16, 8 // groups, 3, 3, device="meta")
    geometry = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], groups)

    def run(image: Tensor, weight: Tensor) -> list[Tensor | None]:
        result = aten.convolution(image, weight, None, *geometry)
        return list(aten.convolution_backward(result, image, weight, None, *geometry, mask))

    graph = make_fx(run, tracing_mode="fake")(image, weight).graph
    (node,) = graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    return node


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", [[True, True, False], [True, False, False], [False, True, False]])
def test_the_gradients_of_a_convolution_are_counted_as_torch_counts_them(mask: list[bool], transposed: bool) -> None:
    node = gradients_node(1, mask, transposed)
    args = [item.meta["val"] if isinstance(item, fx.Node) else item for item in node.args]
    formula = flop_registry[aten.convolution_backward]
    assert count_flops(node) == formula(*args, out_val=node.meta["val"])


def test_groups_divide_the_work_of_both_gradients() -> None:
    for mask in ([True, False, False], [False, True, False]):
        assert count_flops(gradients_node(4, mask)) == count_flops(gradients_node(1, mask)) / 4


def test_bits_have_rates_of_their_own() -> None:
    device = replace(DEVICES["cpu"], overhead=0.0, bandwidth=1e30, packed=1e3, unpacked=2e3, bits=0.0)
    ours = torch.ops.moonwalk_compile
    pack = Operation(ours.pack_bits.default, (Ref(0),), new=(1000,), moved=9000)
    unpack = Operation(ours.unpack_two.default, (Ref(0), [8000], 1.0, 0.0, torch.bool), new=(8000,), moved=9000)
    assert [operation_seconds(operation, device) for operation in (pack, unpack)] == [8.0, 4.0]
    slow = replace(device, bits=0.5)
    assert [operation_seconds(operation, slow) for operation in (pack, unpack)] == [8.5, 4.5]


def test_large_results_are_new_memory_each_time() -> None:
    device = replace(DEVICES["cpu"], overhead=0.0, bandwidth=1e30, page=1e-9)
    small, large = (Operation(aten.add.Tensor, (Ref(0), Ref(1)), new=(size,)) for size in (FRESH, 2 * FRESH))
    assert operation_seconds(small, device) == 0.0
    assert operation_seconds(large, device) == pytest.approx(2 * FRESH * 1e-9)


def product(dtype: torch.dtype, target: object = aten.mm.default, flops: float = 1e12) -> Operation:
    operands = (torch.empty(8, 8, dtype=dtype, device="meta"),) * 2
    return Operation(target, (), new=(4,), flops=flops, moved=4, call=(target, *frozen_call(operands, {})))


@pytest.mark.parametrize("of", [torch.backends.cuda.matmul, torch.backends.cudnn.conv])
def test_a_gpu_multiplies_wider_numbers_more_slowly(of: Any) -> None:
    """By the switches for TF32, which are off for products and on for convolutions where nobody touches them."""
    card, cpu = DEVICES["h200"], DEVICES["cpu"]
    target = aten.mm.default if of is torch.backends.cuda.matmul else aten.convolution.default
    before = of.fp32_precision
    try:
        seconds = {}
        for switch in ("ieee", "tf32"):
            of.fp32_precision = switch
            types = (torch.bfloat16, torch.float32, torch.float64)
            seconds[switch] = [operation_seconds(product(dtype, target), card) for dtype in types]
    finally:
        of.fp32_precision = before
    (half, single, double), (same, in_tf32, _) = seconds["ieee"], seconds["tf32"]
    assert half == same < in_tf32 < single / 2 and single == double
    assert operation_seconds(product(torch.float64), cpu) == operation_seconds(product(torch.float32), cpu)


def test_a_gpu_eliminates_row_after_row() -> None:
    matrix = torch.empty(768, 768, dtype=torch.float64, device="meta")
    target = torch.ops.moonwalk_compile.inverse.default
    solved = Operation(target, (), new=(768**2 * 8,), flops=16 * 768**3, call=(target, *frozen_call((matrix,), {})))
    assert 1.5e-3 < operation_seconds(solved, DEVICES["h200"]) < 4e-3
