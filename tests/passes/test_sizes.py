"""What allocators take."""

from __future__ import annotations

import math

import pytest
import torch

from moonwalk_compile.passes import sizes
from moonwalk_compile.passes.sizes import advice, allocated, left_unused, promised, storage_bytes

MIB = 1 << 20
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def usual_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "expandable", lambda: False)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (0, 0),
        (1, 512),
        (512, 512),
        (MIB - 1, MIB),
        (MIB + 512, MIB + 512 + (20 * MIB - 19 * (MIB + 512)) // 19),  # 19 in a segment, which they fill
        (6 * MIB, 6 * MIB),  # three leave two mebibytes, which are split off
        (10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB),
        (11 * MIB - 512, 11 * MIB - 512),  # more than a mebibyte is left
    ],
)
def test_what_is_asked_for_and_taken(asked: int, taken: int) -> None:
    assert allocated(asked, CUDA) == taken
    assert allocated(asked, CPU) == asked


def test_room_for_what_is_left_unsplit() -> None:
    assert promised(1000, [CPU, CUDA]) == 1010 and promised(1000, [CPU]) == 1000
    assert left_unused(1010, [CPU, CUDA]) == 10 and left_unused(1010, [CPU]) == left_unused(math.inf, [CUDA]) == 0
    assert "expandable_segments" in advice([CPU, CUDA]) and not advice([CPU])


def test_segments_that_grow_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "expandable", lambda: True)
    assert allocated(11 * MIB + 1, CUDA) == 11 * MIB + 512 and promised(1000, [CUDA]) == 1000
    assert left_unused(1010, [CUDA]) == 0 and not advice([CUDA])


@pytest.mark.parametrize("peak", [1, 99, 100, 101, 10**9 + 1, 10**11 + 7])
def test_a_promised_budget_leaves_the_peak(peak: int) -> None:
    budget = promised(peak, [CUDA])
    assert peak < budget and budget - left_unused(budget, [CUDA]) == peak


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_are_read(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes.expandable.cache_clear()
    monkeypatch.setenv(variable, "backend:native, expandable_segments: True")
    assert sizes.expandable()
    sizes.expandable.cache_clear()


def test_storages() -> None:
    whole = torch.empty(3, 100)
    assert storage_bytes(whole) == storage_bytes(whole[1]) == 1200
    assert storage_bytes(7) == 0
