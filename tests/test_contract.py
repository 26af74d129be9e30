"""What users were promised about the call: errors, warnings, the plan, the budget, and the module they get back."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import logging
import pickle
import threading
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moonwalk_compile import (
    BudgetError,
    CaptureError,
    OptionError,
    UsageError,
    moonwalk,
    moonwalk_compile,
    training_step,
)
from moonwalk_compile.api import plan_only
from moonwalk_compile.measure import gradient_error, gradients, measure_step
from moonwalk_compile.options import Options
from moonwalk_compile.passes import _torch_compat
from moonwalk_compile.passes.cost import calibrate_cpu

pytestmark = pytest.mark.usefixtures("fresh_compiler")


eager = partial(moonwalk_compile, lowering="eager")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Transformer(nn.Module):
    """Returns its loss, so that nothing outside the step holds memory."""

    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        layer = nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 31)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embed(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def tokens(batch: int = 8, length: int = 32) -> Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(0))


def chain(depth: int = 4) -> nn.Module:
    return nn.Sequential(*(Block(8) for _ in range(depth)))


def one_step(model: nn.Module, *arguments: Any) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    result = model(*arguments)
    (result if result.ndim == 0 else result.square().sum()).backward()
    return gradients(model)


def measured_peak(model: nn.Module, *arguments: Any) -> int:
    one_step(model, *arguments)  # compiles
    model.zero_grad(set_to_none=True)
    return measure_step(lambda: model(*arguments).backward()).peak_bytes


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_calls_without_gradients_may_have_any_size(monkeypatch: pytest.MonkeyPatch, lowering: str):
    """Text is generated in as many sizes as it has tokens; no plan is made for them."""
    monkeypatch.setattr(_torch_compat, "SIZES", 3)
    model = chain(2).eval()
    ours = moonwalk_compile(copy.deepcopy(model), budget="100%", lowering=lowering)
    one_step(ours, torch.randn(4, 8))
    plan = ours.plan
    for size in range(2, 9):
        x = torch.randn(size, 8)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), model(x))
    assert ours.plan is plan is not None


# -- the budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [90, 70, 50, 40])
@pytest.mark.parametrize(
    "strategies",
    [("keep", "checkpoint"), pytest.param(("keep", "checkpoint", "invert", "moonwalk"), marks=pytest.mark.slow)],
)
def test_the_peak_is_within_the_budget(percent: int, strategies: tuple[str, ...]):
    model, data = Transformer(), tokens()
    ours = eager(copy.deepcopy(model), budget=f"{percent}%", strategies=strategies)
    peak, plain = measured_peak(ours, data), measured_peak(model, data)
    assert peak <= ours.plan.budget_bytes == int(ours.plan.plain_peak_bytes * percent / 100)
    assert peak == pytest.approx(ours.plan.peak_bytes, rel=0.01)
    assert ours.plan.plain_peak_bytes == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bytes_as_a_budget(lowering: str):
    model, data = Transformer(depth=3), tokens()
    ours = moonwalk_compile(copy.deepcopy(model), budget=400_000, lowering=lowering)
    assert measured_peak(ours, data) <= ours.plan.budget_bytes == 400_000
    assert gradient_error(one_step(ours, data), one_step(model, data)) < 1e-4


def test_the_smallest_budget_works_and_less_does_not():
    model, x = chain(), torch.randn(16, 8)
    with pytest.raises(BudgetError) as caught:
        eager(copy.deepcopy(model), budget="1%", strategies=("keep", "checkpoint"))(x)
    smallest = caught.value.smallest_peak_bytes
    assert caught.value.pinned and caught.value.budget_bytes < smallest
    ours = eager(copy.deepcopy(model), budget=smallest, strategies=("keep", "checkpoint"))
    assert gradient_error(one_step(ours, x), one_step(model, x)) == 0
    assert ours.plan.peak_bytes == smallest
    torch._dynamo.reset()
    with pytest.raises(BudgetError):
        eager(copy.deepcopy(model), budget=smallest - 1, strategies=("keep", "checkpoint"))(x)


@pytest.mark.parametrize("activation", [nn.Hardswish, nn.SiLU])
def test_an_activation_in_place_needs_no_more(activation: Any):
    """Autograd saves a copy of what it overwrites; that belongs to the activation's block, not to the next one's."""
    x, smallest = torch.randn(8, 8, 8, 8), []
    for inplace in (False, True):
        layers = ((nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation(inplace=inplace)) for _ in range(8))
        model = nn.Sequential(*itertools.chain(*layers))
        with pytest.raises(BudgetError) as caught:
            eager(copy.deepcopy(model), budget="1%", strategies=("keep", "checkpoint"))(x)
        smallest.append(caught.value.smallest_peak_bytes)
        ours = eager(copy.deepcopy(model), budget=smallest[-1], strategies=("keep", "checkpoint"))
        assert gradient_error(one_step(ours, x), one_step(model, x)) == 0
    assert smallest[1] <= 1.01 * smallest[0]


def test_a_budget_error_leaves_the_model_usable():
    model, x = chain(), torch.randn(16, 8)
    ours = eager(model, budget="1%")
    for _ in range(2):
        with pytest.raises(BudgetError):
            ours(x)
    assert one_step(eager(ours, budget="100%"), x)["0.up.weight"] is not None
    assert ours.plan.peak_bytes <= ours.plan.budget_bytes


def test_without_a_budget_the_slowdown_is_bounded():
    model, data = Transformer(depth=3), tokens()
    plans = []
    for slowdown in (1.0, 2.0):
        ours = eager(copy.deepcopy(model), max_slowdown=slowdown, strategies=("keep", "checkpoint"))
        one_step(ours, data)
        assert ours.plan.time_s <= slowdown * ours.plan.plain_time_s * (1 + 1e-9)
        plans.append(ours.plan)
        torch._dynamo.reset()
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.6 * plans[0].plain_peak_bytes


@pytest.mark.parametrize(
    "strategies",
    [("keep",), ("checkpoint",), ("keep", "checkpoint"), ("moonwalk", "checkpoint"), ("invert", "checkpoint")],
)
def test_only_the_allowed_strategies_are_used(strategies: tuple[str, ...]):
    ours = eager(chain(), strategies=strategies)
    one_step(ours, torch.randn(16, 8))
    assert {segment.strategy for segment in ours.plan.segments} <= set(strategies)


# -- the module that comes back ----------------------------------------------------------------------------------------


def test_the_plan_says_why_the_first_block_is_not_walked():
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.LeakyReLU(0.5))]
    ours = eager(nn.Sequential(*layers), strategies=("moonwalk", "checkpoint"), max_slowdown=4)
    one_step(ours, torch.randn(64, 16))
    first = ours.plan.segments[0]
    assert first.strategy == "checkpoint" and "a sweep cannot start at the model's inputs" in first.reason


def test_the_module_stays_what_it_was():
    model = Transformer()
    keys, names, classes = list(model.state_dict()), [n for n, _ in model.named_modules()], type(model)
    parameters = [*model.parameters()]
    model.note = "kept"
    ours = eager(model, budget="60%")
    assert ours is model and type(ours) is classes and isinstance(ours.embed, nn.Embedding) and ours.note == "kept"
    assert ours.plan is None
    one_step(ours, tokens())
    assert list(ours.state_dict()) == keys and [n for n, _ in ours.named_modules()] == names
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert "block" in str(ours.plan) or "layers" in str(ours.plan)


class Adapter(nn.Module):
    """Hands on what it does not know to the module inside, as libraries of adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_segments_are_named_as_the_modules_are():
    ours = eager(Adapter(chain(2)), example_inputs=(torch.randn(3, 8),))
    names = {name for name, _ in ours.named_modules()}
    assert {segment.name for segment in ours.plan.segments} <= names, [segment.name for segment in ours.plan.segments]


