"""What people use today, on the same model: plain training, checkpoints by hand, torch's own budget."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .front import repeated_module
from .passes._torch_compat import (
    default_partition,
    dynamo_aot_autograd,
    functorch_config,
    in_own_frame,
    min_cut_rematerialization_partition,
)
from .passes._torch_compat_inductor import inductor_config
from .passes.lower import boxed_eager

Partition = Callable[..., Any]


def plain(model: nn.Module, lowering: str) -> nn.Module:
    return compiled(copy.deepcopy(model), lowering, default_partition)


def checkpointed(model: nn.Module, context_fn: Callable[[], Any] | None = None) -> nn.Module | None:
    """A copy with each repeated module (`blocks.3`) under torch.utils.checkpoint; None where none repeats."""
    model = copy.deepcopy(model)
    blocks = repeated_blocks(model)
    options = {"use_reentrant": False, **({"context_fn": context_fn} if context_fn else {})}
    for block in blocks:
        block.forward = _checkpointing(block.forward, options)
    return model if blocks else None


def _checkpointing(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules whose path ends in its first number, where their parent has several, and not only single layers."""
    paths = [path for path, _ in model.named_modules() if path and repeated_module(path) == path]
    siblings: dict[str, list[nn.Module]] = {}
    for path in paths:
        siblings.setdefault(path.rpartition(".")[0], []).append(model.get_submodule(path))
    groups = (group for group in siblings.values() if len(group) > 1)
    return [block for group in groups if any(list(m.children()) for m in group) for block in group]


def under_torch_budget(model: nn.Module, lowering: str) -> nn.Module:
    """To be run for the first time under `torch_budget(part)`."""
    return compiled(copy.deepcopy(model), lowering, min_cut_rematerialization_partition)


@contextlib.contextmanager
def torch_budget(part: float) -> Iterator[None]:
    with functorch_config.patch(activation_memory_budget=part, donated_buffer=False, enable_autograd_cache=False):
        yield


@contextlib.contextmanager
def same_random_numbers(lowering: str) -> Iterator[None]:
    """While this holds, what Inductor compiles draws the random numbers of eager PyTorch.

    Eager lowering does so anyway; there the option would only make plain slower, with draws in the backward pass
    whose results nobody reads.
    """
    with inductor_config.patch(fallback_random=True) if lowering == "inductor" else contextlib.nullcontext():
        yield


def compiled(model: nn.Module, lowering: str, partition: Partition = default_partition) -> nn.Module:
    """Compiled in place. In the eager lowering it gets what ours gets: arguments are freed after their last use."""
    if lowering == "inductor":
        return in_one_graph(model)
    backend = dynamo_aot_autograd(
        fw_compiler=_boxed, bw_compiler=_boxed, inference_compiler=_boxed, partition_fn=partition
    )
    return in_one_graph(model, backend)


def in_one_graph(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """As `torch.compile(model)` does, but in place."""
    model._compiled_call_impl = in_own_frame(model._call_impl, backend)
    return model


def _boxed(module: Any, inputs: Any) -> Callable[..., Any]:
    return boxed_eager(module)
