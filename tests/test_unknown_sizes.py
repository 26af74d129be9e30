"""Models within which sizes depend on data: planned like others, and right whatever the data are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moonwalk_compile import CaptureError, moonwalk_compile
from moonwalk_compile.api import planned_session
from moonwalk_compile.measure import compare_steps, measure_step
from moonwalk_compile.options import Options

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ROWS, WIDTH, WORDS = 256, 32, 50


@pytest.fixture(autouse=True)
def nothing_trains_plain() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def layer() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class Net(nn.Module):
    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, WORDS)

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = self.words(x)
        for step in self.layers:
            h = h + step(h)
        return h

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.hidden(x)), y)


class MaskedLoss(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        keep = y >= 0
        return F.cross_entropy(self.head(self.hidden(x)[keep]), y[keep], reduction="sum")


class Experts(Net):
    """Each layer is applied to the rows that choose it, which then go on with all others."""

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = self.words(x)
        for step in self.layers:
            chosen = (h[:, 0] > 0).nonzero().squeeze(1)
            h = h.index_add(0, chosen, step(h[chosen]))
        return h


class Edges(Net):
    """As graph layers do it: edges from a row to itself are left out, one to each is added, sums go over edges."""

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = self.words(x)
        ends = torch.stack([x * 5 % ROWS, (x * 7 + 3) % ROWS])
        ends = ends[:, ends[0] != ends[1]]
        own = torch.arange(ROWS)
        start, end = torch.cat([ends, torch.stack([own, own])], 1)
        degree = torch.zeros(ROWS).index_add(0, end, torch.ones_like(end, dtype=torch.float32))
        weight = degree[start].rsqrt() * degree[end].rsqrt()
        for step in self.layers:
            message = step(h)[start] * weight[:, None]
            h = torch.zeros_like(h).index_add(0, end, message).tanh()
        return h


class Dropped(MaskedLoss):
    """Random numbers before and behind a sum over marked rows."""

    def hidden(self, x: Tensor) -> Tensor:
        h = F.dropout(super().hidden(x), 0.3)
        marked = h[h[:, 0] > 0]
        return F.dropout(h + marked.mean(0) * marked.square().sum(), 0.3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return Net.forward(self, x, y.clamp_min(0))


def batch(marked: float = 0.5) -> tuple[Tensor, Tensor]:
    y = torch.randint(WORDS, (ROWS,))
    return torch.randint(WORDS, (ROWS,)), torch.where(torch.rand(ROWS) < marked, y, -1)


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return moonwalk_compile(copy.deepcopy(model), **{"lowering": "eager", **options})  # type: ignore[arg-type]


def loss(model: nn.Module, *inputs: Tensor) -> Tensor:
    found: Tensor = model(*inputs)
    return found


def peak(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    return measure_step(lambda: loss(model, *inputs).backward()).peak_bytes


@pytest.mark.parametrize("kind", [MaskedLoss, Experts, Edges, Dropped])
@pytest.mark.parametrize("budget", [None, 1.0])
def test_gradients_are_those_of_eager_whatever_the_sizes(kind: type[Net], budget: float | None) -> None:
    base = kind()
    model = compiled(base, budget=budget and f"{budget:.0%}")
    for marked in (0.5, 0.9, 0.1):
        x, y = batch(marked)
        y = y.clamp_min(0) if kind in (Experts, Edges) else y
        assert compare_steps(model, base, loss, (x, y)).exact


class DroppedInside(Net):
    """Experts with dropout, and a head with dropout over marked rows."""

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = self.words(x)
        for step in self.layers:
            chosen = (h[:, 0] > 0).nonzero().squeeze(1)
            h = h.index_add(0, chosen, F.dropout(step(h[chosen]), 0.2))
        return h

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        keep = y >= 0
        return F.cross_entropy(self.head(F.dropout(self.hidden(x)[keep], 0.5)), y[keep])


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_what_is_drawn_inside_is_drawn_once(lowering: str) -> None:
    base, inputs = DroppedInside(2).double(), batch()

    def step(model: nn.Module, seed: int) -> float:
        model.zero_grad()
        torch.manual_seed(seed)
        found = loss(model, *inputs)
        found.backward()
        return found.item()

    ways: tuple[dict[str, Any], ...] = ({"budget": "64MiB"}, {"strategies": ("checkpoint",), "budget": "64MiB"})
    models = [compiled(base, lowering=lowering, **options) for options in ways]
    assert len({step(models[0], seed) for seed in range(4)}) == 4
    assert step(models[0], 1) == step(models[1], 1)
    for ours, others in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(ours.grad, others.grad, rtol=0 if lowering == "eager" else 1e-12)
    model, far = models[0], 1e-6
    steps = [torch.randn_like(weight) for weight in model.parameters()]
    slope = sum(float((weight.grad * way).sum()) for weight, way in zip(model.parameters(), steps, strict=True))
    found = []
    for side in (far, -2 * far):
        with torch.no_grad():
            for weight, way in zip(model.parameters(), steps, strict=True):
                weight += side * way
        found.append(step(model, 1))
    assert (found[0] - found[1]) / (2 * far) == pytest.approx(slope, rel=1e-5)


def test_no_row_at_all() -> None:
    base = MaskedLoss()
    model = compiled(base, budget="90%")
    assert compare_steps(model, base, loss, batch()).exact
    assert compare_steps(model, base, loss, batch(0.0)).exact


@pytest.mark.parametrize("budget", ["70%", "45%"])
def test_budget_holds_and_is_predicted_for_the_most_rows(budget: str) -> None:
    base = MaskedLoss()
    model = compiled(base, budget=budget)
    few, all_rows = batch(0.3), batch(1.0)
    compare_steps(model, base, loss, few)
    plan = model.plan
    assert peak(model, few) < plan.peak_bytes <= plan.budget_bytes
    assert peak(model, all_rows) == pytest.approx(plan.peak_bytes, rel=0.01)


def test_through_inductor() -> None:
    base = MaskedLoss(2)
    model = compiled(base, lowering="inductor", budget="80%")
    for marked in (0.5, 1.0):
        assert compare_steps(model, base, loss, batch(marked)).gradient_error <= 1e-5
    assert peak(model, batch(1.0)) <= model.plan.budget_bytes


def test_equal_layers_are_one_piece_and_one_line_of_the_plan() -> None:
    base = Experts(8)
    model = compiled(base)
    assert compare_steps(model, base, loss, batch(1.0)).exact
    assert "layers.0-7  x8" in str(model.plan)
    assert any("where sizes depend on data" in note for note in model.plan.notes)


def test_plain_computes_nothing_twice() -> None:
    base = Experts(8)
    model = compiled(base, budget="100%")
    inputs = torch.randint(WORDS, (ROWS,)), torch.randint(WORDS, (ROWS,))
    with torch.no_grad():
        for step in base.layers:
            step[-1].weight[0] = step[-1].bias[0] = 0.0
        base.words.weight[:, 0] = 1.0  # every row is chosen, in every layer
    loss(model, *inputs).backward()
    assert model.plan.plain_peak_bytes == pytest.approx(peak(base, inputs), rel=0.15)
    assert model.plan.plain_time_s < 0.9 * model.plan.time_s


class Within(Experts):
    """Nearly all of it has sizes that depend on data."""

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = self.words(x)
        chosen = (x > 0).nonzero().squeeze(1)
        some = h[chosen]
        for step in self.layers:
            some = some + step(some)
        return h.index_add(0, chosen, some)


def test_what_is_computed_twice_keeps_to_the_slowdown_that_is_allowed() -> None:
    base, inputs = Within(), batch(1.0)
    plain = compiled(base, max_slowdown=1.1)
    with pytest.warns(UserWarning, match="would be computed twice.*max_slowdown is 1.1"):
        loss(plain, *inputs)
    for options in ({"max_slowdown": 2}, {"budget": "3MiB"}):
        model = compiled(base, **options)
        assert compare_steps(model, base, loss, inputs).exact
        assert 1.1 < model.plan.time_s / model.plan.plain_time_s < 2


def test_what_is_asserted_of_sizes_is_asserted() -> None:
    class Checked(MaskedLoss):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            torch._check((y >= 0).nonzero().shape[0] <= 200, lambda: "too many")
            return super().forward(x, y)

    base = Checked()
    model = compiled(base)
    with pytest.raises(CaptureError, match="nothing but a check needs it"):
        compiled(base, budget="90%")(*batch())
    with pytest.warns(UserWarning, match="nothing but a check"):
        model(*batch(0.5))
    with pytest.raises(RuntimeError, match="too many"):
        model(*batch(1.0))


class First(Net):
    """Views of a tensor that is as long as the data tell, and of one that is not, and a view of these."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.hidden(x)
        start = int((y[:5] >= 0).sum().item())
        torch._check(start >= 0)
        torch._check(start <= 5)
        padded = torch.cat([h[y >= 0], h])
        return (
            padded[:ROWS].square().sum()
            + h.narrow(0, start, 8).view(4, -1).square().sum()
            + h[:, None].flatten(0, 1)[start:].mean()
        )


