"""A generated training step leaves behind what eager PyTorch leaves behind, and holds no gradients meanwhile."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moonwalk_compile import BudgetError, CaptureError, UsageError, moonwalk_compile, training_step
from moonwalk_compile.measure import gradient_error, measure_step
from moonwalk_compile.updates import PER_PARAMETER, Updater

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
}
EXACT = ("keep", "checkpoint")


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


class GPTBlock(nn.Module):
    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.dropout = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6 * 16, 4)),
    )


class Couplings(nn.Module):
    def __init__(self, depth: int = 6, width: int = 8) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.g = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class Abs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def orthogonal(depth: int = 6, width: int = 16) -> nn.Module:
    layers = [nn.Linear(width, width) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return nn.Sequential(*(part for layer in layers for part in (layer, Abs())))


def mlp(depth: int = 2, width: int = 6) -> nn.Module:
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width), nn.GELU())))


class Reassigned(nn.Module):
    """A running mean that is made anew in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return (y - self.mean).tanh()


def spectral() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(6, 6)), nn.Tanh(), norm(nn.Linear(6, 6)))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor]]] = {
    "gpt": (lambda: nn.Sequential(GPTBlock(), GPTBlock()), (floats(2, 5, 8), floats(2, 5, 8))),
    "dropout": (lambda: GPTBlock(dropout=0.3), (floats(2, 5, 8), floats(2, 5, 8))),
    "convolutions": (convolutions, (floats(4, 3, 8, 8), floats(4, 4))),
    "mlp": (mlp, (floats(5, 6), floats(5, 6))),
    "reassigned": (Reassigned, (floats(5, 6), floats(5, 6))),
    "spectral": (spectral, (floats(5, 6), floats(5, 6))),
}


def eager_step(model: nn.Module, optimizer: Optimizer | None, *inputs: Tensor) -> Tensor:
    loss = F.mse_loss(model(*inputs[:-1]), inputs[-1])
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def same_state(ours: Optimizer, theirs: Optimizer) -> None:
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == reference["param_groups"]
    assert mine["state"].keys() == reference["state"].keys()
    for key, entries in reference["state"].items():
        assert mine["state"][key].keys() == entries.keys()
        for name, value in entries.items():
            found = mine["state"][key][name]
            assert found.equal(value) if isinstance(value, Tensor) else found == value


def same_model(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, mine), reference in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert mine.equal(reference), name


def both(model: nn.Module, make: Make) -> tuple[nn.Module, Optimizer, nn.Module, Optimizer]:
    ours = copy.deepcopy(model)
    # One parameter at a time in the reference too: several at once may be rounded otherwise.
    return ours, make(ours.parameters(), foreach=False), model, make(model.parameters(), foreach=False)


# -- what is left behind -----------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow
EQUAL = [
    ("gpt", "AdamW", "checkpoint"),
    *(("mlp", name, "checkpoint") for name in OPTIMIZERS),
    ("convolutions", "momentum", "keep"),
    ("dropout", "SGD", "checkpoint"),
    ("reassigned", "momentum", "checkpoint"),
    ("spectral", "Adam", "checkpoint"),
    *(pytest.param("convolutions", name, "checkpoint", marks=SLOW) for name in OPTIMIZERS),
    *(pytest.param("gpt", name, "keep", marks=SLOW) for name in OPTIMIZERS),
]


@pytest.mark.parametrize(("case", "optimizer", "strategy"), EQUAL)
def test_three_steps_are_those_of_eager(case: str, optimizer: str, strategy: str):
    build, inputs = CASES[case]
    ours, my_optimizer, model, reference = both(build(), OPTIMIZERS[optimizer])
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=(strategy,), lowering="eager")
    for seed in range(3):
        torch.manual_seed(seed)
        loss = step(*inputs)
        torch.manual_seed(seed)
        assert loss.equal(eager_step(model, reference, *inputs)) and not loss.requires_grad
        same_model(ours, model)
        assert all(parameter.grad is None for parameter in ours.parameters())
    same_state(my_optimizer, reference)


