"""Packing into one bit per element, and back into two values of any dtype.

Registered as operators so that both lowerings treat them as opaque calls without autograd. The comparison is part of
packing: a mask that Inductor writes on a CPU costs more than a matrix product.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import Library, register_fake

_library = Library("moonwalk_compile", "DEF")
_library.define("pack_bits(Tensor source, float low=0., float? high=None) -> Tensor")
_library.define("pack_signs(Tensor source) -> Tensor")
_library.define("unpack_signs(Tensor packed, SymInt[] size, ScalarType dtype) -> Tensor")
_library.define("strict_sign(Tensor source) -> Tensor")
_library.define("take_marked(Tensor source, Tensor marks, float expected) -> Tensor")
_library.define("put_marked(Tensor target, Tensor marks, Tensor taken) -> Tensor")
_library.define("unpack_two(Tensor packed, SymInt[] size, float high, float low, ScalarType dtype) -> Tensor")

PIECE = 1 << 16  # elements
CACHED = 1 << 18  # elements whose mask stays in a core's cache
BY_NUMPY = (torch.float32, torch.float64, torch.bool)
_GATHER = 0x0102040810204080  # times a word of eight 0/1 bytes: the top byte is the eight bits


def _pack(source: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    """Which elements lie between `low` and `high` (or are True)."""
    if source.device.type == "cpu" and source.dtype in BY_NUMPY:
        return _pack_by_numpy(source.detach().reshape(-1), lambda values: [_mask(values, low, high)])
    kernels = _kernels(source.device)
    if kernels is not None and kernels.may_pack(source, low, high):
        return kernels.pack(source.detach(), low, high)
    return _pack_by_words(_mask(source, low, high).reshape(-1))


@cache
def _kernels(device: torch.device) -> Any:
    """Those for this device, if there are any (Triton comes with torch for CUDA) and they can be compiled."""
    if device.type != "cuda":
        return None
    try:
        from . import bits_triton

        bits_triton.unpack(bits_triton.pack(torch.ones(9, device=device), 0.0, None), [9], 1.0, 0.0, torch.float32)
    except Exception as error:
        warnings.warn(
            f"moonwalk: bits are packed by torch, which is slower; Triton does not run: {error}", stacklevel=2
        )
        return None
    return bits_triton


def _pack_by_numpy(flat: Tensor, masks: Callable[[Any], Sequence[Any]], count: int = 1) -> Tensor:
    """The bits of `count` masks, one mask after the other. They are made piece by piece: on a CPU that is several
    times faster than torch's own comparisons."""
    packed = torch.empty((flat.numel() + 7) // 8 * count, dtype=torch.uint8)
    values, rows = flat.numpy(), packed.numpy().reshape(count, -1)
    for start in range(0, len(values), CACHED):
        for row, mask in zip(rows, masks(values[start : start + CACHED]), strict=True):
            bits = np.packbits(mask, bitorder="little")
            row[start // 8 : start // 8 + len(bits)] = bits
    return packed


def _pack_by_words(flat: Tensor) -> Tensor:
    """Eight elements at a time, in the words of an int64 view."""
    if flat.storage_offset() % 8:  # a piece of a larger mask
        flat = flat.clone()
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def _mask(source: Any, low: float, high: float | None) -> Any:
    """Of a tensor or of an array."""
    if source.dtype in (torch.bool, np.bool_):
        return source
    above = source > low
    if high is not None:
        above &= source < high
    return above


@lru_cache(maxsize=64)
def _rows(high: float, low: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight values that each of the 256 bytes stands for; those of a byte each as one word."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    rows = torch.tensor([low, high], dtype=torch.float64)[bits].to(device=device, dtype=dtype)
    return rows.view(torch.int64).view(-1) if dtype.itemsize == 1 else rows


def _unpack(packed: Tensor, size: Sequence[int], high: float, low: float, dtype: torch.dtype) -> Tensor:
    """A table of rows is several times faster than shifting, comparing and filling."""
    kernels = _kernels(packed.device)
    if kernels is not None:
        return kernels.unpack(packed, size, high, low, dtype)
    found = _rows(high, low, dtype, packed.device).index_select(0, packed.int()).view(dtype).view(-1)
    count = math.prod(size)
    return (found if count == len(found) else found[:count]).view(size)


def _pack_signs(source: Tensor) -> Tensor:
    """Two bits per element: which are above zero, then which are neither above nor below."""
    flat = source.detach().reshape(-1)
    if source.device.type == "cpu" and source.dtype in BY_NUMPY:
        return _pack_by_numpy(flat, _above_and_level, 2)
    return torch.cat([_pack(mask) for mask in _above_and_level(flat)])


def _above_and_level(values: Any) -> tuple[Any, Any]:
    """Of a tensor or of an array."""
    above, level = values > 0, values < 0
    level |= above
    level ^= True
    return above, level


def _unpack_signs(packed: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    positive, level = packed.chunk(2)
    signs = _unpack(positive, size, 1.0, -1.0, dtype)
    on_cpu = packed.device.type == "cpu"
    if on_cpu and not level.any():  # as good as always; to ask another device would mean to wait for it
        return signs
    step = CACHED if on_cpu else max(8 * len(level), 8)
    for part, bits in zip(signs.view(-1).split(step), level.split(step // 8), strict=True):
        part.add_(_unpack(bits, [part.numel()], 1.0, 0.0, dtype))
    return signs


def _pieces(marks: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Which elements are marked, piece by piece: on a CPU, indexing by a mask takes 8 bytes per chosen element."""
    size = PIECE if marks.device.type == "cpu" else max(count, 1)
    for start in range(0, count, size):
        stop = min(start + size, count)
        packed = marks[start // 8 : (stop + 7) // 8]
        yield slice(start, stop), _unpack(packed, [stop - start], 1, 0, torch.uint8).view(torch.bool)


def _take_marked(source: Tensor, marks: Tensor, expected: float) -> Tensor:
    """The marked elements (a bit each), in order. How many they are is known at run time only: the planner counts
    with the `expected` part of all."""
    flat = source.reshape(-1)
    taken, end = source.new_empty(_count(marks, flat.numel())), 0
    for where, chosen in _pieces(marks, flat.numel()):
        part = flat[where][chosen]
        taken[end : end + len(part)] = part
        end += len(part)
    return taken


def _count(marks: Tensor, count: int) -> int:
    return sum(int(chosen.sum()) for _, chosen in _pieces(marks, count))


def _put_marked(target: Tensor, marks: Tensor, taken: Tensor) -> Tensor:
    """`target` with its marked elements replaced by those that were taken."""
    flat, end = target.clone(memory_format=torch.contiguous_format).view(-1), 0
    for where, chosen in _pieces(marks, flat.numel()):
        flat[where].masked_scatter_(chosen, taken[end:])
        end += int(chosen.sum())
    return flat.view(target.shape)


def _strict_sign(source: Tensor) -> Tensor:
    """1 above zero, else -1: as a sign packed into one bit comes back."""
    return torch.gt(source, 0, out=torch.empty_like(source)).mul_(2).sub_(1)


_library.impl("strict_sign", _strict_sign, "CompositeExplicitAutograd")
_library.impl("pack_signs", _pack_signs, "CompositeExplicitAutograd")
_library.impl("unpack_signs", _unpack_signs, "CompositeExplicitAutograd")
_library.impl("pack_bits", _pack, "CompositeExplicitAutograd")
_library.impl("unpack_two", _unpack, "CompositeExplicitAutograd")
_library.impl("take_marked", _take_marked, "CompositeExplicitAutograd")
_library.impl("put_marked", _put_marked, "CompositeExplicitAutograd")


@register_fake("moonwalk_compile::pack_bits")
def _pack_fake(source: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    return source.new_empty((source.numel() + 7) // 8, dtype=torch.uint8)


@register_fake("moonwalk_compile::pack_signs")
def _pack_signs_fake(source: Tensor) -> Tensor:
    return source.new_empty((source.numel() + 7) // 8 * 2, dtype=torch.uint8)


@register_fake("moonwalk_compile::unpack_signs")
def _unpack_signs_fake(packed: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return packed.new_empty(list(size), dtype=dtype)


@register_fake("moonwalk_compile::strict_sign")
def _strict_sign_fake(source: Tensor) -> Tensor:
    return torch.empty_like(source)


@register_fake("moonwalk_compile::unpack_two")
def _unpack_fake(packed: Tensor, size: Sequence[int], high: float, low: float, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(list(size), dtype=dtype)


@register_fake("moonwalk_compile::take_marked")
def _take_fake(source: Tensor, marks: Tensor, expected: float) -> Tensor:
    return source.new_empty(math.ceil(source.numel() * expected))


@register_fake("moonwalk_compile::put_marked")
def _put_fake(target: Tensor, marks: Tensor, taken: Tensor) -> Tensor:
    return target.new_empty(target.shape)


pack_bits = torch.ops.moonwalk_compile.pack_bits
pack_signs = torch.ops.moonwalk_compile.pack_signs
unpack_signs = torch.ops.moonwalk_compile.unpack_signs
strict_sign = torch.ops.moonwalk_compile.strict_sign
take_marked = torch.ops.moonwalk_compile.take_marked
put_marked = torch.ops.moonwalk_compile.put_marked
unpack_two = torch.ops.moonwalk_compile.unpack_two
PACKING = (pack_bits.default, pack_signs.default)
UNPACKING = (unpack_two.default, unpack_signs.default)
