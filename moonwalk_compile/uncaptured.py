"""What is done for a model that Dynamo cannot capture whole.

A branch on a flag, a buffer of one element that says whether data-dependent initialisation is done (the ActNorm of
normalizing flows), is decided while tracing: for the call the buffer is hidden behind the number that it holds, and
Dynamo's guard on that number sees when it changes.

Other breaks stay. Then the model runs as it is, with its repeated modules (`blocks.3`) checkpointed one by one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import MoonwalkError
from .passes._torch_compat import tree_flatten
from .peers import repeated_blocks

# -- flags ---------------------------------------------------------------------------------------------------------


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


# -- checkpoints ---------------------------------------------------------------------------------------------------

RECOMPUTED = 4 / 3  # time of a step whose modules are all computed again, relative to plain


class _Checkpoints:
    """Runs public methods of modules under torch.utils.checkpoint; calls from within one run as they are."""

    def __init__(self) -> None:
        self.inside = False

    def method(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside or not torch.is_grad_enabled():
                return function(*args, **kwargs)
            before = _versions((args, kwargs))

            def body(*args: Any, **kwargs: Any) -> Any:
                with self._entered():
                    return function(*args, **kwargs)

            def contexts() -> tuple[Any, Any]:
                return contextlib.nullcontext(), _again(module, before)

            return checkpoint(body, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        return run

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        outer, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = outer


def _versions(arguments: Any) -> tuple[tuple[Tensor, int], ...]:
    return tuple((leaf, leaf._version) for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor))


@contextlib.contextmanager
def _again(module: nn.Module, before: Iterable[tuple[Tensor, int]]) -> Iterator[None]:
    """The second run of a module: from unchanged inputs, and without moving its buffers (running statistics) again."""
    if any(tensor._version != version for tensor, version in before):
        raise MoonwalkError(
            "A checkpointed module cannot be computed again",
            f"an input of {type(module).__name__} was changed in place after it had been read",
            'train without checkpoints: strategies=("keep",)',
        )
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            if not buffer.equal(value):  # BatchNorm moves its statistics without a new version
                buffer.data.copy_(value)


def _public_methods(module: nn.Module) -> list[str]:
    """`forward`, and what the module's own classes define beside it (a flow has an `inverse`)."""
    names = {"forward"}
    for owner in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        names.update(name for name, found in vars(owner).items() if isinstance(found, FunctionType))
    return sorted(
        name for name in names if not name.startswith("_") and (name == "forward" or name not in dir(nn.Module))
    )


@contextlib.contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While this holds, each of `blocks` keeps its inputs only. Attributes that users have set on them are kept."""
    checkpoints = _Checkpoints()
    hidden: list[tuple[nn.Module, str]] = []
    try:
        for block in blocks:
            for name in _public_methods(block):
                if name not in block.__dict__:
                    block.__dict__[name] = checkpoints.method(block, getattr(block, name))
                    hidden.append((block, name))
        yield
    finally:
        for block, name in hidden:
            block.__dict__.pop(name, None)


def blocks_to_checkpoint(model: nn.Module, strategies: Sequence[str], max_slowdown: float) -> list[nn.Module]:
    """The repeated modules, where the options allow to compute them again."""
    allowed = "checkpoint" in strategies and max_slowdown >= RECOMPUTED
    return repeated_blocks(model) if allowed else []
