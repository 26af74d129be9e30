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


@pytest.mark.parametrize("mode", [pytest.param("constant", marks=pytest.mark.slow), "reflect"])
def test_moonwalk_through_padded_convolutions(mode: str) -> None:
    torch.manual_seed(0)
    model = behind_patches(Pad(mode), orthogonal(12, 10, 3, stride=2), *(orthogonal(10, 10, 1) for _ in range(24)))
    names = moonwalk_names(model, torch.randn(8, 3, 40, 40), "keep", 1000)
    places = [tuple(map(int, name.split(" to "))) for name in names if " to " in name]
    assert any(first < 51 <= last for first, last in places), names  # 51 is behind the padding


def circular(channels: int, *sides: int) -> nn.Conv1d | nn.Conv2d:
    """Near the identity: random kernels are badly conditioned."""
    make = nn.Conv2d if len(sides) == 2 else nn.Conv1d
    layer = make(channels, channels, sides, padding="same", padding_mode="circular")
    nn.init.dirac_(layer.weight)
    layer.weight.data += 0.02 * torch.randn_like(layer.weight)
    return layer


@pytest.mark.parametrize("sides", [(3,), (5, 2), pytest.param((3, 3), marks=pytest.mark.slow)])
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


class Triangular(nn.Module):
    """An orthogonal tap at each output's own place, and random ones before it: `scale` times as large, all together."""

    def __init__(self, channels: int, kernel: tuple[int, ...], scale: float) -> None:
        super().__init__()
        mask = torch.zeros(kernel)
        mask.view(-1)[: mask.numel() // 2 + 1] = 1
        self.register_buffer("mask", mask.expand(channels, channels, *kernel).clone())
        weight = torch.randn(channels, channels, *kernel) * scale / (channels * (mask.numel() // 2)) ** 0.5
        weight[(..., *(k // 2 for k in kernel))] = nn.init.orthogonal_(torch.empty(channels, channels))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


class Causal(nn.Module):
    """What remains of a masked convolution in one dimension, padded on one side or cut behind it."""

    def __init__(self, channels: int, scale: float, dilation: int, cut: bool) -> None:
        super().__init__()
        half = Triangular(channels, (5,), scale)
        self.weight, self.bias = nn.Parameter(half.weight.data[..., :3].contiguous()), half.bias
        self.dilation, self.cut = dilation, cut

    def forward(self, x: Tensor) -> Tensor:
        before = 2 * self.dilation
        if self.cut:
            return F.conv1d(x, self.weight, self.bias, padding=before, dilation=self.dilation)[..., :-before]
        return F.conv1d(F.pad(x, (before, 0)), self.weight, self.bias, dilation=self.dilation)


def triangular_net(kind: str, scale: float, activation: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    makes = {
        "masked": lambda i: Triangular(8, (3, 3), scale),
        "causal": lambda i: Causal(8, scale, 2 ** (i % 3), cut=False),
        "cut": lambda i: Causal(8, scale, 1, cut=True),
    }
    model = nn.Sequential(*(part for i in range(8) for part in (makes[kind](i), activation)))
    return model, torch.randn(8, 8, 24, 24) if kind == "masked" else torch.randn(8, 8, 256)


def train_triangular(model: nn.Module, x: Tensor, strategy: str, lowering: str = "eager") -> tuple[float, int]:
    """The gradients' error, and how many blocks the strategy takes."""
    ours = moonwalk_compile(copy.deepcopy(model), strategies=(strategy, "keep"), lowering=lowering, max_slowdown=1000)
    for net in (model, ours):
        (net(x) - 1).square().mean().backward()
    assert ours.plan is not None
    return gradient_error(gradients(ours), gradients(model)), sum(
        segment.blocks for segment in ours.plan.segments if segment.strategy == strategy
    )


TRIANGULAR = [
    *(("invert", kind, scale, "eager") for kind in ("masked", "causal", "cut") for scale in (0.3, 0.7)),
    *(pytest.param("invert", kind, 0.7, "inductor", marks=pytest.mark.slow) for kind in ("masked", "causal")),
    *(("moonwalk", kind, 0.3, "eager") for kind in ("masked", "causal")),
]


@pytest.mark.parametrize(("strategy", "kind", "scale", "lowering"), TRIANGULAR)
def test_triangular_convolutions_are_undone(strategy: str, kind: str, scale: float, lowering: str) -> None:
    model, x = triangular_net(kind, scale, nn.LeakyReLU(0.8) if strategy == "invert" else Abs())
    error, count = train_triangular(model, x, strategy, lowering)
    assert error < 1e-5
    assert count >= 3


@pytest.mark.parametrize("kind", ["masked", "causal"])
@pytest.mark.parametrize(("strategy", "scale"), [("invert", 1.5), ("moonwalk", 0.7), ("moonwalk", 1.5)])
def test_triangular_convolutions_that_amplify_errors_are_kept(strategy: str, scale: float, kind: str) -> None:
    """What substitution adds up grows along the image; moonwalk takes no block that amplifies."""
    model, x = triangular_net(kind, scale, nn.LeakyReLU(0.8) if strategy == "invert" else Abs())
    error, count = train_triangular(model, x, strategy)
    assert error < 1e-5
    assert count == 0
