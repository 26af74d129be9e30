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


class Pad(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1) if self.mode == "constant" else (1, 1, 1, 1), self.mode)


def behind_patches(*last: nn.Module) -> nn.Module:
    """Patches and grouped 1x1 convolutions, which nobody keeps the values of, and then `last`."""
    layers = [orthogonal(3, 12, 2, stride=2), *(orthogonal(12, 12, 1, groups=2) for _ in range(24)), *last]
    parts = [(layer,) if isinstance(layer, Pad) else (layer, Abs()) for layer in layers]
    return nn.Sequential(*(part for pair in parts for part in pair))


def moonwalk_names(model: nn.Module, x: Tensor, other: str, slowdown: float) -> list[str]:
    """Trains by moonwalk, compares the gradients, and says which segments there are."""
    ours = moonwalk_compile(
        copy.deepcopy(model), strategies=("moonwalk", other), lowering="eager", max_slowdown=slowdown
    )
    for _ in range(2):
        for net in (model, ours):
            net.zero_grad()
            (net(x) - 1).square().sum().backward()
        assert gradient_error(gradients(ours), gradients(model)) < 1e-4
    assert ours.plan is not None
    return [segment.name for segment in ours.plan.segments if segment.strategy == "moonwalk"]


def test_moonwalk_through_strided_and_grouped_convolutions() -> None:
    """The patches of one overlap, so that only some taps have a single owner."""
    torch.manual_seed(0)
    model = behind_patches(orthogonal(12, 12, 4, stride=3), orthogonal(12, 12, 1), orthogonal(12, 12, 1))
    names = moonwalk_names(model, torch.randn(8, 3, 38, 38), "checkpoint", 4)
    assert any(name.endswith(("50", "52", "54")) for name in names), names  # 50 is the one with stride 3


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_moonwalk_through_padded_convolutions(mode: str) -> None:
    torch.manual_seed(0)
    model = behind_patches(Pad(mode), orthogonal(12, 10, 3, stride=2), *(orthogonal(10, 10, 1) for _ in range(24)))
    names = moonwalk_names(model, torch.randn(8, 3, 40, 40), "keep", 1000)
    places = [tuple(map(int, name.split(" to "))) for name in names if " to " in name]
    assert any(first < 51 < last for first, last in places), names  # 51 is behind the padding


def circular(channels: int, *sides: int) -> nn.Conv1d | nn.Conv2d:
    """Near the identity: random kernels are badly conditioned."""
    make = nn.Conv2d if len(sides) == 2 else nn.Conv1d
    layer = make(channels, channels, sides, padding="same", padding_mode="circular")
    nn.init.dirac_(layer.weight)
    layer.weight.data += 0.02 * torch.randn_like(layer.weight)
    return layer


@pytest.mark.parametrize("sides", [(3,), (3, 3), (5, 2)])
def test_circular_convolutions_are_inverted(sides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [circular(8, *sides) for _ in range(8)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU(0.9))))
    ours = moonwalk_compile(copy.deepcopy(model), strategies=("invert", "keep"), lowering="eager", max_slowdown=100)
    x = torch.randn(64, 8, *[12] * len(sides))
    for net in (model, ours):
        (net(x) - 1).square().sum().backward()
    assert gradient_error(gradients(ours), gradients(model)) < 1e-5
    assert ours.plan is not None
    assert any(segment.strategy == "invert" for segment in ours.plan.segments), ours.plan


WAYS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "4x4, stride 2, wider": (lambda x, w: F.conv2d(x, w, None, 2, 1), (2, 4, 12, 12), (8, 4, 4, 4)),
    "3x3, stride 2": (lambda x, w: F.conv2d(x, w, None, 2, 1), (2, 4, 12, 12), (4, 4, 3, 3)),
    "3x3, narrowing": (lambda x, w: F.conv2d(x, w, None, 1, 1), (2, 8, 9, 9), (4, 8, 3, 3)),
    "grouped": (lambda x, w: F.conv2d(x, w, None, 1, 1, groups=2), (2, 8, 9, 9), (4, 4, 3, 3)),
    "padded": (lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1)), w), (2, 8, 9, 9), (4, 8, 3, 3)),
    "circular": (lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), w), (2, 4, 9, 9), (4, 4, 3, 3)),
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
    assert len(ways) == {"padded": 4, "circular": 3}.get(way, 2)  # some start from the gradient of the padded image
    for edge in ways:
        found = run_edges([edge], {**truth, **fragments})[cotangent]
        assert (found - truth[cotangent]).norm() < 1e-6 * truth[cotangent].norm()
