"""Rules that users register for their own operations, and the public tester."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile import UsageError, moonwalk_compile
from moonwalk_compile.measure import compare_steps
from moonwalk_compile.passes.inverse import CUSTOM
from moonwalk_compile.rules import Call, Recipe, register_inverse, register_vijp
from moonwalk_compile.testing import check_rule

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(scope="module", autouse=True)
def operations() -> Iterator[None]:
    """`soft` is asinh, with a backward operation of its own; `exp` is no exponential, and `bernoulli` draws nothing."""
    library = torch.library.Library("moonwalk_rules", "DEF")
    library.define("soft(Tensor x) -> Tensor")
    library.define("soft_backward(Tensor h, Tensor x) -> Tensor")
    library.define("exp(Tensor x) -> Tensor")
    library.define("bernoulli(Tensor x) -> Tensor")
    library.impl("soft", torch.asinh, "CompositeExplicitAutograd")
    library.impl("soft_backward", lambda h, x: h / (1 + x * x).sqrt(), "CompositeExplicitAutograd")
    library.impl("exp", torch.sin, "CompositeExplicitAutograd")
    library.impl("bernoulli", lambda x: 2 * x, "CompositeExplicitAutograd")
    for name in ("soft", "exp", "bernoulli"):
        torch.library.register_fake(f"moonwalk_rules::{name}", torch.empty_like, lib=library)
    torch.library.register_fake("moonwalk_rules::soft_backward", lambda h, x: torch.empty_like(h), lib=library)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def soft_backward(context: Any, h: Tensor) -> Tensor:
        return torch.ops.moonwalk_rules.soft_backward(h, *context.saved_tensors)

    def exp_backward(context: Any, h: Tensor) -> Tensor:
        return h * context.saved_tensors[0].cos()

    derivatives = {"soft": soft_backward, "exp": exp_backward, "bernoulli": lambda _, h: 2 * h}
    for name, backward in derivatives.items():
        torch.library.register_autograd(f"moonwalk_rules::{name}", backward, setup_context=keep, lib=library)
    yield
    library._destroy()


@pytest.fixture
def soft_rules() -> Iterator[None]:
    @register_inverse("moonwalk_rules::soft")
    def soft(call: Call) -> Iterator[Recipe]:
        yield Recipe((0,), torch.sinh)

    @register_vijp(torch.ops.moonwalk_rules.soft_backward)
    def soft_backward(call: Call) -> Iterator[Recipe]:
        yield Recipe((0,), lambda g, x: g * (1 + x * x).sqrt(), (1,))

    yield
    CUSTOM.clear()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(12))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.ops.moonwalk_rules.soft(layer(x))
        return x


def test_the_public_tester_accepts_right_rules(soft_rules: None) -> None:
    used = check_rule(lambda x: torch.ops.moonwalk_rules.soft(x), torch.randn(5, 7))
    assert {"inverse of moonwalk_rules::soft", "inverse of moonwalk_rules::soft_backward"} <= used


def test_the_public_tester_finds_wrong_rules() -> None:
    register_inverse("moonwalk_rules::soft", lambda call: iter([Recipe((0,), torch.tanh)]))
    try:
        with pytest.raises(AssertionError, match="relative error"):
            check_rule(lambda x: torch.ops.moonwalk_rules.soft(x), torch.randn(5, 7), vijp=False)
        with pytest.raises(AssertionError, match="must be refused"):
            check_rule(lambda x: torch.ops.moonwalk_rules.soft(x), torch.randn(5, 7), invert=False, vijp=False)
    finally:
        CUSTOM.clear()


def test_a_registered_rule_makes_segments_invertible(soft_rules: None) -> None:
    model, x = Net(), torch.randn(256, 32)
    ours = moonwalk_compile(copy.deepcopy(model), strategies=("invert", "checkpoint"), max_slowdown=2, lowering="eager")
    found = compare_steps(ours, model, lambda net, x: net(x).square().mean(), [x])
    assert "invert" in {segment.strategy for segment in ours.plan.segments}
    assert found.gradient_error < 1e-4


def test_a_wrong_rule_is_not_certified() -> None:
    register_inverse("moonwalk_rules::soft", lambda call: iter([Recipe((0,), lambda y: 1.01 * torch.sinh(y))]))
    try:
        model, x = Net(), torch.randn(256, 32)
        ours = moonwalk_compile(copy.deepcopy(model), strategies=("invert", "checkpoint"), lowering="eager")
        assert compare_steps(ours, model, lambda net, x: net(x).square().mean(), [x]).exact
        assert {segment.strategy for segment in ours.plan.segments} == {"checkpoint"}
    finally:
        CUSTOM.clear()


def test_without_a_rule_it_is_computed_again() -> None:
    model, x = Net(), torch.randn(256, 32)
    ours = moonwalk_compile(copy.deepcopy(model), strategies=("invert", "checkpoint"), lowering="eager")
    assert compare_steps(ours, model, lambda net, x: net(x).square().mean(), [x]).exact
    assert {segment.strategy for segment in ours.plan.segments} == {"checkpoint"}


@pytest.mark.parametrize("name", ["exp", "bernoulli"])
def test_a_namesake_of_an_aten_operation_is_not_taken_for_it(name: str) -> None:
    """sin under the name of exp has no inverse, and twice x is not drawn from 0 and 1."""
    operation = getattr(torch.ops.moonwalk_rules, name)

    class Namesake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * operation(self.linear(x))

    model, x = Namesake(), torch.randn(64, 16)
    if name == "exp":
        check_rule(lambda x: operation(x), torch.randn(4, 4), invert=False)
    for strategy in ("keep", "checkpoint"):
        torch._dynamo.reset()
        ours = moonwalk_compile(copy.deepcopy(model), max_slowdown=3, strategies=(strategy,), lowering="eager")
        assert compare_steps(ours, model, lambda net, x: net(x).sum(), [x]).gradient_error < 1e-6


@pytest.mark.parametrize("wrong", ["soft", "moonwalk_rules::missing", "nowhere::soft", 3, torch.exp])
def test_what_is_no_operation_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="namespace::name"):
        register_inverse(wrong, lambda call: iter(()))


def test_rules_of_our_own_stay() -> None:
    with pytest.raises(UsageError, match="rule of moonwalk_compile's own"):
        register_inverse(torch.ops.aten.exp.default, lambda call: iter(()))