def test_views() -> None:
    base = First()
    model = compiled(base, max_slowdown=3)
    for marked in (0.0, 0.5, 1.0):
        assert compare_steps(model, base, loss, batch(marked)).exact


class Counted(MaskedLoss):
    """Words that were asked for are counted, and the rows that were not are zeroed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WORDS))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        asked = y[y >= 0]
        self.seen.index_add_(0, asked, torch.ones_like(asked, dtype=torch.float32))
        h = self.hidden(x).clone()
        h[(y < 0).nonzero().squeeze(1)] = 0
        return F.cross_entropy(self.head(h), y.clamp_min(0))


def test_tensors_that_are_changed_in_place() -> None:
    base = Counted()
    model = compiled(base, budget="80%")
    for _ in range(3):
        assert compare_steps(model, base, loss, batch()).exact
    assert model.seen.equal(base.seen)
    assert model.seen.sum() > 0


class Watched(MaskedLoss):
    """A share of right answers beside the loss, and something that nobody needs."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        keep = y >= 0
        logits = self.head(self.hidden(x))
        (logits > 1).nonzero()
        right = logits.detach()[keep].argmax(-1) == y[keep]
        return F.cross_entropy(logits[keep], y[keep]), right.float().mean()


def test_figures_beside_the_loss() -> None:
    base, inputs = Watched(), batch()
    model = compiled(base, budget="80%")
    assert compare_steps(model, base, lambda net, *given: net(*given)[0], inputs).exact
    assert model(*inputs)[1].equal(base(*inputs)[1])


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_what_a_piece_holds_counts_for_a_device_that_is_not_here(lowering: str) -> None:
    options = Options(budget=64 << 20, lowering=lowering)
    plans = [planned_session(Within(), batch(1.0), options, device=device).plan for device in ("cpu", "h100")]
    assert plans[1].peak_bytes == pytest.approx(plans[0].peak_bytes, rel=0.2)


class Returned(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.hidden(x)[y >= 0])


class Unbounded(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        counted = torch.arange(int(y.sum().abs().item()))
        return super().forward(x, y.clamp_min(0)) + self.words(counted % WORDS).sum()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Returned, r"index.*\[y >= 0\]\)\), and a tensor of such a size leaves the model"),
        (Unbounded, "nothing says how large u0 may get"),
    ],
)
def test_what_cannot_be_enclosed_is_named(kind: type[Net], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        compiled(kind(), budget="90%")(*batch())
