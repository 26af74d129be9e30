"""A normalizing flow (RealNVP, Dinh et al. 2016) that learns the density of two moons; forward returns the loss."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Coupling(nn.Module):
    """Scale and shift one half by functions of the other, then swap the halves; also the log-determinant."""

    def __init__(self, half: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(half, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 2 * half)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=-1)
        raw, shift = self.net(x1).chunk(2, dim=-1)
        log_scale = torch.tanh(raw)
        y2 = x2 * torch.exp(log_scale) + shift
        return torch.cat([y2, x1], dim=-1), log_scale.sum(dim=-1)


class Flow(nn.Module):
    def __init__(self, dimensions: int, couplings: int, hidden: int) -> None:
        super().__init__()
        if dimensions % 2:
            raise ValueError("a flow needs an even number of dimensions")
        self.couplings = nn.ModuleList(Coupling(dimensions // 2, hidden) for _ in range(couplings))

    def forward(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood (nats) of points [batch, dimensions] under the flow."""
        log_determinant = x.new_zeros(x.shape[0])
        for coupling in self.couplings:
            x, contribution = coupling(x)
            log_determinant = log_determinant + contribution
        log_normal = -0.5 * (x.square() + math.log(2 * math.pi)).sum(dim=-1)
        return -(log_normal + log_determinant).mean()


def build(
    *, couplings: int = 32, dimensions: int = 2, hidden: int = 64, batch: int = 4096
) -> tuple[nn.Module, tuple[Tensor]]:
    """The flow, and points of shape [batch, dimensions]."""
    return Flow(dimensions, couplings, hidden), (moons(batch, dimensions),)


def moons(points: int, dimensions: int = 2, noise: float = 0.1) -> Tensor:
    """Points [points, dimensions]: each pair of coordinates is a point of two interleaving half circles."""
    angle = math.pi * torch.rand(points, dimensions // 2)
    lower = torch.rand(points, dimensions // 2) < 0.5
    x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
    place = torch.stack([x, y], dim=-1).flatten(1)
    return place + noise * torch.randn_like(place)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def batches(x: Tensor) -> Iterator[tuple[Tensor]]:
    while True:
        yield (moons(*x.shape),)


def main() -> None:
    from training import run_example

    run_example(build, loss, batches, lr=1e-3)


if __name__ == "__main__":
    main()
