"""One bit per element, there and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonwalk_compile.passes.bits import CACHED, pack_bits, pack_signs, strict_sign, unpack_signs, unpack_two

shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3)
quick = settings(max_examples=50, deadline=None, derandomize=True)


def drawn(shape: list[int], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_levels_are_exact_in_double_precision() -> None:
    found = unpack_two(pack_bits(torch.tensor([True, False])), [2], 0.1, 0.7, torch.float64)
    assert found.tolist() == [0.1, 0.7]


@quick
@given(shapes, st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.bool]))
def test_round_trip(shape: list[int], seed: int, dtype: torch.dtype) -> None:
    mask = drawn(shape, seed)
    packed = pack_bits(mask)
    assert (packed.dtype, packed.shape) == (torch.uint8, ((mask.numel() + 7) // 8,))
    high, low = (1, 0) if dtype == torch.bool else (2.0, -0.5)
    found = unpack_two(packed, shape, high, low, dtype)
    assert found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found, torch.where(mask, high, low).to(dtype))


@quick
@given(shapes, st.integers(0, 1000))
def test_a_strided_mask_is_packed_in_its_logical_order(shape: list[int], seed: int) -> None:
    mask = drawn([*shape, 3], seed).transpose(0, -1)
    assert torch.equal(unpack_two(pack_bits(mask), list(mask.shape), 1, 0, torch.bool), mask)


def test_bits_are_packed_from_the_lowest():
    mask = torch.zeros(16, dtype=torch.bool)
    mask[0] = mask[9] = True
    assert pack_bits(mask).tolist() == [1, 2]


def test_the_last_byte_is_filled_with_zeros():
    assert pack_bits(torch.ones(11, dtype=torch.bool)).tolist() == [255, 7]


def test_numbers_are_packed_by_the_side_that_they_are_on():
    source = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, math.inf, math.nan, -math.inf])
    assert pack_bits(source).tolist() == [0b00111100]
    assert pack_bits(source, 0.5).tolist() == [0b00111000]
    assert pack_bits(source, 0.0, 2.0).tolist() == [0b00001100]
    assert pack_bits(torch.tensor([0, 1, 1])).tolist() == [6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [CACHED - 1, 2 * CACHED + 3])
def test_large_tensors_are_packed_like_small_ones(count: int, dtype: torch.dtype) -> None:
    source = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    inside = (source > -0.5) & (source < 0.25)
    assert torch.equal(pack_bits(source, -0.5, 0.25), pack_bits(inside))
    assert torch.equal(unpack_two(pack_bits(source, -0.5, 0.25), [count], 1, 0, torch.bool), inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_strict_sign_has_no_zero(dtype: torch.dtype) -> None:
    source = torch.tensor([-2.0, -0.0, 0.0, 3.0], dtype=dtype)
    found = strict_sign(source)
    assert found.dtype == dtype and found.tolist() == [-1, -1, -1, 1]
    assert source.tolist() == [-2, 0, 0, 3]  # not in place


def test_a_strict_sign_is_what_a_packed_sign_comes_back_as():
    source = torch.randn(100, generator=torch.Generator().manual_seed(0)).round()
    assert (source == 0).any()
    packed = unpack_two(pack_bits(source > 0), [100], 1.0, -1.0, torch.float32)
    assert torch.equal(strict_sign(source), packed)


@pytest.mark.parametrize("shape", [(3, 5), (8,), ()])
def test_fakes_agree_with_the_real_ones(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    packed = pack_bits(mask)
    on_meta = pack_bits(mask.to("meta"))
    assert (on_meta.shape, on_meta.dtype) == (packed.shape, packed.dtype)
    unpacked = unpack_two(on_meta, list(shape), 1.0, -1.0, torch.float16)
    assert (unpacked.shape, unpacked.dtype) == (torch.Size(shape), torch.float16)
    assert strict_sign(torch.ones(shape, device="meta")).shape == shape


@pytest.mark.parametrize("start", [1, 3, 8])
def test_a_piece_of_a_larger_mask_is_packed(start: int) -> None:
    mask = drawn([40], 0)[start:]
    assert torch.equal(unpack_two(pack_bits(mask), list(mask.shape), 1, 0, torch.bool), mask)


@pytest.mark.parametrize("count", [0, 1, 8, 9, 2 * CACHED + 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_are_exact_at_zero(count: int, dtype: torch.dtype) -> None:
    x = torch.randn(count, dtype=dtype)
    x[::3] = 0
    packed = pack_signs(x)
    assert (packed.dtype, packed.shape) == (torch.uint8, (2 * ((count + 7) // 8),))
    assert torch.equal(unpack_signs(packed, [count], dtype), x.sgn())
