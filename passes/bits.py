"""Packing into one bit per element, and back into two values of any dtype.

Registered as operators so that both lowerings treat them as opaque calls without autograd. The comparison is part of
packing: a mask that Inductor writes on a CPU costs more than a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.library import Library, register_fake

_library = Library("moonwalk_compile", "DEF")
_library.define("pack_bits(Tensor source, float low=0., float? high=None) -> Tensor")
_library.define("strict_sign(Tensor source) -> Tensor")
_library.define("unpack_two(Tensor packed, SymInt[] size, float high, float low, ScalarType dtype) -> Tensor")

_GATHER = 0x0102040810204080  # times a word of eight 0/1 bytes: the top byte is the eight bits


def _pack(source: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    """Which elements lie between `low` and `high` (or are True), eight at a time, in the words of an int64 view."""
    flat = _mask(source, low, high).reshape(-1)
    if flat.storage_offset() % 8:  # a piece of a larger mask
        flat = flat.clone()
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def _mask(source: Tensor, low: float, high: float | None) -> Tensor:
    if source.dtype == torch.bool:
        return source
    above = source > low
    return above if high is None else above.logical_and_(source < high)


@lru_cache(maxsize=64)
def _rows(high: float, low: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight values that each of the 256 bytes stands for."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return torch.where(bits.bool(), high, low).to(device=device, dtype=dtype)


def _unpack(packed: Tensor, size: Sequence[int], high: float, low: float, dtype: torch.dtype) -> Tensor:
    """A table of rows is several times faster than shifting, comparing and filling."""
    rows = _rows(high, low, dtype, packed.device).index_select(0, packed.int())
    return rows.view(-1)[: math.prod(size)].view(list(size))


def _strict_sign(source: Tensor) -> Tensor:
    """1 above zero, else -1: as a sign packed into one bit comes back."""
    signs = torch.sgn(source)
    if source.device.type != "cpu" or not bool(signs.all()):  # on a CPU, looking is several times faster than filling
        signs.masked_fill_(signs == 0, -1)
    return signs


_library.impl("strict_sign", _strict_sign, "CompositeExplicitAutograd")
_library.impl("pack_bits", _pack, "CompositeExplicitAutograd")
_library.impl("unpack_two", _unpack, "CompositeExplicitAutograd")


@register_fake("moonwalk_compile::pack_bits")
def _pack_fake(source: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    return source.new_empty((source.numel() + 7) // 8, dtype=torch.uint8)


@register_fake("moonwalk_compile::strict_sign")
def _strict_sign_fake(source: Tensor) -> Tensor:
    return torch.empty_like(source)


@register_fake("moonwalk_compile::unpack_two")
def _unpack_fake(packed: Tensor, size: Sequence[int], high: float, low: float, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(list(size), dtype=dtype)


pack_bits = torch.ops.moonwalk_compile.pack_bits
strict_sign = torch.ops.moonwalk_compile.strict_sign
unpack_two = torch.ops.moonwalk_compile.unpack_two
