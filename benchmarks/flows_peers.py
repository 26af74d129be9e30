"""Reversible networks as memcnn, revlib and momentumnet build them, and the same functions under plain autograd."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PeerSizes:
    blocks: int
    batch: int
    channels: int
    side: int


FULL, SMALL = PeerSizes(32, 64, 32, 16), PeerSizes(4, 4, 8, 4)


@dataclass(frozen=True)
class Peer:
    """`build(sizes, plain)` is the library's own network; with `plain` its memory saving is switched off."""

    module: str
    build: Callable[[PeerSizes, bool], nn.Module]

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.module) is None

    def made(self, scale: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
        """Theirs, plain with the same parameters, and a batch."""
        sizes = FULL if scale == "full" else SMALL
        models = []
        for plain in (False, True):
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # memcnn's import uses torch.cuda.amp
                models.append(MeanSquare(sizes.channels, self.build(sizes, plain)))
        generator = torch.Generator().manual_seed(1)
        batch = torch.randn(sizes.batch, 3, sizes.side, sizes.side, generator=generator)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a, b)
        return models[0], models[1], (batch,)


class MeanSquare(nn.Module):
    """The loss of a network behind a convolution (memcnn frees the input of its first block)."""

    def __init__(self, channels: int, net: nn.Module) -> None:
        super().__init__()
        self.stem, self.net = nn.Conv2d(3, channels, 3, padding=1), net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.stem(x)).square().mean()


def _branch(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh(), nn.Conv2d(channels, channels, 3, padding=1)
    )


def memcnn_revnet(sizes: PeerSizes, plain: bool) -> nn.Module:
    memcnn: Any = importlib.import_module("memcnn")
    half = sizes.channels // 2

    def block() -> nn.Module:
        coupling = memcnn.AdditiveCoupling(Fm=_branch(half), Gm=_branch(half))
        return memcnn.InvertibleModuleWrapper(coupling, keep_input=False, keep_input_inverse=False, disable=plain)

    return nn.Sequential(*(block() for _ in range(sizes.blocks)))


class Alternating(nn.Module):
    """What revlib's `ReversibleSequential` computes. Its own modules save the generator's state, which ends a graph."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        for branch in self.branches:
            a, b = b, a + branch(b)
        return torch.cat([a, b], dim=1)


def revlib_revnet(sizes: PeerSizes, plain: bool) -> nn.Module:
    revlib: Any = importlib.import_module("revlib")
    branches = [_branch(sizes.channels // 2) for _ in range(2 * sizes.blocks)]
    if plain:
        return Alternating(branches)
    return revlib.ReversibleSequential(*branches, memory_mode=revlib.MemoryModes.autograd_function)


def momentum_net(sizes: PeerSizes, plain: bool) -> nn.Module:
    momentumnet: Any = importlib.import_module("momentumnet")
    functions = [_branch(sizes.channels) for _ in range(sizes.blocks)]
    return momentumnet.MomentumNet(functions, gamma=0.9, use_backprop=plain)


PEERS = {
    "memcnn RevNet": Peer("memcnn", memcnn_revnet),
    "revlib RevNet": Peer("revlib", revlib_revnet),
    "momentumnet": Peer("momentumnet", momentum_net),
}
