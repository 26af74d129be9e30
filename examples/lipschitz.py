"""A very deep 1-Lipschitz network: orthogonal linear layers and activations that keep the norm of the gradient.

Neither |x| nor MaxMin (GroupSort of pairs, Anil et al. 2019) can be inverted, but both have well-conditioned Jacobians.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


class Abs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class MaxMin(nn.Module):
    """The larger of each pair of features, then the smaller."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=-1)


def make_activation(name: str, slope: float) -> nn.Module:
    return {"abs": Abs(), "maxmin": MaxMin(), "leaky_relu": nn.LeakyReLU(slope)}[name]


def orthogonal_linear(width: int, parametrized: bool) -> nn.Module:
    """Orthogonal when training starts; with `parametrized` it stays so."""
    layer = nn.Linear(width, width)
    nn.init.orthogonal_(layer.weight)
    return orthogonal(layer) if parametrized else layer


def build(
    *,
    activation: str = "abs",
    slope: float = 0.2,
    layers: int = 128,
    width: int = 256,
    batch: int = 8192,
    parametrized: bool = False,
) -> tuple[nn.Module, tuple[Tensor]]:
    """`layers` x (linear, activation), and points of two spirals in the first coordinates of [batch, width]."""
    steps = ((orthogonal_linear(width, parametrized), make_activation(activation, slope)) for _ in range(layers))
    model = nn.Sequential(*(module for step in steps for module in step))
    return model, (embed(spirals(batch)[0], width),)


def spirals(points: int) -> tuple[Tensor, Tensor]:
    """Points [points, 2] of two spirals with a little noise, and which spiral each is on [points], 0 or 1."""
    label = torch.randint(2, (points,)).float()
    radius = torch.rand(points).sqrt()
    angle = 1.5 * math.pi * radius + math.pi * label
    place = torch.stack([angle.cos(), angle.sin()], dim=-1) * radius[:, None]
    return place + 0.02 * torch.randn_like(place), label


def embed(place: Tensor, width: int) -> Tensor:
    """The same points in `width` dimensions, distances kept and lengths of about sqrt(width)."""
    basis = torch.linalg.qr(torch.randn(width, 2, generator=torch.Generator().manual_seed(0)))[0]
    return math.sqrt(width) * place @ basis.T


def loss(model: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """The classes are told apart by the difference of the first two outputs."""
    y = model(x)
    return F.binary_cross_entropy_with_logits(y[:, 0] - y[:, 1], label)


def batches(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        place, label = spirals(x.shape[0])
        yield embed(place, x.shape[1]), label


def main() -> None:
    from training import run_example

    run_example(build, loss, batches, lr=1e-4)


if __name__ == "__main__":
    main()
