"""Training spoils conditioning: chains that drift are found at every step, and demoted before gradients suffer."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.anchor import Anchor
from moonwalk_compile.measure import gradient_error, gradients
from moonwalk_compile.passes.drift import SAMPLE, comparer, sampler, steps_of
from moonwalk_compile.session import Session

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Arsinh(nn.Module):
    """Smooth and invertible: at a kink, noise of any size would pick another subgradient."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def chain(activation: Callable[[], nn.Module], depth: int = 10, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        nn.init.orthogonal_(linear.weight)
        layers += [linear, activation()]
    return nn.Sequential(*layers)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def train(model: nn.Module, steps: int) -> tuple[float, list[str]]:
    """The largest gradient error of all steps, and what was warned of: Adam at a rate that ruins the weights."""
    plain = copy.deepcopy(model)
    moonwalk_compile(model, strategies=("invert", "keep"), lowering="eager", max_slowdown=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batch = torch.randn(256, 32), torch.randn(256, 32)
    worst, said = 0.0, []
    for _ in range(steps):
        plain.load_state_dict(model.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for each in (model, plain):
                each.zero_grad()
                loss_of(each, *batch).backward()
        worst = max(worst, gradient_error(gradients(model), gradients(plain)))
        said += [str(warning.message) for warning in caught]
        optimizer.step()
    return worst, said


def test_a_net_whose_weights_grow_ill_conditioned_is_demoted_in_time() -> None:
    model = chain(Arsinh, depth=20)
    error, said = train(model, steps=30)
    assert error < 1e-3
    assert said and all("inversion would now cause a gradient error" in line for line in said)
    inverted = sum(segment.blocks for segment in model.plan.segments if segment.strategy == "invert")
    assert inverted < 17, "some of the chain was demoted"


def test_without_the_watch_the_same_training_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates that are measured now and then would come too late."""
    monkeypatch.setattr(Session, "drifts", lambda session: {})
    error, _ = train(chain(Arsinh, depth=20), steps=30)
    assert error > 1e-3


@pytest.mark.parametrize(
    ("activation", "strategy", "lowering"),
    [
        (Arsinh, "invert", "eager"),
        (Absolute, "moonwalk", "eager"),
        (Absolute, "moonwalk", "inductor"),
        pytest.param(Arsinh, "invert", "inductor", marks=pytest.mark.slow),
    ],
)
def test_every_chain_is_watched(
    monkeypatch: pytest.MonkeyPatch, activation: type, strategy: str, lowering: str
) -> None:
    seen: list[dict[object, float]] = []
    drifts = Session.drifts

    def asked(session: Session) -> dict[object, float]:
        seen.append(drifts(session))
        return seen[-1]

    monkeypatch.setattr(Session, "drifts", asked)
    model = moonwalk_compile(
        chain(activation), strategies=(strategy, "keep"), lowering=lowering, max_slowdown=3, tolerance=1e-3
    )
    x, y = torch.randn(256, 32), torch.randn(256, 32)
    for _ in range(3):
        loss_of(model, x, y).backward()
    chains = [segment for segment in model.plan.segments if segment.strategy == strategy]
    assert chains and len(seen[-1]) == len(chains)
    assert all(0 < size < 1e-3 for size in seen[-1].values())


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4096, 256), (16, 512, 128), (1, 3, 224, 224), (2,) * 15])
def test_samples_are_small_and_spread(shape: tuple[int, ...]) -> None:
    sample = sampler(shape)(torch.arange(float(math.prod(shape))).reshape(shape))
    assert min(math.prod(shape), SAMPLE // 2) <= sample.numel() <= 2 * SAMPLE
    assert sample.is_contiguous()
    assert all(step <= size for step, size in zip(steps_of(shape), shape, strict=True))


def test_the_distance_is_relative_and_ties_are_left_out() -> None:
    true = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    shape = tuple(true.shape)
    sample = sampler(shape)(true)
    assert comparer(shape, ties=False)(sample, 1.5 * true).item() == pytest.approx(0.5)
    torn = true.clone()
    torn[0] = 100
    assert comparer(shape, ties=False)(sample, torn) > 1
    assert comparer(shape, ties=True)(sample, torn) == 0
    assert comparer(shape, ties=True)(torch.zeros_like(sample), torch.zeros(shape)) == 0
    assert not comparer(shape, ties=False)(sample, true / 0) <= 1


@pytest.mark.parametrize(("activation", "factor"), [(Arsinh, 8), (partial(nn.LeakyReLU, 0.5), 0.25)])
def test_weights_that_are_loaded_in_between(activation: Callable[[], nn.Module], factor: float) -> None:
    """The very first step with them is right: certificates are measured anew before it runs."""
    model = chain(activation)
    plain = copy.deepcopy(model)
    moonwalk_compile(model, strategies=("invert", "keep"), lowering="eager", max_slowdown=3)
    batch = torch.randn(256, 32), torch.randn(256, 32)
    loss_of(model, *batch).backward()
    loaded = {name: factor * value for name, value in plain.state_dict().items()}
    for each in (model, plain):
        each.load_state_dict(loaded)
        each.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in (model, plain):
            loss_of(each, *batch).backward()
    assert gradient_error(gradients(model), gradients(plain)) < 1e-4
    assert not any("may be wrong" in str(warning.message) for warning in caught)


def anchor(*inputs: Tensor) -> Anchor:
    return Anchor(inputs, range(len(inputs) - 1), [len(inputs) - 1])


@pytest.mark.parametrize("shape", [(64, 64), (7,), (3, 4, 2), (2048,)])
def test_far_is_a_good_part_of_a_parameter(shape: tuple[int, ...]) -> None:
    weight, x = torch.randn(shape), torch.randn(8, 16)
    near = anchor(weight, x)
    assert not near.is_far((weight, x)) and not near.is_far((1.3 * weight, x)) and near.is_far((3 * weight, x))
    assert near.is_far((0.3 * weight, x)) and near.is_far((torch.randn(shape), x))
    near.set((3 * weight, x))
    assert not near.is_far((3 * weight, x)) and near.is_far((weight, x))


def test_a_bias_may_begin_at_zero() -> None:
    bias, weight, x = torch.zeros(64), torch.zeros(8, 8), torch.zeros(3)
    near = anchor(bias, weight, x)
    assert not near.is_far((bias + 0.03, weight, x)) and near.is_far((bias + 0.2, weight, x))
    assert near.is_far((bias, weight + 1e-5, x))


def test_sizes_of_inputs_that_were_seen_before_are_near() -> None:
    weight, x = torch.randn(8, 8), torch.randn(50, 8).t()
    near = anchor(weight, x)
    assert not near.is_far((weight, 1.8 * x)) and near.is_far((weight, 10 * x))
    near.set((weight, 10 * x))
    assert not near.is_far((weight, x)) and not near.is_far((weight, 15 * x)) and near.is_far((weight, 0.1 * x))


def test_where_looking_waits_for_the_device_the_writes_are_counted() -> None:
    weight, x = torch.randn(8, 8), torch.randn(3)
    near = anchor(weight, x)
    near.on_cpu = False
    for _ in range(3):
        weight.add_(1e-3)
        assert not near.is_far((weight, x))
    weight.mul_(5)  # one write, as always
    assert not near.is_far((weight, x))
    weight.add_(0).add_(0)
    assert near.is_far((weight, x))


def test_a_step_that_a_sudden_change_has_spoilt_is_named_at_once() -> None:
    model = chain(Arsinh, depth=6, width=16)
    moonwalk_compile(model, strategies=("invert", "keep"), lowering="eager", max_slowdown=10)
    x = torch.randn(64, 16)
    model(x).sum().backward()
    assert "invert" in {segment.strategy for segment in model.plan.segments}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[0].copy_(parameter[1] * (1 + 1e-6))
    with pytest.warns(UserWarning, match="gradients of this step may be wrong"):
        model(x).sum().backward()
