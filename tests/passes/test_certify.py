"""Certificates of chains whose noise is known, and how they are composed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moonwalk_compile.passes.certificates import Certificate, chain_error, reach
from moonwalk_compile.passes.certify import TIES, State, _Link, measure_chain
from moonwalk_compile.passes.emit import Segment

SIZE = 1000


def signal() -> Tensor:
    """All of it in the first element, so that noise in the others does not move it."""
    start = torch.zeros(SIZE, dtype=torch.float64)
    start[0] = 100.0
    return start


def scaling(block: int, factor: float, inexact: float = 0.0) -> _Link:
    """`recover` multiplies everything but the signal by `factor`; `apply` undoes it, but for a relative `inexact`."""
    rates = torch.full((SIZE,), factor, dtype=torch.float64)
    rates[0] = 1.0

    def recover(state: State) -> State:
        return {0: state[0] * rates}

    def apply(state: State, before: State) -> State:
        return {0: state[0] / rates * (1 + inexact)}

    return _Link(block, recover, apply, (0,))


def measured(links: list[_Link]) -> list[tuple[int, Certificate]]:
    start = {0: signal()}
    return list(measure_chain(links, start, start))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 10.0])
def test_growth_is_what_recovering_does_to_noise(factor: float) -> None:
    found = measured([scaling(block, factor) for block in (4, 3, 2)])
    assert [block for block, _ in found] == [4, 3, 2]
    for _, certificate in found:
        assert certificate.growth == pytest.approx(factor, rel=0.05)
        assert certificate.local < 1e-12


def test_the_local_error_is_what_recovering_twice_shows():
    start = {0: torch.ones(SIZE, dtype=torch.float64)}
    ((_, certificate),) = measure_chain([scaling(0, 1.0, inexact=1e-3)], start, start)
    assert certificate.local == pytest.approx(1e-3, rel=0.05)
    assert certificate.growth == pytest.approx(1.0, rel=0.01)


def test_the_probe_is_carried_and_not_redrawn():
    """The second operator blows up just what the first lets through: a fresh probe would see growth near 1."""
    keeps = torch.zeros(SIZE, dtype=torch.float64)
    keeps[:2] = 1.0
    blows = torch.ones(SIZE, dtype=torch.float64)
    blows[1] = 50.0

    def link(block: int, rates: Tensor) -> _Link:
        return _Link(block, lambda state: {0: state[0] * rates}, lambda state, before: state, (0,))

    (_, first), (_, second) = measured([link(1, keeps), link(0, blows)])
    assert first.growth < 0.2
    assert second.growth > 10


def test_values_that_are_not_finite_give_no_certificate():
    link = _Link(0, lambda state: {0: state[0] / 0.0}, lambda state, before: state, (0,))
    ((_, certificate),) = measured([link])
    assert certificate == Certificate(math.inf, math.inf)


def test_a_few_ties_are_no_noise_but_many_are():
    """Elements that come back with the other sign, as those on a kink do."""

    def link(count: int) -> _Link:
        flip = torch.ones(SIZE, dtype=torch.float64)
        flip[1 : 1 + count] = -1.0
        return _Link(0, lambda state: {0: state[0] * flip}, lambda state, before: {0: state[0] / flip.abs()}, (0,))

    def local(count: int) -> float:
        start = {0: torch.ones(SIZE, dtype=torch.float64)}
        ((_, certificate),) = measure_chain([link(count)], start, start)
        return certificate.local

    allowed = math.ceil(TIES * SIZE)
    assert local(allowed) < 1e-12
    assert local(allowed + 1) > 0.01


def test_what_one_sample_or_stream_suffers_is_not_averaged():
    """A gradient may depend on it alone: a small stream beside a large one, one sample of many."""
    shapes = {0: (100, 64), 1: (100, 64)}
    start = {value: torch.full(shape, 10.0**-value, dtype=torch.float64) for value, shape in shapes.items()}

    def link(value: int, sample: slice) -> _Link:
        def apply(state: State, before: State) -> State:
            hurt = state[value].clone()
            hurt[sample] *= 1 + 1e-3
            return {**state, value: hurt}

        return _Link(0, lambda state: dict(state), apply, (0, 1))

    for found in (link(1, slice(None)), link(0, slice(7, 8))):
        ((_, certificate),) = measure_chain([found], start, start)
        assert certificate.local == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(("off", "factor"), [(1e-3, 1.0), (0.0, 50.0)])
def test_what_is_solved_on_the_way_counts(off: float, factor: float) -> None:
    """Gradients read it: it may be off, or more sensitive, where the values at the borders are not."""
    base = {0: torch.ones(100, 4, dtype=torch.float64)}

    def recover(state: State) -> State:
        return {0: state[0], 1: base[0] + factor * (state[0] - base[0])}

    def apply(state: State, before: State) -> State:
        return {0: state[0], 1: recover(state)[1] * (1 + off)}

    ((_, certificate),) = measure_chain([_Link(0, recover, apply, (0,), (1,))], base, base)
    assert certificate.local == pytest.approx(off, rel=0.05, abs=1e-12)
    assert certificate.growth == pytest.approx(factor, rel=0.05)


def test_samples_that_are_nearly_zero_do_not_count_as_much():
    start = {0: torch.ones(100, 4, dtype=torch.float64)}
    start[0][7] = 1e-12

    def apply(state: State, before: State) -> State:
        return {0: state[0] + 1e-6}

    ((_, certificate),) = measure_chain([_Link(0, lambda state: dict(state), apply, (0,))], start, start)
    assert certificate.local == pytest.approx(1e-5, rel=0.1)


def test_noise_that_a_block_adds_is_followed_from_there():
    """The first block damps what was drawn just where the second one amplifies, and adds noise of its own there."""
    some = torch.zeros(SIZE, dtype=torch.float64)
    some[1:21] = 1.0
    damps, blows = 1 - 0.99 * some, 1 + 99 * some
    first = _Link(1, lambda s: {0: s[0] * damps}, lambda s, before: {0: (s[0] + 1e-4 * some) / damps}, (0,))
    second = _Link(0, lambda s: {0: s[0] * blows}, lambda s, before: {0: s[0] / blows}, (0,))
    _, (_, certificate) = measured([first, second])
    assert certificate.growth > 50


# -- composition -----------------------------------------------------------------------------------------------------


def error(strategy: str, *certificates: tuple[float, float]) -> float:
    """Of a segment over all blocks, given (local, growth) of each in forward order."""
    found = {(strategy, index): Certificate(*pair) for index, pair in enumerate(certificates)}
    return chain_error(Segment(0, len(certificates) - 1, strategy, frozenset()), found)


def test_one_block_adds_its_local_error():
    assert error("invert", (3e-6, 9.0)) == pytest.approx(3e-6)
    assert error("moonwalk", (3e-6, 9.0)) == pytest.approx(3e-6)


def test_inversion_carries_noise_from_the_last_block_to_the_first():
    assert error("invert", (0.0, 5.0), (2e-6, 1.0)) == pytest.approx(1e-5)
    assert error("invert", (0.0, 3.0), (0.0, 5.0), (2e-6, 1.0)) == pytest.approx(3e-5)
    assert error("invert", (2e-6, 5.0), (0.0, 1.0)) == pytest.approx(2e-6)
    assert error("invert", (3e-6, 2.0), (2e-6, 7.0)) == pytest.approx(5e-6)  # hypot(2 * 2, 3)


def test_moonwalk_carries_noise_from_the_first_block_to_the_last():
    assert error("moonwalk", (2e-6, 1.0), (0.0, 5.0)) == pytest.approx(1e-5)
    assert error("moonwalk", (0.0, 1.0), (2e-6, 5.0)) == pytest.approx(2e-6)
    assert error("moonwalk", (2e-6, 1.0), (0.0, 5.0), (0.0, 3.0)) == pytest.approx(3e-5)
    assert error("moonwalk", (2e-6, 7.0), (3e-6, 2.0)) == pytest.approx(5e-6)


@pytest.mark.parametrize("strategy", ["invert", "moonwalk"])
def test_errors_that_do_not_grow_add_up_as_independent_ones(strategy: str) -> None:
    assert error(strategy, *[(1e-6, 1.0)] * 16) == pytest.approx(4e-6)


@pytest.mark.parametrize("strategy", ["invert", "moonwalk"])
def test_noise_that_dies_out_is_remembered_at_its_worst(strategy: str) -> None:
    pairs = [(1e-6, 0.0), (1e-5, 0.0)] if strategy == "invert" else [(1e-5, 0.0), (1e-6, 0.0)]
    assert error(strategy, *pairs) >= 1e-5


noises = st.tuples(st.floats(0, 2e-5), st.floats(0, 3)).map(lambda pair: Certificate(*pair))


@settings(deadline=None, derandomize=True)
@given(st.lists(noises, min_size=1, max_size=6))
def test_a_chain_reaches_as_far_as_its_error_allows(certificates: list[Certificate]) -> None:
    pairs = [(block.local, block.growth) for block in certificates]
    allowed = [
        length for length in range(len(pairs) + 1) if not length or error("invert", *pairs[:length]) <= 1.2345e-5
    ]
    assert reach(certificates, 1.2345e-5) == max(allowed)
    assert allowed == list(range(max(allowed) + 1))
    assert reach(certificates, math.inf) == len(pairs)


@pytest.mark.parametrize("strategy", ["invert", "moonwalk"])
def test_a_missing_certificate_means_no_bound(strategy: str) -> None:
    segment = Segment(0, 1, strategy, frozenset())
    assert chain_error(segment, {(strategy, 0): Certificate(0.0, 1.0)}) == math.inf


@pytest.mark.parametrize("strategy", ["invert", "moonwalk"])
def test_what_is_not_a_number_is_not_trusted(strategy: str) -> None:
    certificates = {(strategy, 0): Certificate(1e-7, 1.0), (strategy, 1): Certificate(math.nan, 1.0)}
    assert chain_error(Segment(0, 1, strategy, frozenset()), certificates) == math.inf


def test_nothing_is_certified_behind_the_point_where_noise_drowns_the_values():
    """There, growth would be measured on noise, which looks stable, and the next plan would trust it."""
    start = {0: torch.ones(SIZE, dtype=torch.float64)}
    drowning = [scaling(block, 1.0, inexact=4e-3) for block in range(9, -1, -1)]
    found = [block for block, _ in measure_chain(drowning, start, start)]
    assert found == [9, 8, 7, 6, 5, 4, 3]  # the seventh time, 4e-3 has added up to more than 1e-2
