"""Input gradients from less than the backward operation reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.passes.inverse import inverse_edges
from moonwalk_compile.testing import assert_same, capture_joint, true_values

CASES = {
    "strided and padded": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), (2, 3, 7, 8), (4, 3, 3, 3)),
    "grouped and dilated": (
        lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2, dilation=2),
        (2, 4, 9, 8),
        (6, 2, 3, 3),
    ),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=3, padding=1, output_padding=1),
        (2, 4, 5, 6),
        (4, 3, 4, 4),
    ),
    "one-dimensional": (lambda x, w: F.conv1d(x, w, stride=3), (2, 4, 11), (5, 4, 2)),
    "gaps between patches": (lambda x, w: F.conv2d(x, w, stride=3), (2, 3, 9, 8), (4, 3, 1, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_input_gradient_of_a_convolution_does_not_need_the_input(case):
    function, source, weight = CASES[case]
    torch.manual_seed(0)
    arguments = [torch.randn(source, dtype=torch.float64), torch.randn(weight, dtype=torch.float64)]
    capture = capture_joint(function, arguments)
    truth = true_values(capture, arguments)
    found = [edge for edge in inverse_edges(capture, DEVICES["cpu"]) if edge.label == "convolution's input gradient"]
    assert len(found) == 1
    assert found[0].kind == "forward"
    assert capture.graph.primals[0] not in found[0].needs
    reached = run_edges(found, {value: truth[value] for value in found[0].needs})
    assert_same(reached[found[0].gives[0]], truth[found[0].gives[0]], found[0].label)
