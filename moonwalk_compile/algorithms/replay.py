"""Running layers again as they ran the first time: with the same buffers and random numbers, and no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .chain import Layer, call


@dataclass(frozen=True)
class Replay:
    """Some layers, one after the other, and what they read beside their input and parameters."""

    layers: Sequence[Layer]
    buffers: Sequence[Mapping[str, Tensor]]
    devices: Sequence[torch.device]
    random: Sequence[Tensor]

    @contextlib.contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.random[0])
            for device, state in zip(self.devices, self.random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield

    def __call__(self, x: Any, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The last layer's output; `parameters` stand for those of the first layer. Buffers are written on copies."""
        given = dict(parameters or {})
        for layer, buffers in zip(self.layers, self.buffers, strict=True):
            x = call(layer.module, {**given, **{name: buffer.clone() for name, buffer in buffers.items()}}, x)
            given = {}
        return x


def replay_of(layers: Sequence[Layer], x: Any) -> Replay:
    """To be made just before the layers run on `x`."""
    buffers = [{name: buffer.clone() for name, buffer in layer.module.named_buffers()} for layer in layers]
    devices = [x.device] if isinstance(x, Tensor) and x.device.type == "cuda" else []
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    return Replay(layers, buffers, devices, states)


@contextlib.contextmanager
def untouched(x: Any) -> Iterator[None]:
    """Raises UsageError if the layers write over `x`, which is to be read again."""
    before = x._version if isinstance(x, Tensor) else None
    yield
    if before is not None and x._version != before:
        raise UsageError(
            "A layer overwrites its input",
            "the input was changed in place, so the layer cannot run on it again",
            "build the layer with inplace=False, or use backprop",
        )
