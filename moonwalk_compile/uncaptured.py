"""What is done for a model that Dynamo cannot capture whole because it branches on a flag.

A flag is a buffer of one element that says whether data-dependent initialisation is done (the ActNorm of normalizing
flows). The branch is decided while tracing: for the call the buffer is hidden behind the number that it holds, and
Dynamo's guard on that number sees when it changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Flag:
    """A buffer of one element that is 0 or 1."""

    module: nn.Module
    name: str

    @property
    def value(self) -> bool | float | None:
        """None if it is a flag no longer."""
        buffer = self.module._buffers.get(self.name)
        return None if buffer is None or not _is_flag(buffer) else buffer.item()


def _is_flag(buffer: Tensor) -> bool:
    """Counters such as BatchNorm's are integers, and are left alone."""
    kind = buffer.dtype == torch.bool or buffer.is_floating_point()
    return kind and buffer.dim() == 0 and type(buffer) is Tensor and buffer.item() in (0, 1)


def flags_of(model: nn.Module) -> tuple[Flag, ...]:
    return tuple(
        Flag(module, name)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if _is_flag(buffer)
    )


@contextlib.contextmanager
def decided(flags: Sequence[Flag]) -> Iterator[None]:
    """While this holds, `module.flag` is a number: an entry of the instance hides the buffer of that name."""
    shown = [(flag, value) for flag in flags if (value := flag.value) is not None]
    for flag, value in shown:
        flag.module.__dict__[flag.name] = value
    try:
        yield
    finally:
        for flag, _ in shown:
            flag.module.__dict__.pop(flag.name, None)
