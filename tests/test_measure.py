"""Peaks are checked to the byte on steps whose allocations are known."""

import gc
import math

import pytest
import torch
from torch import nn

from moonwalk_compile.measure import Timing, compare_steps, gradient_error, gradients, measure_step, time_interleaved

KB = 1024


def bytes_tensor(n):
    return torch.empty(n, dtype=torch.uint8)


def test_nothing_allocated():
    measured = measure_step(lambda: None)
    assert (measured.peak_bytes, measured.timeline) == (0, ())


def test_peak_and_timeline_are_exact():
    def step():
        a = bytes_tensor(10 * KB)
        b = bytes_tensor(5 * KB)
        del a
        c = bytes_tensor(7 * KB)
        del b
        del c

    measured = measure_step(step)
    assert measured.timeline == (10 * KB, 15 * KB, 5 * KB, 12 * KB, 7 * KB, 0)
    assert measured.peak_bytes == 15 * KB
    assert measured.seconds > 0


def test_views_and_in_place_operations_cost_nothing():
    base = torch.ones(KB)
    assert measure_step(lambda: base.view(32, 32).t().mul_(2)).peak_bytes <= 16  # at most the wrapped number


def test_a_tensor_from_before_is_not_counted_when_freed():
    held = [bytes_tensor(100 * KB)]

    def step():
        held.clear()
        held.append(bytes_tensor(3 * KB))

    assert measure_step(step).timeline == (3 * KB,)


def test_a_tensor_from_an_earlier_measurement_is_not_counted_when_freed():
    held = []
    measure_step(lambda: held.append(bytes_tensor(100 * KB)))

    def step():
        held.clear()
        return bytes_tensor(3 * KB)

    assert measure_step(step).peak_bytes == 3 * KB


def test_an_address_used_again_after_an_earlier_measurement():
    held = []
    measure_step(lambda: held.append(bytes_tensor(100 * KB)))
    held.clear()  # unseen by the profiler, which still believes that 100 KiB live at this address
    held.append(bytes_tensor(100 * KB))

    def step():
        grown = bytes_tensor(8 * KB)
        held.clear()
        return grown, bytes_tensor(4 * KB)

    assert measure_step(step).peak_bytes == 12 * KB


def test_backward_of_a_chain():
    x = torch.ones(KB, requires_grad=True)

    def step():
        x.exp().exp().sum().backward()

    measured = measure_step(step)
    # exp keeps its output, 4 KiB each; backward then holds both and one cotangent; sum and its gradient are 4 bytes.
    assert 12 * KB <= measured.peak_bytes <= 12 * KB + 16
    assert measured.timeline[-1] == 4 * KB  # the gradient


def test_gradient_accumulation_hides_bytes():
    layer = nn.Linear(64, 64)
    x = torch.ones(1, 64)
    fresh = measure_step(lambda: layer(x).sum().backward())
    assert fresh.timeline[-1] == sum(4 * p.numel() for p in layer.parameters())
    assert measure_step(lambda: layer(x).sum().backward()).timeline[-1] == 0


def test_measuring_twice_gives_the_same():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))
    x = torch.randn(128, 64)

    def step():
        model(x).square().mean().backward()

    first = measure_step(step)
    model.zero_grad(set_to_none=True)
    assert measure_step(step).timeline == first.timeline


def test_the_collector_leaves_old_objects_alone_while_steps_are_timed():
    before, during = gc.get_freeze_count(), []
    time_interleaved({"step": lambda: during.append(gc.get_freeze_count())}, repeats=1, warmup=0)
    with pytest.raises(ZeroDivisionError):
        time_interleaved({"step": lambda: 1 / 0}, repeats=1)
    assert during[0] > before == gc.get_freeze_count()


def test_interleaved_order_and_counts():
    calls = []
    timings = time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert "".join(calls) == "ab" * 5
    assert timings["a"].ratio == 1
    assert all(len(t.samples) == 3 and t.seconds > 0 for t in timings.values())
    assert timings["b"].ratio_to(timings["a"]) == timings["b"].ratio