def test_hooks_run():
    model, seen = chain(2), []
    ours = eager(model)
    ours.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    one_step(ours, torch.randn(3, 8))
    assert seen[-1] == (3, 8)


@pytest.mark.parametrize("trained_before", [False, True])
def test_copies(trained_before: bool):
    """A copy has the same parameters and trains; whether it is compiled is its own matter."""
    model, data = Transformer(depth=1), tokens()
    expected = one_step(copy.deepcopy(model), data)
    ours = eager(model, budget="90%")
    if trained_before:
        one_step(ours, data)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert list(copied.state_dict()) == list(ours.state_dict())
        found = one_step(copied, data)
        assert gradient_error(found, expected) < 1e-5
        assert all(a is not b for a, b in zip(copied.parameters(), ours.parameters(), strict=True))
        before = [p.detach().clone() for p in ours.parameters()]
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2)
        assert all(a.equal(b) for a, b in zip(ours.parameters(), before, strict=True))
        assert not copied(data).equal(ours(data)), "the copy computes with its own parameters"


def test_saving_and_loading():
    ours, data = eager(Transformer(depth=1), strategies=("checkpoint",)), tokens()
    one_step(ours, data)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = eager(Transformer(depth=1), strategies=("checkpoint",))
    other.load_state_dict(torch.load(file))
    assert gradient_error(one_step(other, data), one_step(ours, data)) == 0


# -- example_inputs ----------------------------------------------------------------------------------------------------


