"""A model that cannot be captured trains as it is, its repeated modules computed again where that is the same."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from moonwalk_compile import CaptureError, moonwalk_compile
from moonwalk_compile.measure import compare_steps, measure_step

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Wide(nn.Module):
    """Needs much more for its backward pass than its input; branches on its values."""

    def __init__(self, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 256), nn.Linear(256, 8)
        self.norm, self.dropout = nn.BatchNorm1d(256) if norm else nn.Identity(), nn.Dropout(dropout)
        self.calls, self.seen = 0, []

    def note(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        y = self.second(self.dropout(self.norm(self.first(x)).tanh().exp().sin()))
        return x + y if y.sum() > 0 else x - y


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Wide, method: str = "__call__") -> None:
        super().__init__()
        self.blocks, self.method = nn.ModuleList(make() for _ in range(8)), method

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = getattr(block, self.method)(x)
        return x


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    loss(model, x).backward()


def check(base: nn.Module, again: int, steps: int = 3) -> nn.Module:
    """Bitwise plain's gradients and buffers, with `again` modules recomputed and then much less memory."""
    x = torch.randn(512, 8)
    ours, plain = moonwalk_compile(copy.deepcopy(base), lowering="eager"), copy.deepcopy(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            assert compare_steps(ours, plain, loss, [x]).exact
    said = [str(w.message) for w in caught if "moonwalk" in str(w.message)]
    assert len(said) == 1 and "trains plain" in said[0] and "could not be compiled" in said[0]
    assert (f"with {again} of its modules computed again" in said[0]) == bool(again)
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        assert mine.equal(theirs)
    ratio = measure_step(lambda: step(plain, x)).peak_bytes / measure_step(lambda: step(ours, x)).peak_bytes
    assert ratio > 3 if again else ratio == 1, ratio
    return ours


def test_less_memory_and_the_same_gradients():
    check(Stack(), again=8)


def test_running_statistics_are_updated_once():
    ours = check(Stack(lambda: Wide(norm=True)), again=8)
    assert all(block.norm.num_batches_tracked == ours.blocks[0].norm.num_batches_tracked for block in ours.blocks)


def test_a_retained_graph():
    torch.manual_seed(0)
    base, x = Stack(lambda: Wide(norm=True, dropout=0.2)), torch.randn(512, 8)
    ours, plain, gradients = moonwalk_compile(copy.deepcopy(base), lowering="eager"), copy.deepcopy(base), []
    for model in (ours, plain):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss(model, x)
        value.backward(retain_graph=True)
        value.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(mine.equal(theirs) for mine, theirs in zip(*gradients, strict=True))
    assert all(mine.equal(theirs) for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True))


def test_dropout_is_drawn_once():
    check(Stack(lambda: Wide(dropout=0.3)), again=8)


def test_buffers_that_decide_the_output():
    """A power iteration moves its vectors at each call: the second run starts from the old ones."""

    def make() -> Wide:
        block = Wide()
        spectral_norm(block.first)
        return block

    check(Stack(make), again=8)


class Scheduled(Wide):
    """Behaves otherwise from its third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * (3 if self.count > 2 else 1)


def test_a_schedule_in_a_buffer():
    check(Stack(Scheduled), again=8, steps=4)


class Named(Wide):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, x: Tensor) -> Tensor:
        return Wide.forward(self, x)


def test_another_method_than_forward():
    check(Stack(Named, "inverse"), again=8)


class Counts(Wide):
    def note(self, x: Tensor) -> None:
        self.calls += 1


class Collects(Wide):
    def note(self, x: Tensor) -> None:
        self.seen.append(x.shape)


class Replaces(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def note(self, x: Tensor) -> None:
        self.mean.data = self.mean + x.detach().mean(0)


class WritesUnseen(Wide):
    def note(self, x: Tensor) -> None:
        self.first.weight.data.mul_(0.99)


class WritesParameters(Wide):
    def note(self, x: Tensor) -> None:
        with torch.no_grad():
            self.first.weight.mul_(0.99)


@pytest.mark.parametrize("kind", [Counts, Collects, Replaces, WritesUnseen, WritesParameters])
def test_what_changes_more_than_buffers_runs_as_it_is(kind: type[Wide]):
    ours = check(Stack(kind), again=0)
    calls = 3 + 1  # of `check`, and the step that was measured
    for block in ours.blocks:
        assert block.calls == (calls if kind is Counts else 0)
        assert len(block.seen) == (calls if kind is Collects else 0)


class ByPython(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0 * random.random())


class ByNumpy(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0 * np.random.rand())


@pytest.mark.parametrize("kind", [ByPython, ByNumpy])
def test_foreign_random_numbers(kind: type[Wide]):
    check(Stack(kind), again=0)


CALLS = [0]


class Hidden(Wide):
    """What it depends on cannot be seen, but that it is another result can."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        return super().forward(x) * CALLS[0]


def test_another_result_without_a_reason():
    ours, x = moonwalk_compile(Stack(Hidden), lowering="eager"), torch.randn(512, 8)
    with pytest.warns(UserWarning, match="Stack trains plain; it could not be compiled"):
        step(ours, x)


class InPlace(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


def test_an_input_that_is_written_to():
    class OnACopy(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    check(OnACopy(InPlace), again=0)


def test_an_object_among_the_arguments():
    class Cached(Wide):
        def run(self, x: Tensor, cache: object) -> Tensor:
            return super().forward(x)

    class WithCache(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block.run(x, object())
            return x

    check(WithCache(Cached), again=0)


def test_only_where_checkpoints_are_allowed():
    x = torch.randn(64, 8)
    for options in ({"strategies": ("keep",)}, {"max_slowdown": 1.2}):
        ours = moonwalk_compile(Stack(), lowering="eager", **options)
        with pytest.warns(UserWarning, match="Stack trains plain; it could not be compiled"):
            step(ours, x)


def test_with_a_budget_it_is_an_error():
    with pytest.raises(CaptureError):
        step(moonwalk_compile(Stack(), budget="50%", lowering="eager"), torch.randn(64, 8))


class Force(nn.Module):
    """An energy and the forces that follow from it: the model differentiates within its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, places: Tensor) -> Tensor:
        places = places.requires_grad_()
        energy = self.net(places).sum()
        (slope,) = torch.autograd.grad(energy, places, create_graph=True)
        return energy.square() + slope.square().mean()


class KeepsGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.a(x).tanh()
        self.features.retain_grad()
        return self.b(self.features).square().mean()


@pytest.mark.parametrize("build", [Force, KeepsGradient])
def test_what_needs_gradients_to_run_at_all_trains_plain(build: type[nn.Module]) -> None:
    base = build()
    ours = moonwalk_compile(copy.deepcopy(base), lowering="eager")
    for model in (base, ours):
        with pytest.warns(UserWarning, match="trains plain") if model is ours else contextlib.nullcontext():
            model(torch.linspace(-1, 1, 12).view(4, 3)).backward()
    for mine, theirs in zip(ours.parameters(), base.parameters(), strict=True):
        assert mine.grad.equal(theirs.grad)
    with pytest.raises(CaptureError):
        moonwalk_compile(build(), budget="90%", lowering="eager")(torch.randn(4, 3))