@pytest.mark.parametrize("kind", PER_PARAMETER)
def test_every_known_optimizer_one_parameter_at_a_time(kind: type[Optimizer]):
    def gradients(step: int) -> list[Tensor]:
        return [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for shape in ((4, 3), (5,))]

    ours, theirs = ([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))] for _ in range(2))
    options = {"lr": 0.05, **({} if kind is torch.optim.Rprop else {"weight_decay": 0.1})}
    mine, reference = (kind(parameters, foreach=False, **options) for parameters in (ours, theirs))
    updater = Updater(mine)
    assert all(bytes_held >= 0 for bytes_held in updater.workspaces([0, 1]).values())
    for number in range(3):
        updater.begin()
        for place in (1, 0):
            updater.update(place, ours[place], gradients(number)[place])
        for parameter, gradient in zip(theirs, gradients(number), strict=True):
            parameter.grad = gradient
        reference.step()
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    same_state(mine, reference)


INVERTED = {
    "invert": (Couplings, ("invert", "checkpoint")),
    "moonwalk": (lambda: orthogonal(5), ("moonwalk", "keep")),
}


@pytest.mark.parametrize("strategy", INVERTED)
def test_inverted_steps(strategy: str):
    """Parameters change while the sweep still solves for what comes next."""
    build, strategies = INVERTED[strategy]
    inputs = floats(256, 16), floats(256, 16)
    ours, my_optimizer, model, reference = both(build(), OPTIMIZERS["momentum"])
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=strategies, max_slowdown=20, lowering="eager")
    for _ in range(3):
        step(*inputs), eager_step(model, reference, *inputs)
    assert strategy in {segment.strategy for segment in step.plan.segments}
    assert all(not segment.provisional for segment in step.plan.segments)
    moved, expected = (
        {name: parameter.detach() - start[name] for name, parameter in net.named_parameters()} for net in (ours, model)
    )
    assert gradient_error(moved, expected) < 1e-4
    assert measure_step(lambda: step(*inputs)).peak_bytes == pytest.approx(step.plan.peak_bytes, rel=0.01)


def test_certificates_are_measured_again():
    """At the tenth step the weights are no longer orthogonal: the step is planned anew, and stays right."""
    inputs = floats(256, 16), floats(256, 16)
    ours, my_optimizer, model, reference = both(orthogonal(4), partial(torch.optim.SGD, lr=1e-3))
    step = training_step(
        ours, F.mse_loss, my_optimizer, strategies=("moonwalk", "keep"), max_slowdown=20, lowering="eager"
    )
    for _ in range(9):
        step(*inputs), eager_step(model, reference, *inputs)
    assert "moonwalk" in {segment.strategy for segment in step.plan.segments}
    for net in (ours, model):
        with torch.no_grad():
            for layer in net[::2]:
                layer.weight[:8] *= 1e-4
    with pytest.warns(UserWarning, match="planning again"):
        step(*inputs)
    eager_step(model, reference, *inputs)
    assert {segment.strategy for segment in step.plan.segments} == {"keep"}
    mine, theirs = (dict(net.named_parameters()) for net in (ours, model))
    assert gradient_error(mine, theirs) < 1e-4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_without_an_optimizer_gradients_accumulate():
    """Also beyond the step: an input need not be a leaf."""
    model, (x, target) = CASES["gpt"][0](), CASES["gpt"][1]
    ours = copy.deepcopy(model)
    step = training_step(ours, F.mse_loss, strategies=EXACT, lowering="eager")
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        assert step(mine.sin(), target).equal(eager_step(model, None, theirs.sin(), target))
    assert mine.grad.equal(theirs.grad)
    assert all(a.grad.equal(b.grad) for a, b in zip(ours.parameters(), model.parameters(), strict=True))


def test_parameters_of_nobody_get_their_gradient():
    ours, theirs = mlp(), mlp()
    theirs.load_state_dict(ours.state_dict())
    inputs = CASES["mlp"][1]
    mine, reference = (torch.optim.SGD(net[0].parameters(), lr=0.1) for net in (ours, theirs))
    step = training_step(ours, F.mse_loss, mine, strategies=EXACT, lowering="eager")
    for _ in range(2):
        step(*inputs), eager_step(theirs, reference, *inputs)
    same_model(ours, theirs)
    assert ours[0].weight.grad is None and ours[2].weight.grad.equal(theirs[2].weight.grad)


