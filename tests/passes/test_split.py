"""Large tensors in parts of their rows: the same results, whatever stands between the logits and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moonwalk_compile import BudgetError, moonwalk_compile, training_step
from moonwalk_compile.measure import compare_steps, measure_step
from moonwalk_compile.passes.capture import Capture
from moonwalk_compile.passes.split import Region, find_region, split
from moonwalk_compile.testing import capture_joint, true_values

WORDS = 200
LossOfLogits = Callable[[Tensor, Tensor], Tensor]


def flat(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return flat(logits[:, :-1], labels[:, 1:])


def chosen(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)).mean()


def policy(logits: Tensor, labels: Tensor) -> Tensor:
    """As when a policy is trained: each token's likelihood at a temperature."""
    likely = (logits / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return (likely - 0.5).exp().mul(0.1).mean()


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """Every step spelled out."""
    shifted = logits - logits.amax(-1, keepdim=True)
    normalizer = shifted.exp().sum(-1, keepdim=True).log()
    return -(shifted - normalizer).gather(-1, labels[..., None]).mean()


LOSSES: dict[str, LossOfLogits] = {
    "cross entropy": flat,
    "some ignored": lambda x, y: flat(x, torch.where(y < 20, -100, y)),
    "sum": lambda x, y: flat(x, y, reduction="sum") / 7,
    "of each token": lambda x, y: flat(x, y, reduction="none").square().mean(),
    "weights of words": lambda x, y: flat(x, y, weight=torch.linspace(0.5, 2, WORDS, dtype=x.dtype)),
    "smoothed": lambda x, y: flat(x, y, label_smoothing=0.1),
    "capped": lambda x, y: flat(30 * torch.tanh(x / 30), y),
    "and the normalizer": lambda x, y: flat(x, y) + 1e-3 * x.logsumexp(-1).square().mean(),
    "in higher precision": lambda x, y: flat(x.double(), y),
    "shifted": shifted,
    "gathered": chosen,
    "policy": policy,
    "by hand": by_hand,
    "multiplied again": lambda x, y: F.gelu(x).matmul(torch.ones(WORDS, 3, dtype=x.dtype)).square().sum(),
}


def captured(
    function: Callable[..., Any], arguments: list[Tensor], parts: int | None = None, trained: list[bool] | None = None
) -> tuple[Any, Capture]:
    """The graph in parts, and its region; in as many as are found best by default."""
    found: list[Region | None] = []

    def rewrite(graph: fx.Graph, outputs: int) -> fx.Graph:
        region = find_region(graph, outputs)
        found.append(replace(region, parts=parts) if region and parts else region)
        done = split(graph, found[0]) if found[0] else graph
        assert done is not None
        return done

    return found, capture_joint(function, arguments, trained, rewrite)


def results(capture: Capture, arguments: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    truth = true_values(capture, arguments)
    return [truth[value] for value in (*capture.graph.output_values, *capture.graph.gradient_values)]


def largest(capture: Capture) -> int:
    return max(value.bytes for value in capture.graph.values if value.role == "computed")


def example(batch: int = 4, tokens: int = 16, width: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(batch, tokens, width, dtype=torch.float64)
    return [inputs, torch.randn(WORDS, width, dtype=torch.float64), torch.randint(0, WORDS, (batch, tokens))]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bias", [False, True])
def test_results_are_those_of_the_whole(name: str, bias: bool) -> None:
    arguments = [*example(), *([torch.randn(WORDS, dtype=torch.float64)] if bias else [])]

    def step(x: Tensor, weight: Tensor, labels: Tensor, *bias: Tensor) -> Tensor:
        return LOSSES[name](F.linear(x, weight, *bias), labels)

    whole = capture_joint(step, arguments)
    (region,), parts = captured(step, arguments)
    assert region is not None and region.parts >= 4 and largest(parts) <= largest(whole) / 3
    for mine, true in zip(results(parts, arguments), results(whole, arguments), strict=True):
        assert mine.dtype == true.dtype and mine.stride() == true.stride()
        assert (mine - true).norm() <= 1e-13 * true.norm()


@given(st.sampled_from(sorted(LOSSES)), st.sampled_from([(1, 128), (4, 32), (32, 3), (64, 1), (3, 32)]), st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_number_of_rows_and_parts(name: str, shape: tuple[int, int], halves: bool) -> None:
    arguments = example(*shape)

    def step(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return LOSSES[name](x @ weight.t(), labels)

    (region,), parts = captured(step, arguments, 2 if halves and shape[0] % 2 == 0 else None)
    assert region is not None or name == "shifted", "there, tokens cannot be told apart, and batches may be odd"
    if region is not None:
        for mine, true in zip(
            results(parts, arguments), results(capture_joint(step, arguments), arguments), strict=True
        ):
            assert (mine - true).norm() <= 1e-13 * true.norm()


def test_constants_are_made_in_parts() -> None:
    """One that is made from nothing but its size, too."""

    def step(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return flat(F.linear(x, weight) * torch.full((4, 16, WORDS), 0.5, dtype=x.dtype), labels)

    arguments = example()
    (region,), parts = captured(step, arguments)
    assert region is not None and largest(parts) <= largest(capture_joint(step, arguments)) / 3
    for mine, true in zip(results(parts, arguments), results(capture_joint(step, arguments), arguments), strict=True):
        assert (mine - true).norm() <= 1e-13 * true.norm()


def test_logits_that_leave_are_put_together() -> None:
    def step(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, weight)
        return logits, flat(logits, labels)

    arguments = example()
    (region,), parts = captured(step, arguments)
    assert region is not None
    for mine, true in zip(results(parts, arguments), results(capture_joint(step, arguments), arguments), strict=True):
        assert (mine - true).norm() <= 1e-13 * true.norm()


def test_sums_of_short_numbers_are_as_precise_as_the_whole() -> None:
    arguments = [a.bfloat16() if a.is_floating_point() else a for a in example(16, 64, 8)]

    def step(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return flat(F.linear(x, weight).float(), labels)

    (region,), parts = captured(step, arguments, parts=64)
    assert region is not None
    exact = [a.double() if a.is_floating_point() else a for a in arguments]
    truth = results(capture_joint(step, exact), exact)
    errors = [
        max((mine - true).norm() / true.norm() for mine, true in zip(results(capture, arguments), truth, strict=True))
        for capture in (parts, capture_joint(step, arguments))
    ]
    assert errors[0] <= 1.1 * errors[1]


def test_a_loss_that_is_only_looked_at() -> None:
    """Without a gradient of its own nobody asks for the weights of its mean."""

    def step(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, weight)
        return logits.logsumexp(-1).mean(), flat(logits.detach(), labels)

    arguments = example()
    (_,), parts = captured(step, arguments)
    for mine, true in zip(results(parts, arguments), results(capture_joint(step, arguments), arguments), strict=True):
        assert (mine - true).norm() <= 1e-13 * true.norm()


REFUSED: dict[str, Callable[..., Any]] = {
    "rows are mixed": lambda x: x.cumsum(1).square().sum(),
    "rows are sorted": lambda x: x.sort(1)[0].mul(torch.arange(16.0)[:, None]).sum(),
    "rows are compared": lambda x: x.flatten(0, 1).softmax(0).square().sum(),
    "the sum is used again": lambda x: (x - x.mean((0, 1))).abs().sqrt().sum(),
    "rows are drawn at random": lambda x: F.dropout(x, 0.5).square().sum(),
    "not known": lambda x: x.topk(3, -1)[0].sum(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_row_by_row_stays_whole(name: str) -> None:
    x, weight, _ = example()
    (region,), _ = captured(lambda x, weight: REFUSED[name](F.linear(x, weight)), [x, weight])
    assert region is None


def test_random_numbers_are_drawn_in_their_order() -> None:
    """What is done in parts moves to the last of its operations: nothing that draws or writes may lie between."""

    def step(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        drawn = F.dropout(x, 0.5).sum()
        return flat(logits, labels) + drawn

    (region,), _ = captured(step, example())
    assert region is None


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens)


ALL = ("keep", "checkpoint", "invert", "moonwalk", "split")


class Model(nn.Module):
    """Returns its loss; the logits are much larger than all else."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS * 10, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, WORDS * 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        return flat(self.head(x), tokens)


def tokens() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, WORDS * 10, (8, 64))


def smallest(dropout: float = 0.0, **options: Any) -> int:
    with pytest.raises(BudgetError) as caught:
        moonwalk_compile(Model(dropout), budget=1, example_inputs=(tokens(),), **options)
    return caught.value.smallest_peak_bytes


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("lowering", "strategies"), [("eager", ALL), ("inductor", ALL[:4])])
def test_a_model_of_many_words_needs_a_fraction(lowering: str, strategies: tuple[str, ...]) -> None:
    options = {"lowering": lowering, "strategies": strategies}
    dropout = 0.1 if lowering == "eager" else 0.0  # Inductor draws other masks
    least = smallest(dropout, **options)
    assert least < 0.4 * smallest(dropout, lowering=lowering, strategies=("keep", "checkpoint"))
    for budget in (least, 2 * least) if lowering == "eager" else (least,):
        ours = moonwalk_compile(Model(dropout), budget=budget, **options)
        assert compare_steps(ours, Model(dropout), loss, (tokens(),)).gradient_error < 1e-5
        data = tokens()
        peak = measure_step(lambda ours=ours, data=data: ours(data).backward()).peak_bytes
        assert peak <= budget and abs(peak / ours.plan.peak_bytes - 1) < 0.01
        assert any("parts of their rows" in note for note in ours.plan.notes)
        assert {segment.strategy for segment in ours.plan.segments} <= {"keep", "checkpoint"}


@pytest.mark.usefixtures("fresh_compiler")
def test_results_stay_bitwise_where_that_was_promised() -> None:
    """Not asked for, sums keep their order under eager lowering; the error says what would help."""
    with pytest.raises(BudgetError, match='"split"') as caught:
        moonwalk_compile(Model(), budget=1, lowering="eager", example_inputs=(tokens(),))
    ours = moonwalk_compile(Model(), budget=caught.value.smallest_peak_bytes, lowering="eager")
    assert compare_steps(ours, Model(), loss, (tokens(),)).exact
    assert not any("parts" in note for note in ours.plan.notes)


@pytest.mark.usefixtures("fresh_compiler")
def test_logits_twice_as_large_as_a_gradient_are_split() -> None:
    """Several of them are alive at once, so four parts are worth it; not where they are as large."""
    for rows, splits in ((32, True), (16, False)):
        data = tokens().flatten()[:rows].reshape(2, -1)
        ours = moonwalk_compile(Model(), lowering="eager", strategies=ALL, max_slowdown=3, example_inputs=(data,))
        assert any("in 4 parts" in note for note in ours.plan.notes) == splits


@pytest.mark.usefixtures("fresh_compiler")
def test_a_budget_that_is_met_anyway_changes_nothing() -> None:
    ours = moonwalk_compile(Model(), budget="100%", lowering="eager", strategies=ALL)
    assert compare_steps(ours, Model(), loss, (tokens(),)).exact


@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_step_in_parts() -> None:
    model, reference, data = Model(), Model(), tokens()
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, reference)]
    options = {"lowering": "eager", "strategies": ALL}
    step = training_step(model, optimizer=optimizers[0], budget=smallest(**options), **options)
    for _ in range(3):
        step(data)
        reference(data).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert any("parts of their rows" in note for note in step.plan.notes)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-6


class Reversible(nn.Module):
    """Couplings before a head of many words; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS * 10, 32)
        halves = (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(16))
        self.halves = nn.ModuleList(halves)
        self.head = nn.Linear(32, WORDS * 10)

    def forward(self, tokens: Tensor) -> Tensor:
        a, b = self.embed(tokens).chunk(2, -1)
        for half in self.halves:
            a, b = b, a + half(b)
        return flat(self.head(torch.cat([a, b], -1)), tokens)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_couplings_in_front_of_what_is_split_are_inverted(lowering: str) -> None:
    """Their certificates belong to the graph in parts: they are measured on it, and again as training goes on."""
    ours, reference, data = Reversible(), Reversible(), tokens()
    moonwalk_compile(ours, max_slowdown=3, lowering=lowering, strategies=("invert", "keep", "split"))
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    for _ in range(12):  # certificates are measured again at the tenth
        optimizer.zero_grad()
        ours(data).backward()
        optimizer.step()
    assert "invert" in {segment.strategy for segment in ours.plan.segments}
    assert any("parts of their rows" in note for note in ours.plan.notes)
    assert ours.plan.measured_peak_bytes <= 1.01 * ours.plan.peak_bytes < 0.3 * ours.plan.plain_peak_bytes
    reference.load_state_dict(ours.state_dict())
    assert 0 < compare_steps(ours, reference, loss, (data,)).gradient_error < 1e-4
    with torch.no_grad():
        ours.halves[10][3].weight *= 1e4  # what it is added to is lost beside it
    with pytest.warns(UserWarning, match="planning again without it"):
        ours(data)
    reference.load_state_dict(ours.state_dict())
    assert compare_steps(ours, reference, loss, (data,)).gradient_error < 1e-4
