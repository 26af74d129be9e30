"""Bits on a CUDA device: each kernel reads its elements once. (Composed of torch's operations, it is ten times.)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024  # of bits, for each program


@triton.jit
def _pack_kernel(  # type: ignore[no-untyped-def]
    source, packed, count, low, high, BOUNDED: tl.constexpr, MASK: tl.constexpr, BYTES: tl.constexpr
):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    value = tl.load(source + place, mask=place < count, other=0)
    inside = value != 0 if MASK else value > low
    if BOUNDED:
        inside = inside & (value < high)
    inside = inside & (place < count)
    bits = tl.sum(inside.to(tl.int32) << bit[None, :], axis=1)
    tl.store(packed + byte, bits.to(tl.uint8), mask=byte * 8 < count)


@triton.jit
def _unpack_kernel(packed, values, levels, count, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    bits = tl.load(packed + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    chosen = (bits[:, None] >> bit[None, :]) & 1
    tl.store(values + place, tl.load(levels + chosen), mask=place < count)


def may_pack(flat: Tensor, low: float, high: float | None) -> bool:
    """Whether a bound compares in a kernel as it does in torch, which rounds it to the elements' type."""
    return flat.dtype in (torch.bool, torch.float32) or (low == 0 and high is None)


@lru_cache(maxsize=64)
def _levels(low: float, high: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    found = torch.tensor([low, high], dtype=dtype, device=device)
    return found.view(torch.uint8) if dtype == torch.bool else found


def pack(tensor: Tensor, low: float, high: float | None) -> Tensor:
    """Which elements lie between `low` and `high`, or are True."""
    flat = tensor.contiguous().view(-1)
    packed = flat.new_empty((flat.numel() + 7) // 8, dtype=torch.uint8)
    mask = flat.dtype == torch.bool
    source = flat.view(torch.uint8) if mask else flat
    if flat.numel():
        with torch.cuda.device_of(flat):
            _pack_kernel[(triton.cdiv(packed.numel(), BYTES),)](
                source, packed, flat.numel(), low, high or 0.0, BOUNDED=high is not None, MASK=mask, BYTES=BYTES
            )
    return packed


def unpack(packed: Tensor, size: Sequence[int], high: float, low: float, dtype: torch.dtype) -> Tensor:
    values = packed.new_empty(list(size), dtype=dtype)
    target = values.view(torch.uint8) if dtype == torch.bool else values
    count = math.prod(size)
    if count:
        with torch.cuda.device_of(packed):
            levels = _levels(low, high, dtype, packed.device)
            _unpack_kernel[(triton.cdiv((count + 7) // 8, BYTES),)](packed, target, levels, count, BYTES=BYTES)
    return values