def test_gradients_from_before_are_added():
    ours, my_optimizer, model, reference = both(mlp(), OPTIMIZERS["SGD"])
    inputs = CASES["mlp"][1]
    gather = training_step(ours, F.mse_loss, strategies=EXACT, lowering="eager")
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=EXACT, lowering="eager")
    gather(*inputs), step(*inputs)
    eager_step(model, None, *inputs), eager_step(model, reference, *inputs)
    same_model(ours, model)


# -- memory ------------------------------------------------------------------------------------------------------------


def deep(width: int = 32) -> nn.Module:
    return nn.Sequential(*(part for _ in range(64) for part in (nn.Linear(width, width), nn.GELU())))


def deep_peak(optimizer: type[Optimizer] | None, lowering: str) -> tuple[int, int]:
    """Measured peak and bytes of the gradients of 64 layers; the plan must have said so."""
    model, inputs = deep(), (floats(16, 32), floats(16, 32))
    made = None if optimizer is None else optimizer(model.parameters(), lr=0.1)
    step = training_step(model, F.mse_loss, made, strategies=("checkpoint",), max_slowdown=20, lowering=lowering)
    step(*inputs)
    model.zero_grad(set_to_none=True)
    measured = measure_step(lambda: step(*inputs)).peak_bytes
    assert measured == pytest.approx(step.plan.peak_bytes, rel=0.01)
    return measured, sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def test_the_bytes_of_gradients_are_gone_from_the_peak():
    """Gradients that are kept to the end of a step would hold all their bytes there."""
    peak, gradient_bytes = deep_peak(torch.optim.SGD, "eager")
    assert peak < 0.25 * gradient_bytes


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_with_and_without_the_optimizer(lowering: str):
    peak, gradient_bytes = deep_peak(torch.optim.SGD, lowering)
    torch._dynamo.reset()
    without, _ = deep_peak(None, lowering)
    assert without > gradient_bytes and peak < without - 0.95 * gradient_bytes


def test_a_budget_below_the_gradients():
    model, inputs = mlp(12, 32), (floats(16, 32), floats(16, 32))
    gradient_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    budget = gradient_bytes // 2
    step = training_step(model, F.mse_loss, optimizer, budget=budget, strategies=EXACT, lowering="eager")
    for _ in range(2):
        step(*inputs)
    measured = measure_step(lambda: step(*inputs)).peak_bytes
    assert measured <= budget == step.plan.budget_bytes
    assert measured == pytest.approx(step.plan.peak_bytes, rel=0.01) == step.plan.measured_peak_bytes
    with pytest.raises(BudgetError):
        training_step(model, F.mse_loss, optimizer, budget=1000, lowering="eager", example_inputs=inputs)


def test_planning_ahead_runs_nothing():
    model, inputs = mlp(), CASES["mlp"][1]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    step = training_step(model, F.mse_loss, optimizer, strategies=EXACT, lowering="eager", example_inputs=inputs)
    peak = step.plan.peak_bytes
    assert "4 parameters are updated within the step, no gradients remain" in step.plan.notes
    assert not optimizer.state and all(value.equal(before[name]) for name, value in model.state_dict().items())
    step(*inputs)
    assert step.plan.peak_bytes == peak and "update" in step.graph_module.code


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


def test_planning_ahead_on_one_tensor_given_bare():
    model, x = nn.Sequential(nn.Linear(4, 4), Square()), torch.randn(3, 4)
    plans = [training_step(model, lowering="eager", example_inputs=given).plan for given in (x, (x,))]
    assert plans[0].peak_bytes == plans[1].peak_bytes


# -- parameters that are special ---------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight is read first and last: its update waits for both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 6), mlp(), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(self.embed(tokens))), tokens)


@pytest.mark.parametrize("strategy", EXACT)
def test_tied_parameters(strategy: str):
    tokens = torch.arange(7)
    ours, my_optimizer, model, reference = both(Tied(), OPTIMIZERS["Adam"])
    step = training_step(ours, None, my_optimizer, strategies=(strategy,), lowering="eager")
    for _ in range(3):
        loss = step(tokens)
        expected = model(tokens)
        expected.backward()
        reference.step(), reference.zero_grad()
        assert loss.equal(expected)
    same_model(ours, model)
    assert "5 parameters are updated within the step, no gradients remain" in step.plan.notes