def test_ratio_is_the_median_of_pairs():
    assert Timing(2.0, 1.0, (2.0, 8.0, 3.0)).ratio_to(Timing(1.0, 1.0, (1.0, 2.0, 3.0))) == 2


def test_the_interval_of_a_ratio_leaves_out_what_single_runs_may_show():
    def timing(*samples):
        return Timing(1.0, 1.0, tuple(float(s) for s in samples))

    assert timing(3, 9, 1).interval_to(timing(1, 1, 1)) == (1, 9)
    assert timing(*range(9, 0, -1)).interval_to(timing(*[1] * 9)) == (2, 8)  # fewer than 2 of 9: 2.0% on either side
    assert timing(*range(25)).interval_to(timing(*[2] * 25)) == (3.5, 8.5)  # fewer than 8 of 25: 2.2%


@pytest.mark.parametrize("arguments", [{"steps": {}}, {"steps": {"a": int}, "repeats": 0}])
def test_nothing_to_time(arguments):
    with pytest.raises(ValueError, match="at least one"):
        time_interleaved(**arguments)


def test_gradient_error_is_relative_and_the_maximum():
    reference = {"a": torch.full((4,), 2.0), "b": torch.full((4,), 1.0)}
    assert gradient_error(reference, reference) == 0
    actual = {"a": reference["a"] * 1.01, "b": reference["b"] * 1.1}
    assert gradient_error(actual, reference) == pytest.approx(0.1, rel=1e-5)


def test_gradient_error_of_complex_gradients():
    reference = {"a": torch.full((4,), 3 + 4j), "b": torch.full((4,), 1.0)}
    assert gradient_error(reference, reference) == 0
    assert gradient_error({**reference, "a": reference["a"] + 0.5j}, reference) == pytest.approx(0.1, rel=1e-5)


def test_gradient_error_of_a_zero_gradient_is_relative_to_its_share():
    reference = {"a": torch.full((300,), 2.0), "b": torch.zeros(100)}
    actual = {"a": reference["a"], "b": torch.full((100,), 1e-6)}
    share = math.sqrt(100 / 400) * (2 * math.sqrt(300))
    assert gradient_error(actual, reference) == pytest.approx(1e-5 / (1e-3 * share), rel=1e-5)


@pytest.mark.parametrize(
    "actual",
    [
        {"a": None},
        {},
        {"a": torch.ones(3)},
        {"a": torch.tensor([1.0, math.nan])},
        {"a": torch.ones(2), "b": torch.ones(1)},
    ],
)
def test_gradient_error_of_a_mismatch_is_infinite(actual):
    assert gradient_error(actual, {"a": torch.ones(2), "b": None}) == math.inf


def test_gradient_error_of_all_zero_gradients():
    assert gradient_error({"a": torch.zeros(2)}, {"a": torch.zeros(2)}) == 0
    assert gradient_error({"a": torch.ones(2)}, {"a": torch.zeros(2)}) == math.inf


def test_unused_parameters_agree():
    assert gradient_error({"a": None}, {"a": None}) == 0


def square(model, x):
    return model(x).square().mean()


def test_compare_steps_of_equal_models_with_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    before = torch.random.get_rng_state()
    comparison = compare_steps(model, model, square, [torch.ones(4, 8)])
    assert comparison.exact
    assert comparison.gradient_error == comparison.loss_error == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(g is None for g in gradients(model).values())


def test_compare_steps_sees_a_difference():
    model, reference = nn.Linear(8, 8), nn.Linear(8, 8)
    comparison = compare_steps(model, reference, square, [torch.ones(4, 8)])
    assert not comparison.exact
    assert comparison.gradient_error > 0.01
    assert comparison.loss_error > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak():
    def step():
        a = torch.empty(4 << 20, dtype=torch.uint8, device="cuda")
        b = torch.empty(2 << 20, dtype=torch.uint8, device="cuda")
        del a, b

    assert measure_step(step, device="cuda").peak_bytes == 6 << 20