def test_example_inputs_plan_at_once_and_leave_no_trace():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), *chain(2))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x, state = torch.randn(16, 8), torch.get_rng_state()
    calibrate_cpu.cache_clear()  # measuring the machine draws numbers, too
    ours = eager(copy.deepcopy(model), budget="90%", example_inputs=(x,))
    assert torch.get_rng_state().equal(state)
    assert all(buffer.equal(buffers[name]) for name, buffer in ours.named_buffers())
    assert all(parameter.grad is None for parameter in ours.parameters()) and x.grad is None
    peak = ours.plan.peak_bytes
    assert peak <= ours.plan.budget_bytes
    torch.manual_seed(1)
    found = one_step(ours, x)
    torch.manual_seed(1)
    assert gradient_error(found, one_step(model, x)) < 1e-5
    assert ours.plan.peak_bytes == peak


@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 8).requires_grad_(False), nn.Identity])
def test_example_inputs_without_gradients(build: Any):
    with pytest.raises(CaptureError, match="nothing that requires a gradient"):
        eager(build(), example_inputs=(torch.randn(2, 8),))


def test_example_inputs_and_an_impossible_budget():
    with pytest.raises(BudgetError):
        eager(chain(), budget=100, example_inputs=(torch.randn(16, 8),))


# -- models that cannot be captured ------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Python decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.sin(y) if y.sum() > 0 else torch.cos(y)


def test_without_a_budget_it_trains_plain_with_one_warning():
    model, x = Branches(), torch.randn(4, 8)
    ours = eager(copy.deepcopy(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert gradient_error(one_step(ours, x), one_step(model, x)) == 0
    mine = [str(w.message) for w in caught if "moonwalk" in str(w.message)]
    assert len(mine) == 1 and "Branches trains plain" in mine[0]
    assert caught[0].filename == __file__
    assert ours.plan is None


def test_with_a_budget_it_is_an_error():
    ours = eager(Branches(), budget="60%")
    for _ in range(2):
        with pytest.raises(CaptureError, match="could not be captured as one graph"):
            ours(torch.randn(4, 8))
    with pytest.raises(CaptureError):
        eager(Branches(), budget="60%", example_inputs=(torch.randn(4, 8),))


class SetsItselfUp(nn.Module):
    """Installs something in its first call, behind a lock; Dynamo captures no locks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if not self.ready:
            with LOCK:
                self.ready = True
        return torch.sin(y)


LOCK = threading.Lock()


@pytest.mark.parametrize("options", [{}, {"budget": "100%"}, {"example_inputs": (torch.randn(4, 8),)}])
def test_a_model_that_sets_itself_up_in_its_first_call(options: Any):
    model, x = SetsItselfUp(), torch.randn(4, 8)
    ours = eager(copy.deepcopy(model), **options)
    for seed in range(2):
        steps = []
        for net in (ours, model):
            torch.manual_seed(seed)
            steps.append(one_step(net, x))
        assert gradient_error(*steps) == 0
    assert ours.plan is not None
    assert all(mine.equal(true) for mine, true in zip(ours.buffers(), model.buffers(), strict=True))


def test_a_wrong_first_call_sets_nothing_up():
    ours = eager(SetsItselfUp(), budget="100%")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(torch.randn(4, 7))
    one_step(ours, torch.randn(4, 8))
    assert ours.plan is not None


logger = logging.getLogger("a library")


class Logging(nn.Module):
    """Writes to a log, as model libraries do, also by a method that they add to loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        logger.warning("training on %d rows", len(x))
        logger.warning_once("deprecated")  # type: ignore[attr-defined]
        return torch.sin(self.linear(x))


def test_logs_do_not_break_the_graph(monkeypatch: pytest.MonkeyPatch):
    @functools.lru_cache
    def warning_once(self: logging.Logger, *args: object) -> None:
        self.warning(*args)

    monkeypatch.setattr(logging.Logger, "warning_once", warning_once, raising=False)
    model, x = Logging(), torch.randn(4, 8)
    ours = eager(copy.deepcopy(model), budget="100%")
    assert gradient_error(one_step(ours, x), one_step(model, x)) == 0
    assert ours.plan is not None


def test_the_users_own_errors_are_the_users():
    """A wrong shape is reported as what it is, and the model stays compiled."""
    for options in ({}, {"budget": "100%"}):
        ours = eager(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), **options)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            ours(torch.randn(4, 7))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            plan_only(ours, (torch.randn(4, 7),), Options())
        one_step(ours, torch.randn(4, 8))
        assert ours.plan is not None


@pytest.mark.parametrize("budget", [None, "100%"])
def test_more_input_sizes_than_are_compiled(monkeypatch: pytest.MonkeyPatch, budget: str | None):
    """Those seen first keep their plans. Other models, compiled before, do not count."""
    monkeypatch.setattr(_torch_compat, "SIZES", 3)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    for _ in range(6):
        one_step(eager(copy.deepcopy(base)), torch.randn(4, 8))
    ours = eager(copy.deepcopy(base), budget=budget)
    for rows in (2, 3, 4):
        one_step(ours, torch.randn(rows, 8))
    if budget is None:
        with pytest.warns(UserWarning, match="Sequential trains plain on some inputs"):
            found = one_step(ours, x := torch.randn(5, 8))
        assert gradient_error(found, one_step(base, x)) == 0
    else:
        with pytest.raises(CaptureError, match="sizes of its inputs"):
            one_step(ours, torch.randn(5, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gradient_error(one_step(ours, x := torch.randn(3, 8)), one_step(base, x)) == 0


@pytest.mark.parametrize("way", ["wrapper", "one step"])
def test_a_part_of_plains_peak_and_a_last_batch_that_is_small(way: str):
    """Nearly all of its peak are gradients: it may have what the larger batches had."""
    base = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))

    def made() -> tuple[Any, Any]:
        model, given = copy.deepcopy(base), {"budget": "70%", "strategies": ("keep", "checkpoint")}
        if way == "wrapper":
            ours = eager(model, **given)
            return ours, lambda x: one_step(ours, x)
        step = training_step(model, lambda y, _: y.square().sum(), None, lowering="eager", **given)
        return step, lambda x: (model.zero_grad(), step(x, x), gradients(model))[-1]

    with pytest.raises(BudgetError):
        made()[1](torch.randn(2, 64))
    planned, run = made()
    for rows in (2048, 2, 1024):
        x = torch.randn(rows, 64)
        assert gradient_error(run(x), one_step(base, x)) < 1e-6
        if rows == 2048:
            granted = planned.plan.budget_bytes
        plan = planned.plan
        own = int(0.7 * plan.plain_peak_bytes)
        assert plan.peak_bytes <= plan.budget_bytes == (granted if rows == 2 else own)
        assert any("other inputs" in note for note in plan.notes) == (rows == 2)


@pytest.mark.parametrize("wrong", [nn.Linear, lambda x: x, None])
def test_what_is_no_model(wrong: Any):
    with pytest.raises(UsageError, match="no model to compile"):
        moonwalk_compile(wrong)
    with pytest.raises(UsageError, match="no model to compile"):
        training_step(wrong, None, None)
    nn.Linear(2, 2)(torch.randn(1, 2))


# -- options and torch.compile -----------------------------------------------------------------------------------------


def test_one_strategy_and_one_input_need_no_list():
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    ours = eager(copy.deepcopy(base), strategies="keep", example_inputs=torch.randn(4, 8))
    assert {segment.strategy for segment in ours.plan.segments} == {"keep"}
    for wrong in (None, "kepe", 3):
        with pytest.raises(OptionError, match="strategies"):
            eager(copy.deepcopy(base), strategies=wrong)


def test_strategies_that_cannot_train_a_model():
    with pytest.raises(OptionError, match=r'(?s)by invert alone.*allow "checkpoint" or "keep"'):
        eager(chain(), strategies="invert")(torch.randn(4, 8))


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(TypeError, match="buget"):
        moonwalk_compile(chain(), buget="60%")
    compiled = torch.compile(chain(), backend=partial(moonwalk, options={"buget": "60%"}))
    with pytest.raises(Exception, match="no option 'buget'; did you mean \"budget\"") as caught:
        compiled(torch.randn(4, 8))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), OptionError)


