"""Packing a mask into one bit per element, eight elements at a time in the words of an int64 view.

Registered as operators so that both lowerings treat them as opaque calls without autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library, register_fake

_library = Library("moonwalk_compile", "DEF")
_library.define("pack_bits(Tensor mask) -> Tensor")
_library.define("unpack_bits(Tensor packed, SymInt[] size) -> Tensor")

_GATHER = 0x0102040810204080  # times a word of eight 0/1 bytes: the top byte is the eight bits
_SPREAD = 0x0101010101010101  # a byte repeated eight times
_SELECT = 0x8040201008040201 - (1 << 64)  # bit k of byte k


def _pack(mask: Tensor) -> Tensor:
    flat = mask.reshape(-1)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def _unpack(packed: Tensor, size: Sequence[int]) -> Tensor:
    words = packed.to(torch.int64).mul_(_SPREAD).bitwise_and_(_SELECT)
    count = 1
    for length in size:
        count *= length
    return words.view(torch.uint8).ne(0)[:count].view(list(size))


_library.impl("pack_bits", _pack, "CompositeExplicitAutograd")
_library.impl("unpack_bits", _unpack, "CompositeExplicitAutograd")


@register_fake("moonwalk_compile::pack_bits")
def _pack_fake(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)


@register_fake("moonwalk_compile::unpack_bits")
def _unpack_fake(packed: Tensor, size: Sequence[int]) -> Tensor:
    return packed.new_empty(list(size), dtype=torch.bool)


pack_bits = torch.ops.moonwalk_compile.pack_bits
unpack_bits = torch.ops.moonwalk_compile.unpack_bits
