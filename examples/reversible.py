"""Deep reversible networks, written as ordinary modules: additive and affine couplings, leapfrog steps.

The width is split into two halves; each block updates one half from the other and then the other from the first
(NICE, Dinh et al. 2014; RevNet, Gomez et al. 2017; RealNVP, Dinh et al. 2016).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Mlp(nn.Sequential):
    """LayerNorm, Linear, GELU, Linear on the last axis."""

    def __init__(self, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width if out is None else out)
        )


class AdditiveCoupling(nn.Module):
    """y1 = x1 + F(x2); y2 = x2 + G(y1)."""

    def __init__(self, half: int, hidden: int) -> None:
        super().__init__()
        self.f = Mlp(half, hidden)
        self.g = Mlp(half, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], dim=-1)


class AffineCoupling(nn.Module):
    """y1 = x1 * exp(tanh(s(x2))) + t(x2); y2 likewise from y1."""

    def __init__(self, half: int, hidden: int) -> None:
        super().__init__()
        self.f = Mlp(half, hidden, 2 * half)
        self.g = Mlp(half, hidden, 2 * half)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        scale, shift = self.f(x2).chunk(2, dim=-1)
        y1 = x1 * torch.exp(torch.tanh(scale)) + shift
        scale, shift = self.g(y1).chunk(2, dim=-1)
        y2 = x2 * torch.exp(torch.tanh(scale)) + shift
        return torch.cat([y1, y2], dim=-1)


class Leapfrog(nn.Module):
    """A step of symplectic integration: q = q + dt F(p); p = p - dt G(q)."""

    def __init__(self, half: int, hidden: int, dt: float = 0.1) -> None:
        super().__init__()
        self.velocity = Mlp(half, hidden)
        self.force = Mlp(half, hidden)
        self.dt = dt

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.chunk(2, dim=-1)
        q = q + self.dt * self.velocity(p)
        p = p - self.dt * self.force(q)
        return torch.cat([q, p], dim=-1)


COUPLINGS = {"additive": AdditiveCoupling, "affine": AffineCoupling, "leapfrog": Leapfrog}


def build(
    *,
    coupling: str = "additive",
    blocks: int = 64,
    half: int = 128,
    hidden: int | None = None,
    batch: int = 16,
    tokens: int = 512,
) -> tuple[nn.Module, tuple[Tensor]]:
    """A stack of `blocks` couplings, and an input of shape [batch, tokens, 2 * half]. `hidden` is `half` by default."""
    block = COUPLINGS[coupling]
    model = nn.Sequential(*(block(half, hidden or half) for _ in range(blocks)))
    return model, (torch.randn(batch, tokens, 2 * half),)


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), target)


def batches(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh inputs like `x`; the target adds to each half a function of the other half."""
    while True:
        fresh = torch.randn_like(x)
        yield fresh, fresh + torch.sin(2 * fresh.roll(x.shape[-1] // 2, dims=-1))


def main() -> None:
    from training import run_example

    run_example(build, loss, batches, lr=1e-3)


if __name__ == "__main__":
    main()
