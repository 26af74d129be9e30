"""How many bytes an allocator takes for a tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, device

CUDA_BLOCK = 512  # torch's caching allocator hands out multiples of it


def storage_bytes(value: Any) -> int:
    """Of a (fake) tensor's storage; zero for anything else, such as a symbolic integer."""
    return allocated(int(value.untyped_storage().nbytes()), value.device) if isinstance(value, Tensor) else 0


def allocated(size: int, place: device) -> int:
    """Bytes taken where `size` are asked for."""
    return -(-size // CUDA_BLOCK) * CUDA_BLOCK if place.type == "cuda" else size
