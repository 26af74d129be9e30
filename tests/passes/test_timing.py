"""Operations timed by trial, and remembered on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moonwalk_compile.passes import timing
from moonwalk_compile.passes.cost import DEVICES, operation_seconds
from moonwalk_compile.passes.graph import Operation, Ref
from moonwalk_compile.passes.timing import Clock, measured_seconds, read
from moonwalk_compile.passes.trials import Like, frozen_call

aten = torch.ops.aten


def operation(target: object, *tensors: torch.Tensor) -> Operation:
    call = (target, *frozen_call(tensors, {}))
    return Operation(target, tuple(Ref(i) for i in range(len(tensors))), new=(4,), call=call)


def product(size: int) -> Operation:
    return operation(aten.mm.default, torch.empty(size, size), torch.empty(size, size))


def test_more_work_takes_longer(tmp_path: Path) -> None:
    clock = Clock(fused=False, folder=tmp_path)
    small, large = clock(product(8)), clock(product(768))
    assert small is not None and large is not None and 0 < small < large


def test_an_operation_is_measured_once_and_remembered_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Clock(fused=False, folder=tmp_path)
    found = first(product(16))
    first.save()
    (path,) = tmp_path.iterdir()
    assert list(read(path).values()) == [found]
    monkeypatch.setattr(timing, "measured_seconds", lambda *_: pytest.fail("measured again"))
    assert first(product(16)) == found
    assert Clock(fused=False, folder=tmp_path)(product(16)) == found


def test_another_shape_or_release_is_another_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(fused=False, folder=tmp_path)
    clock(product(16))
    clock(product(17))
    assert len(clock.found) == 2
    clock.save()
    monkeypatch.setattr(torch, "__version__", "3.0")
    other = Clock(fused=False, folder=tmp_path)
    other(product(16))
    assert len(other.found) == 1


def test_a_damaged_memory_is_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("", "[1]", '{"a": "fast"}'):
        path.write_text(text)
        assert read(path) == {}
    assert read(tmp_path / "missing.json") == {}


def test_what_cannot_be_tried_counts_by_the_table(tmp_path: Path) -> None:
    clock = Clock(fused=False, folder=tmp_path)
    wrong = operation(aten.mm.default, torch.empty(2, 3), torch.empty(2, 3))
    assert clock(wrong) is None
    assert clock(Operation("item", ())) is None
    assert Clock(fused=False, limit=10, folder=tmp_path)(product(64)) is None
    device = DEVICES["cuda"]
    assert operation_seconds(wrong, replace(device, clock=clock)) == operation_seconds(wrong, device)
    timed = replace(device, clock=lambda *_: 7.0)
    assert operation_seconds(product(4), timed) == 7.0


def test_in_a_fused_loop_pointwise_operations_take_what_the_table_says(tmp_path: Path) -> None:
    pointwise = operation(aten.exp.default, torch.empty(64))
    assert Clock(fused=True, folder=tmp_path)(pointwise) is None
    assert Clock(fused=False, folder=tmp_path)(pointwise) is not None
    assert Clock(fused=True, folder=tmp_path)(product(8)) is not None


def gradients(channels: int, size: int, cotangent: torch.Tensor | None = None) -> Operation:
    """Of a depthwise convolution, from images as they are by default."""
    images = torch.empty(2, channels, size, size)
    cotangent = images if cotangent is None else cotangent
    rest = (None, [1, 1], [3, 3], [1, 1], False, [0, 0], channels, [True, True, False])
    call = (
        aten.convolution_backward.default,
        *frozen_call((cotangent, images, torch.empty(channels, 1, 7, 7), *rest), {}),
    )
    return Operation(aten.convolution_backward.default, (), new=(4,), flops=1e9, call=call)


def test_without_a_folder_only_large_convolutions_are_timed() -> None:
    clock = Clock(fused=False)
    assert clock(product(8)) is None
    found = clock(gradients(4, 8))
    assert found is not None and found > 0
    assert Clock(fused=False, limit=10)(gradients(4, 8)) is None
    assert clock(replace(gradients(4, 8), flops=1e3)) is None
    assert Clock(fused=False)(gradients(4, 8)) == found  # once in a process
    clock.save()


def test_where_loops_are_fused_images_are_tried_as_they_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(timing, "measured_seconds", lambda call, *_: tried.append(call[1]) or float(len(tried)))
    last, first = (432, 1, 72, 12), (432, 36, 6, 1)
    ours = replace(DEVICES["cpu"], fused=True, clock=Clock(fused=True))
    operation = gradients(12, 6)
    assert [operation_seconds(operation, device) for device in (ours, ours.plain, ours)] == [1.0, 1.0, 1.0]
    permuted = gradients(12, 6, torch.empty(2, 6, 6, 12).permute(0, 3, 1, 2))
    assert [operation_seconds(permuted, device) for device in (ours, ours.plain, ours)] == [1.0, 2.0, 1.0]
    assert [(args[0].stride, args[1].stride) for args in tried] == [(last, last), (last, first)]
    assert [args[2].stride for args in tried] == [(49, 49, 7, 1)] * 2
    forward = (aten.convolution.default, *frozen_call((torch.empty(2, 12, 6, 6), torch.empty(12, 1, 7, 7)), {}))
    for as_plain in (False, True):  # plain `torch.compile` lays these out too
        Clock(fused=True)(Operation(aten.convolution.default, (), new=(4,), flops=1e9, call=forward), as_plain)
        assert tried[-1][0].stride == last
    Clock(fused=False)(operation)
    assert tried[-1][0].stride == first


def test_what_draws_takes_as_long_as_its_numbers() -> None:
    device = replace(DEVICES["cpu"], bandwidth=1e12, overhead=0.0, random=8.0)
    drawn = replace(operation(aten.native_dropout.default, torch.empty(8)), new=(32, 8))
    assert operation_seconds(drawn, device) == 10 / 8.0
    replayed = replace(operation(aten.mul.Tensor, torch.empty(8)), new=(32,), moved=64)
    assert operation_seconds(replayed, device) < 1e-9


def test_random_numbers_stay_where_they_are() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    likes, _ = frozen_call((torch.empty(8),), {})
    assert isinstance(likes[0], Like)
    assert measured_seconds((aten.bernoulli.default, likes, ())) is not None
    assert torch.equal(torch.rand(1), expected)
