"""Convolutional nets end to end, and every way to a convolution's cotangent, those included that are never cheapest."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.measure import gradient_error, gradients
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.testing import all_edges, capture_joint, take_fragments, true_values

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Abs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def orthogonal(*arguments: int, **settings: int) -> nn.Conv2d:
    layer = nn.Conv2d(*arguments, **settings)
    for group in layer.weight.data.chunk(layer.groups):
        group.copy_(nn.init.orthogonal_(torch.empty(len(group), group[0].numel())).view_as(group))
    return layer


def encoder() -> nn.Module:
    """Patches, grouped 1x1 convolutions and one whose patches overlap, so that only some taps have a single owner."""
    layers = [orthogonal(3, 12, 2, stride=2)]
    layers += [orthogonal(12, 12, 1, groups=2) for _ in range(24)]
    layers += [orthogonal(12, 12, 4, stride=3), orthogonal(12, 12, 1), orthogonal(12, 12, 1)]
    return nn.Sequential(*(part for layer in layers for part in (layer, Abs())))


def test_moonwalk_through_strided_and_grouped_convolutions() -> None:
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(8, 3, 38, 38)
    ours = moonwalk_compile(
        copy.deepcopy(model), strategies=("moonwalk", "checkpoint"), lowering="eager", max_slowdown=4
    )
    for _ in range(2):
        for net in (model, ours):
            net.zero_grad()
            (net(x) - 1).square().sum().backward()
        assert gradient_error(gradients(ours), gradients(model)) < 1e-4
    assert ours.plan is not None
    names = [segment.name for segment in ours.plan.segments if segment.strategy == "moonwalk"]
    assert any(name.endswith(("50", "52", "54")) for name in names), names  # 50 is the one with stride 3


WAYS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "4x4, stride 2, wider": (lambda x, w: F.conv2d(x, w, None, 2, 1), (2, 4, 12, 12), (8, 4, 4, 4)),
    "3x3, stride 2": (lambda x, w: F.conv2d(x, w, None, 2, 1), (2, 4, 12, 12), (4, 4, 3, 3)),
    "3x3, narrowing": (lambda x, w: F.conv2d(x, w, None, 1, 1), (2, 8, 9, 9), (4, 8, 3, 3)),
    "grouped": (lambda x, w: F.conv2d(x, w, None, 1, 1, groups=2), (2, 8, 9, 9), (4, 4, 3, 3)),
    "one dimension": (lambda x, w: F.conv1d(x, w, None, 2, 2, 2), (2, 4, 13), (2, 4, 3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_leads_to_the_same_cotangent(way: str) -> None:
    function, size, kernel = WAYS[way]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, dtype=torch.float64, generator=generator) for s in (size, kernel))
    capture = capture_joint(function, [x, weight])
    truth = true_values(capture, [x, weight])
    (cotangent,) = capture.graph.tangents
    edges = all_edges(capture)
    ways = [edge for edge in edges if cotangent in edge.gives and edge.kind == "inverse"]
    fragments = take_fragments(edges, truth)
    assert len(ways) == 2
    for edge in ways:
        found = run_edges([edge], {**truth, **fragments})[cotangent]
        assert (found - truth[cotangent]).norm() < 1e-6 * truth[cotangent].norm()