@pytest.mark.parametrize(
    "options",
    [{"budget": "lots"}, {"strategies": ("kepp",)}, {"max_slowdown": 0.5}, {"tolerance": 0}, {"lowering": "jit"}],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any]):
    with pytest.raises(OptionError):
        moonwalk_compile(chain(), **options)


@pytest.mark.parametrize("how", ["options", "partial"])
def test_as_a_backend(how: str):
    model, x = nn.Sequential(Block(8), Block(8), Block(8)), torch.randn(16, 8)
    options = {"budget": "80%", "lowering": "eager", "strategies": ["keep", "checkpoint"]}
    if how == "options":
        compiled = torch.compile(model, backend=moonwalk, options=options)
    else:
        compiled = torch.compile(model, backend=partial(moonwalk, options=options))
    compiled(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert gradient_error(found, one_step(model, x)) == 0


def test_as_a_backend_of_a_function():
    """A loss is compiled like a module, with dynamic shapes asked for and several sizes."""
    model = chain(2)

    @torch.compile(backend=moonwalk, options={"lowering": "eager", "strategies": ("checkpoint",)}, dynamic=True)
    def loss(x: Tensor) -> Tensor:
        return (model(x) * x.shape[0]).square().mean()

    for size in (4, 7, 4, 9):
        x = torch.randn(size, 8)
        model.zero_grad(set_to_none=True)
        loss(x).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        (model(x) * size).square().mean().backward()
        assert gradient_error(found, gradients(model)) == 0
