"""Nets that resample their images, end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.measure import gradient_error, gradients

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Resize(nn.Module):
    def __init__(self, factor: float, mode: str) -> None:
        super().__init__()
        self.factor, self.mode = factor, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.factor, mode=self.mode)


class Abs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def layers(count: int, activation: nn.Module) -> list[nn.Module]:
    """Orthogonal 1x1 convolutions."""
    found: list[nn.Module] = []
    for _ in range(count):
        layer = nn.Conv2d(8, 8, 1)
        nn.init.orthogonal_(layer.weight)
        found += [layer, activation]
    return found


def train(model: nn.Module, x: Tensor, strategy: str, lowering: str) -> tuple[float, set[int]]:
    """The gradients' error, and the layers that the strategy goes through."""
    ours = moonwalk_compile(copy.deepcopy(model), strategies=(strategy, "keep"), lowering=lowering, max_slowdown=1000)
    for net in (model, ours):
        (net(x) - 1).square().sum().backward()
    assert ours.plan is not None
    names = [segment.name.split(" to ") for segment in ours.plan.segments if segment.strategy == strategy]
    covered = {layer for name in names for layer in range(int(name[0]), int(name[-1]) + 1)}
    return gradient_error(gradients(ours), gradients(model)), covered


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_images_are_had_from_larger_ones(mode: str, lowering: str) -> None:
    torch.manual_seed(0)
    smooth = nn.LeakyReLU(0.8)
    model = nn.Sequential(
        *layers(6, smooth), Resize(2, mode), *layers(6, smooth), Resize(1.5, mode), *layers(3, smooth)
    )
    error, covered = train(model, torch.randn(8, 8, 12, 12), "invert", lowering)
    assert error < 1e-5
    assert 12 in covered, covered


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_cotangents_are_had_from_those_of_larger_images(mode: str) -> None:
    """The block of the layer in front of the resampling ends behind it, where the image is small."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers(12, Abs()), Resize(0.7, mode), *layers(12, Abs()))
    error, covered = train(model, torch.randn(8, 8, 24, 24), "moonwalk", "eager")
    assert error < 1e-5
    assert {20, 22} <= covered, covered