class Overwriting(nn.Module):
    """The forward pass itself overwrites a parameter, before or after it has been read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "before":
            with torch.no_grad():
                self.first.weight.clamp_(-0.1, 0.1)
        x = self.second(torch.tanh(self.first(x)))
        if self.how == "after":
            with torch.no_grad():
                self.second.bias.mul_(0.5)
        if self.how == "data":
            self.second.bias.data.mul_(0.5)
        return x


@pytest.mark.parametrize("how", ["before", "after"])
def test_parameters_that_the_model_overwrites(how: str):
    ours, my_optimizer, model, reference = both(Overwriting(how), OPTIMIZERS["momentum"])
    inputs = CASES["mlp"][1]
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=("checkpoint",), lowering="eager")
    for _ in range(3):
        step(*inputs), eager_step(model, reference, *inputs)
    same_model(ours, model)


def test_overwriting_behind_the_back_of_autograd_is_refused():
    """AOTAutograd would write such a parameter after the step, over its update."""
    model = Overwriting("data")
    step = training_step(model, F.mse_loss, OPTIMIZERS["SGD"](model.parameters()), lowering="eager")
    with pytest.raises(UsageError, match="an input that requires a gradient is overwritten"):
        step(*CASES["mlp"][1])


def test_memory_shared_by_two_parameters_is_refused():
    model, inputs = mlp(), CASES["mlp"][1]
    model[2].weight = nn.Parameter(model[0].weight.detach())
    step = training_step(model, F.mse_loss, OPTIMIZERS["SGD"](model.parameters()), lowering="eager")
    before = model[0].weight.detach().clone()
    with pytest.raises(UsageError, match="share memory, and are not one parameter"):
        step(*inputs)
    assert model[0].weight.equal(before)


def test_an_input_in_the_memory_of_a_parameter_is_refused():
    model = mlp()
    step = training_step(model, F.mse_loss, OPTIMIZERS["SGD"](model.parameters()), lowering="eager")
    step(*CASES["mlp"][1])
    with pytest.raises(UsageError, match="shares memory with a parameter"):
        step(model[0].weight.detach()[:5], floats(5, 6))


def test_parameters_may_be_replaced_and_added():
    ours, my_optimizer, model, reference = both(mlp(), OPTIMIZERS["momentum"])
    inputs = CASES["mlp"][1]
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=EXACT, lowering="eager")
    step(*inputs), eager_step(model, reference, *inputs)
    for net, optimizer in ((ours, my_optimizer), (model, reference)):
        net[2].weight = nn.Parameter(torch.eye(6))
        optimizer.add_param_group({"params": [net[2].weight], "lr": 0.5})
    for _ in range(2):
        step(*inputs), eager_step(model, reference, *inputs)
    same_model(ours, model)


# -- optimizers and schedulers -----------------------------------------------------------------------------------------


def test_a_scheduler_and_a_loaded_state():
    ours, my_optimizer, model, reference = both(mlp(), OPTIMIZERS["AdamW"])
    inputs = CASES["mlp"][1]
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=EXACT, lowering="eager")
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (my_optimizer, reference)]
    for number in range(4):
        step(*inputs), eager_step(model, reference, *inputs)
        for scheduler in schedulers:
            scheduler.step()
        if number == 1:
            for optimizer in (my_optimizer, reference):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    same_model(ours, model)
    same_state(my_optimizer, reference)


def test_clipping_by_the_common_norm():
    ours, my_optimizer, model, reference = both(mlp(), OPTIMIZERS["momentum"])
    inputs = CASES["mlp"][1]
    step = training_step(ours, F.mse_loss, my_optimizer, clip_norm=0.01, strategies=EXACT, lowering="eager")
    for _ in range(3):
        step(*inputs)
        F.mse_loss(model(inputs[0]), inputs[1]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        reference.step(), reference.zero_grad()
    same_model(ours, model)
    assert any("none is freed early" in note for note in step.plan.notes)


class Unknown(torch.optim.SGD):
    pass


REFUSED: dict[str, tuple[Callable[[list[nn.Parameter]], Any], str]] = {
    "LBFGS": (torch.optim.LBFGS, "several times in a step"),
    "SparseAdam": (torch.optim.SparseAdam, "sparse gradients"),
    "a subclass": (partial(Unknown, lr=0.1), "Unknown is not known to update each parameter by itself"),
    "differentiable": (partial(torch.optim.SGD, lr=0.1, differentiable=True), "it is differentiable"),
    "something else": (lambda parameters: "SGD", "the optimizer is a str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_optimizers_that_are_refused(case: str):
    make, reason = REFUSED[case]
    model = mlp()
    with pytest.raises(UsageError, match=reason):
        training_step(model, F.mse_loss, make(list(model.parameters())))


def test_hooks_are_refused_whenever_they_come():
    model, inputs = mlp(), CASES["mlp"][1]
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    step = training_step(model, F.mse_loss, optimizer, strategies=EXACT, lowering="eager")
    step(*inputs)
    before = copy.deepcopy(model.state_dict())
    for register in (
        lambda: optimizer.register_step_pre_hook(lambda *_: None),
        lambda: optimizer.register_step_post_hook(lambda *_: None),
        lambda: register_optimizer_step_pre_hook(lambda *_: None),
        lambda: model[0].weight.register_hook(lambda gradient: 2 * gradient),
        lambda: model[0].weight.register_post_accumulate_grad_hook(lambda _: None),
    ):
        handle = register()
        with pytest.raises(UsageError, match="hooks"):
            step(*inputs)
        handle.remove()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    step(*inputs)


# -- calls that are refused --------------------------------------------------------------------------------------------


def test_the_loss_must_be_one_number():
    model, inputs = mlp(), CASES["mlp"][1]
    step = training_step(model, lambda y, _: y, OPTIMIZERS["SGD"](model.parameters()), lowering="eager")
    with pytest.raises(UsageError, match=r"the loss has the shape \(5, 6\)"):
        step(*inputs)
    step = training_step(model.requires_grad_(False), F.mse_loss, lowering="eager")
    with pytest.raises(UsageError, match="does not depend on any parameter"):
        step(*inputs)


def test_other_wrong_calls():
    model, inputs = mlp(), CASES["mlp"][1]
    with pytest.raises(UsageError, match="clip_norm without an optimizer"):
        training_step(model, F.mse_loss, clip_norm=1.0)
    with pytest.raises(UsageError, match="gradients of a distributed model"):
        training_step(nn.DataParallel(model), F.mse_loss)
    with pytest.raises(UsageError, match="compiled already"):
        training_step(moonwalk_compile(copy.deepcopy(model)), F.mse_loss)

    def breaks(y: Tensor, target: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return F.mse_loss(y, target)

    with pytest.raises(CaptureError, match="one graph"):
        training_step(model, breaks, lowering="eager")(*inputs)


class SetsItselfUp(nn.Module):
    """Behind a lock, which Dynamo cannot capture."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.ready = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with LOCK:
                self.ready = True
        return self.layers(x)


