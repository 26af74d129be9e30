"""Operations run on made-up values, to see how long they take and what memory they borrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._torch_compat_inductor import tree_map

COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")  # other processes would wait
PICKY = ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")  # they crash on a buffer that no forward pass has written
DRAWN = 1 << 18  # random numbers for a tensor
COUNTS = ("iterations", "rounds")  # arguments of operators of ours that loop
FEW = 3  # rounds that hold as much memory as all
FILLED = {"bag_size": 1}  # arguments whose zeros would mean that there is nothing to do
# How attention's backward pass calls the state of the random numbers, and how its forward pass may.
STATES = {"philox_seed": ("philox_seed", "rng_state"), "philox_offset": ("philox_offset", "unused")}


def may_be_tried(target: Any) -> bool:
    """Whether an operation can be run on made-up values without harm."""
    if getattr(target, "namespace", "") in COLLECTIVES or _base(target).startswith(PICKY):
        return False
    return not {*STATES, "rng_state"} & {*_arguments(target)} or _forward_of(target) is not None


def shortened(target: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a call for a trial that looks at its memory alone: what loops does so in the same memory."""
    if getattr(target, "namespace", "") != "moonwalk_compile":
        return tuple(args)
    names = _arguments(target)
    return tuple(min(item, FEW) if name in COUNTS else item for name, item in zip(names, args, strict=False))


def _base(target: Any) -> str:
    return str(getattr(getattr(target, "_schema", None), "name", "")).removeprefix("aten::")


def _arguments(target: Any) -> list[str]:
    return [argument.name for argument in target._schema.arguments] if hasattr(target, "_schema") else []


@dataclass(frozen=True)
class Like:
    """Everything about a tensor argument that can matter for memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        return cls(tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def make(self) -> torch.Tensor:
        """Small positive numbers; zeros (a valid index, a valid mask) for integers and truth values."""
        new = torch.empty(self.elements, dtype=self.dtype, device=self.device)
        filled = _fill(new) if self.dtype.is_floating_point else new.zero_()
        return filled.as_strided(self.size, self.stride)  # strides of expanded tensors are zero

    @property
    def elements(self) -> int:
        if 0 in self.size:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize


def _fill(new: torch.Tensor) -> torch.Tensor:
    """Random numbers, drawn for the beginning and copied on: a CPU draws them one by one."""
    drawn = new[:DRAWN].uniform_(0.1, 1)
    for start in range(DRAWN, new.numel(), DRAWN):
        new[start : start + DRAWN].copy_(drawn[: new.numel() - start])
    return new


def made_up(target: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Real arguments for a frozen call."""
    real, named = tree_map(lambda x: x.make() if isinstance(x, Like) else x, (args, dict(kwargs)))
    for name, item in (*zip(_arguments(target), real, strict=False), *named.items()):
        if name in FILLED and isinstance(item, torch.Tensor):
            item.fill_(FILLED[name])
    if STATES.keys() & {*_arguments(target)}:
        return (), _with_states(target, {**dict(zip(_arguments(target), real, strict=False)), **named})
    return real, named


def _with_states(target: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of attention's backward pass, with random states that its forward pass has left.

    A state lies on the device or beside it, whatever its fake tensor says: kernels crash on one in the wrong place.
    """
    forward = _forward_of(target)
    needs = {name: given.get(name, True) for name in _arguments(forward) if name in (*given, "compute_log_sumexp")}
    names = [result.name for result in forward._schema.returns]
    left = dict(zip(names, forward(**needs), strict=True))
    states = {ours: left[theirs] for ours, both in STATES.items() for theirs in both if theirs in left}
    if not STATES.keys() <= states.keys():
        raise ValueError(f"the forward pass of {target} leaves no random state")
    return {**given, **states}


def _forward_of(target: Any) -> Any:
    packet = getattr(torch.ops.aten, _base(target).removesuffix("_backward"), None)
    return packet.default if packet is not None and _base(target).startswith("_scaled_dot_product") else None


def frozen_call(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments of a call as a hashable description."""
    return _frozen(tuple(args)), tuple((name, _frozen(value)) for name, value in kwargs.items())


def _frozen(value: Any) -> Any:
    """A hashable copy, with tensors as `Like`."""
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, torch.Tensor):
        return Like.of(value)
    return value
