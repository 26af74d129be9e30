"""What is kept as one bit per element must serve as well as the value itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonwalk_compile.passes.bits import pack_bits, unpack_two
from moonwalk_compile.passes.interpret import run_edge
from moonwalk_compile.passes.inverse import Packing, make_call, packing_of_reader, packing_of_value
from moonwalk_compile.testing import capture_joint, true_values

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "gt": lambda x: x * (x > 0),
    "_to_copy": lambda x: x * (x > 0).double(),
    "sgn": torch.abs,
    "bernoulli": lambda x: F.feature_alpha_dropout(x, 0.4, True),
    "native_dropout": lambda x: F.dropout(x, 0.4),
    "sort": lambda x: x.view(6, 4, 2).sort(-1).values * 2,
    "max": lambda x: x.view(6, 4, 2).max(-1).values,
    "topk": lambda x: x.view(6, 4, 2).topk(1, -1).values,
}
READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu_backward": lambda x: F.leaky_relu(x, 0.1),
    "threshold_backward": lambda x: F.threshold(x, 0.3, 5.0),
    "hardtanh_backward": lambda x: F.hardtanh(x, 0.2, 0.9),
    "hardsigmoid_backward": lambda x: F.hardsigmoid(4 * x),
}


def _kept_as_bits(packing: Packing, value: Tensor) -> Tensor:
    packed = pack_bits(value, *packing.between)
    assert packed.numel() == -(-value.numel() // 8)
    return unpack_two(packed, value.shape, packing.high, packing.low, value.dtype)


@pytest.mark.parametrize("label", VALUES)
def test_value_survives_packing(label: str) -> None:
    torch.manual_seed(0)
    argument = torch.randn(6, 8, dtype=torch.float64)
    capture = capture_joint(VALUES[label], [argument])
    truth, packed = true_values(capture, [argument]), set()
    for edge in capture.graph.edges:
        for position, value in enumerate(edge.gives):
            packing = packing_of_value(make_call(capture, edge), position)
            if packing is not None:
                assert packing.exact == (edge.label not in ("sgn", "sign"))
                read = edge.needs[0] if packing.of_argument else value
                torch.testing.assert_close(_kept_as_bits(packing, truth[read]), truth[value], rtol=0, atol=0)
                packed.add(edge.label)
    assert label in packed


@pytest.mark.parametrize("label", READERS)
def test_reader_is_served_by_bits(label: str) -> None:
    torch.manual_seed(0)
    argument = torch.randn(6, 8, dtype=torch.float64)
    capture = capture_joint(READERS[label], [argument])
    truth = true_values(capture, [argument])
    edge = next(edge for edge in capture.graph.edges if edge.label == label)
    needs = [truth[value] for value in edge.needs]
    packings = [packing_of_reader(make_call(capture, edge), position) for position in range(len(needs))]
    assert [packing is not None for packing in packings] == [False, True]
    decoded = _kept_as_bits(packings[1], needs[1])
    assert decoded.dtype == needs[1].dtype
    torch.testing.assert_close(run_edge(edge, [needs[0], decoded])[0], truth[edge.gives[0]], rtol=0, atol=0)


@pytest.mark.parametrize("function", [torch.tanh, F.gelu, lambda x: x.sort(-1).values * 2, lambda x: x * 2])
def test_values_with_more_than_two_states_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    capture = capture_joint(function, [torch.randn(6, 8)])
    for edge in capture.graph.edges:
        call = make_call(capture, edge)
        assert not any(packing_of_value(call, position) for position in range(len(edge.gives)))
        assert not any(packing_of_reader(call, position) for position in range(len(edge.needs)))