LOCK = threading.Lock()


def test_a_model_that_sets_itself_up_in_its_first_call():
    ours, my_optimizer, model, reference = both(SetsItselfUp(), OPTIMIZERS["momentum"])
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=EXACT, lowering="eager")
    for _ in range(2):
        step(floats(4, 6), floats(4, 6))
        eager_step(model, reference, floats(4, 6), floats(4, 6))
    same_model(ours, model)


# -- ways to use it ----------------------------------------------------------------------------------------------------


def test_other_sizes_eval_mode_and_frozen_parts():
    ours, my_optimizer, model, reference = both(nn.Sequential(mlp(), nn.Dropout(0.5)), OPTIMIZERS["momentum"])
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=EXACT, lowering="eager")
    for seed, batch in enumerate((3, 4, 3)):
        for net in (ours, model):
            net.train(batch == 3)
            net[0][0].requires_grad_(seed < 2)
        torch.manual_seed(seed)
        step(floats(batch, 6), floats(batch, 6))
        torch.manual_seed(seed)
        eager_step(model, reference, floats(batch, 6), floats(batch, 6))
    same_model(ours, model)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlp", "convolutions", "gpt"])
def test_through_inductor(case: str):
    build, inputs = CASES[case]
    ours, my_optimizer, model, reference = both(build(), OPTIMIZERS["AdamW"])
    step = training_step(ours, F.mse_loss, my_optimizer, strategies=EXACT)
    for _ in range(2):
        assert torch.allclose(step(*inputs), eager_step(model, reference, *inputs), rtol=1e-4)
    first, second = ({k: v.double() for k, v in o.state_dict()["state"][0].items()} for o in (my_optimizer, reference))
    assert gradient_error(first, second) < 1e-4
    assert all(p.grad is None for p in ours.parameters())
