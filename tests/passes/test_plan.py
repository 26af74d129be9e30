"""The planner against brute force, on small chains drawn at random."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonwalk_compile.passes.certificates import Certificate, chain_error
from moonwalk_compile.passes.emit import Segment
from moonwalk_compile.passes.liveness import Timeline
from moonwalk_compile.passes.moves import Move
from moonwalk_compile.passes.moves.keeping import RUNS
from moonwalk_compile.passes.plan import Planner
from moonwalk_compile.passes.planned import Planned
from moonwalk_compile.passes.solutions import Facts
from moonwalk_compile.passes.verify import verify

from .hand import Layer, chain

some = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 30)


@st.composite
def layers_drawn(draw: st.DrawFn) -> Layer:
    """No wider at its end than inside, so that the cuts fall between layers."""
    outer = draw(sizes)
    inner = outer + draw(st.integers(0, 30))
    inverse, vijp, result = (draw(st.booleans()) for _ in range(3))
    return Layer(inner, outer, draw(st.integers(1, 20)), inverse, vijp, result)


layers = layers_drawn()
chains = st.lists(layers, min_size=1, max_size=5)
fractions = st.floats(0.1, 1.3)


def planner_of(drawn: list[Layer], **options: object) -> Planner:
    return Planner(Facts(chain(drawn)), **options)  # type: ignore[arg-type]


def every_move(planner: Planner, last: int) -> Iterator[Move]:
    """Every segment that ends at `last`; inverted chains are joined from their blocks."""
    yield from (move for move in planner.moves[last] if move.segment.strategy != "invert")
    firsts = (first for first in range(last + 1) if planner.maker.chains.reach[first] >= last)
    yield from (planner.maker.chains.inversion(first, last) for first in firsts)


def segmentations(planner: Planner, last: int) -> Iterator[list[Move]]:
    """Every chain of moves that covers the blocks 0 to `last`."""
    if last < 0:
        yield []
        return
    for move in every_move(planner, last):
        for before in segmentations(planner, move.segment.first - 1):
            yield [*before, move]


def modelled(planner: Planner, moves: list[Move]) -> tuple[float, float]:
    """Peak bytes and added seconds of a chain by the additive model; infinite where neighbours do not fit together."""
    kept = peak = seconds = 0.0
    covered = anchor = False
    for move in moves:
        cost, last = move.cost, move.segment.last
        if anchor and not cost.covers_in:
            return math.inf, math.inf  # an inverted segment starts from what the next one keeps at its border
        if covered:
            kept -= cost.border_in  # what is at this border has been counted already
        backward = cost.backward_peak + planner.later_gradients[last] + planner.base
        peak = max(peak, kept + max(cost.forward_peak, backward))
        kept += cost.own + cost.border_in
        seconds += cost.seconds
        covered, anchor = cost.covers_out, move.segment.strategy == "invert"
    outputs = set(planner.analysis.graph.output_values)
    if anchor and not set(planner.analysis.blocks[-1].live_out) <= outputs:
        return math.inf, math.inf
    return peak, seconds


@some
@given(chains, st.integers(1, 5))
def test_the_dynamic_program_equals_brute_force(drawn: list[Layer], longest: int) -> None:
    """Inverted chains may have `longest` blocks before their error is too large."""
    noise = certified(len(drawn), Certificate(1.0, 1.0))
    planner = planner_of(drawn, certificates=noise, tolerance=math.sqrt(longest) + 1e-6)
    every = [modelled(planner, moves) for moves in segmentations(planner, len(drawn) - 1)]
    peaks = sorted({peak for peak, _ in every if math.isfinite(peak)})
    for budget in [peaks[0] - 1, *peaks[:: max(1, len(peaks) // 8)], peaks[-1]]:
        best = min((seconds for peak, seconds in every if peak <= budget), default=None)
        moves = planner.fastest(budget)
        if best is None:
            assert moves is None
        else:
            assert moves is not None
            peak, seconds = modelled(planner, moves)
            assert peak <= budget
            assert seconds == pytest.approx(best)


@some
@given(chains)
def test_the_moves_are_all_that_is_possible(drawn: list[Layer]) -> None:
    """Each span as a checkpoint; each run of invertible blocks as an inversion; each block kept, and some runs."""
    planner = planner_of(drawn)
    spans = [(first, last) for last in range(len(drawn)) for first in range(last + 1)]
    found: dict[str, set[tuple[int, int]]] = {}
    for last in range(len(drawn)):
        for move in every_move(planner, last):
            found.setdefault(move.segment.strategy, set()).add((move.segment.first, move.segment.last))
    assert found["checkpoint"] == set(spans)
    singles = {(index, index) for index in range(len(drawn))}
    assert singles <= found["keep"] <= singles | {(a, b) for a, b in spans if b - a + 1 in RUNS}
    # The first block's input is the step's own: there is nothing to solve for.
    runs = {(a, b) for a, b in spans if a and all(layer.inverse for layer in drawn[a : b + 1])}
    assert found.get("invert", set()) == runs
    dry = {i for i, layer in enumerate(drawn) if not (i and layer.inverse)}
    spines = {(a, b) for a, b in spans if a and all(i in dry and drawn[i].vijp for i in range(a, b + 1))}
    assert found.get("moonwalk", set()) == spines


@some
@given(chains, st.lists(fractions, min_size=2, max_size=4))
def test_a_smaller_budget_is_never_faster(drawn: list[Layer], parts: list[float]) -> None:
    planner = planner_of(drawn)
    plain = planner.plain.peak
    times = []
    for part in sorted(parts):
        moves = planner.fastest(part * plain)
        times.append(math.inf if moves is None else sum(move.cost.seconds for move in moves))
    assert times == sorted(times, reverse=True)


@some
@given(chains, fractions)
def test_a_plan_within_a_budget_is_within_it(drawn: list[Layer], part: float) -> None:
    planner = planner_of(drawn)
    budget = part * planner.plain.peak
    planned = planner.within(budget)
    if planned is not None:
        assert planned.peak <= budget
        verify(planner.analysis, planned.schedule)
        assert [index for segment in planned.segments for index in segment.span] == list(range(len(drawn)))


@some
@given(chains)
def test_the_budget_of_plain_backpropagation_costs_no_time(drawn: list[Layer]) -> None:
    planner = planner_of(drawn)
    plain = planner.plain
    planned = planner.within(plain.peak * 1.5)
    assert planned is not None and planned.seconds <= plain.seconds + 1e-9


@some
@given(chains)
def test_the_smallest_plan_is_no_larger_than_plain(drawn: list[Layer]) -> None:
    planner = planner_of(drawn)
    smallest = planner.smallest()
    verify(planner.analysis, smallest.schedule)
    assert smallest.peak <= planner.plain.peak


def test_a_plan_below_a_gap_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that turn out a little larger than modelled, one after the other, do not use up the search."""
    planner = planner_of([Layer()] * 4)
    whole = planner.fastest(math.inf)
    assert whole is not None
    one, real = whole[0], planner.realise(whole)

    def fastest(target: float, states: int) -> list[Move]:
        return [Move(Segment(0, int(target // 25), "keep", frozenset()), one.cost)]  # one plan every 25 bytes

    def realise(moves: Sequence[Move]) -> Planned:
        modelled = 25 * moves[0].segment.last
        peak = Timeline((max(1001, modelled) if modelled > 700 else modelled,), 0, 0)
        return replace(real, forward=peak, backward=peak)

    monkeypatch.setattr(planner, "fastest", fastest)
    monkeypatch.setattr(planner, "realise", realise)
    found = planner.within(1000)
    assert found is not None
    assert found.peak <= 1000


@pytest.mark.parametrize(("gain", "simulated"), [(0.0, 1), (0.0005, 1), (0.01, 2)])
def test_what_promises_nothing_is_not_simulated(monkeypatch: pytest.MonkeyPatch, gain: float, simulated: int) -> None:
    planner = planner_of([Layer()] * 4)
    whole = planner.fastest(math.inf)
    assert whole is not None
    one, real, seen = whole[0], planner.realise(whole), list[float]()

    def fastest(target: float, states: int) -> list[Move]:
        seconds = real.seconds * (1 - gain * (target > 1000))
        return [Move(Segment(0, int(target), "keep", frozenset()), replace(one.cost, seconds=seconds))]

    def realise(moves: Sequence[Move]) -> Planned:
        seen.append(moves[0].cost.seconds)
        return replace(real, forward=Timeline((900,), 0, 0), backward=Timeline((900,), 0, 0), seconds=seen[-1])

    monkeypatch.setattr(planner, "fastest", fastest)
    monkeypatch.setattr(planner, "realise", realise)
    found = planner.within(1000)
    assert found is not None
    assert found.seconds == min(seen)
    assert len(seen) == simulated


@pytest.mark.parametrize("strategies", [("keep",), ("checkpoint",), ("invert", "keep"), ("checkpoint", "moonwalk")])
def test_only_the_strategies_asked_for_are_used(strategies: tuple[str, ...]) -> None:
    planner = planner_of([Layer(inverse=i % 2 == 0, vijp=True) for i in range(6)], strategies=strategies)
    for moves in planner.moves:
        assert {move.segment.strategy for move in moves} <= set(strategies)
    assert {segment.strategy for segment in planner.smallest().segments} <= set(strategies)


def test_inversion_makes_the_peak_of_a_deep_chain_smaller():
    drawn = [Layer(inner=40, outer=40, inverse=True)] * 30
    with_inversion = planner_of(drawn).smallest()
    without = planner_of(drawn, strategies=("keep", "checkpoint")).smallest()
    assert "invert" in {segment.strategy for segment in with_inversion.segments}
    assert with_inversion.peak < without.peak


# -- certificates ----------------------------------------------------------------------------------------------------


def certified(count: int, certificate: Certificate) -> dict[tuple[str, int], Certificate]:
    return {("invert", index): certificate for index in range(count)}


def test_a_chain_ends_before_its_error_passes_the_tolerance():
    """Noise of 1e-6 that doubles with each block: 1, 2.2, 4.6, 9.2, 18 millionths."""
    noise = certified(8, Certificate(1e-6, 2.0))
    planner = planner_of([Layer(inverse=True)] * 8, certificates=noise, tolerance=1e-5)
    longest = planner.maker.chains.longest("invert", 7)
    assert longest is not None and longest.span == range(4, 8)
    assert planner.error_of(longest) == pytest.approx(9.2e-6, rel=0.01)


def test_no_certificate_no_error():
    planner = planner_of([Layer(inverse=True)] * 3)
    segment = Segment(1, 2, "invert", frozenset())
    assert planner.uncertified([segment]) == [segment]
    assert planner.error_of(segment) == math.inf
    planner.certify(certified(3, Certificate(1e-7, 1.0)))
    assert planner.uncertified([segment]) == []
    assert planner.error_of(segment) == chain_error(segment, planner.certificates) == pytest.approx(math.sqrt(2) * 1e-7)


def test_a_bad_certificate_forbids_inversion():
    planner = planner_of([Layer(inverse=True)] * 3, tolerance=1e-4)
    planner.certify(certified(3, Certificate(math.inf, math.inf)))
    assert not [move for moves in planner.moves for move in moves if move.segment.strategy == "invert"]


def test_a_question_is_answered_once_until_certificates_change() -> None:
    planner = planner_of([Layer(inverse=True)] * 12, tolerance=1e-4)
    found = planner.smallest()
    assert planner.smallest() is found and "invert" in {segment.strategy for segment in found.segments}
    planner.certify(certified(12, Certificate(math.inf, math.inf)))
    assert "invert" not in {segment.strategy for segment in planner.smallest().segments}


@pytest.mark.parametrize("strategy", ["keep", "checkpoint"])
def test_what_waits_for_the_backward_pass_takes_time(strategy: str) -> None:
    """Beside what the operations take; in plain backpropagation, in a plan, and in the moves that it is made of."""
    far, analysis = 0.5, chain([Layer(7, 5, 3) for _ in range(4)])
    fused = [replace(analysis, device=replace(analysis.device, fused=True, far=each)) for each in (0.0, far)]
    planners = [Planner(Facts(each), (strategy,)) for each in fused]

    def waiting(planned: Planned) -> float:
        values, static = analysis.graph.values, analysis.graph.static
        return far * sum(values[value].bytes for value in {*planned.schedule.kept} - static)

    plain = waiting(planners[0].plain)
    assert plain and planners[1].plain.seconds == pytest.approx(planners[0].plain.seconds + plain)
    found = [next(iter(segmentations(planner, len(analysis.blocks) - 1))) for planner in planners]
    planned = [planner.realise(moves) for planner, moves in zip(planners, found, strict=True)]
    assert planned[0].segments == planned[1].segments
    extra = waiting(planned[0])
    assert planned[1].seconds == pytest.approx(planned[0].seconds + extra)
    assert (extra < plain) == (strategy == "checkpoint")
    modelled = [sum(move.cost.seconds for move in moves) for moves in found]
    assert modelled[1] - modelled[0] == pytest.approx(extra - plain)


def ratios_of_thinned_fronts(seed: int) -> list[float]:
    """The time found with 8 states at each border, against that with 4096, at three budgets."""
    draw, ratios = random.Random(seed), []
    sizes = [draw.randint(10, 60) for _ in range(40)]
    drawn = [Layer(inner, draw.randint(5, inner), draw.randint(1, 20)) for inner in sizes]
    planner = planner_of(drawn, strategies=("keep", "checkpoint"))
    for part in (0.8, 0.6, 0.4):
        times = []
        for states in (8, 4096):
            moves = planner.fastest(part * planner.plain.peak, states)
            assert moves is not None
            times.append(planner.plain.seconds + sum(move.cost.seconds for move in moves))
        ratios.append(times[0] / times[1])
    return ratios


def test_a_thinned_front_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those stay that are best at the price of a byte: an even choice among states that differ a bit is 5 to 7% off."""
    monkeypatch.setattr("moonwalk_compile.passes.moves.keeping.RUNS", ())
    assert all(1 <= ratio < 1.02 for ratio in ratios_of_thinned_fronts(1))


def test_a_thinned_front_loses_little_with_runs() -> None:
    """One of 8 states more or less decides about 3% here; on average it is less than half of that."""
    ratios = [ratio for seed in (1, 2, 3) for ratio in ratios_of_thinned_fronts(seed)]
    assert min(ratios) >= 1 and statistics.fmean(ratios) < 1.02, ratios
