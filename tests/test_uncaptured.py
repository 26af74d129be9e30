"""Models with branches on data: flags are decided while tracing, other breaks leave checkpoints."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile import CaptureError, moonwalk_compile
from moonwalk_compile.measure import compare_steps
from moonwalk_compile.uncaptured import decided, flags_of

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class ActNorm(nn.Module):
    """Initialises itself from its first batch, as the flow libraries do."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialized:
            with torch.no_grad():
                self.scale.data = 1 / x.std(0)
                self.shift.data = -x.mean(0)
                self.initialized.data = torch.tensor(True)
        return (x * self.scale + self.shift).tanh()


class Branching(nn.Module):
    """A branch on the data itself, and running statistics."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(features, 4 * features), nn.BatchNorm1d(4 * features)
        self.back = nn.Linear(4 * features, features)

    def inverse(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x)).relu().exp().tanh()
        return x + self.back(y) if y.sum() > 0 else x

    def forward(self, x: Tensor) -> Tensor:
        return self.inverse(x)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if isinstance(block, ActNorm) else block.inverse(x)
        return x


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


class Masked(nn.Module):
    """How many rows the second layer gets, only the data tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y[x[:, 0] > 0])


def test_sizes_that_depend_on_data_are_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    with pytest.raises(CaptureError, match=r"sizes depend on data .*self\.second\(y\[x\[:, 0\] > 0\]\)"):
        loss(moonwalk_compile(Masked(), lowering="eager", budget="90%"), x)
    base = Masked()
    model = moonwalk_compile(copy.deepcopy(base), lowering="eager")
    with pytest.warns(UserWarning, match="trains plain.*sizes depend on data"):
        loss(model, x).backward()
    model.zero_grad()
    assert compare_steps(model, base, loss, [x]).exact


def test_a_model_that_initialises_itself_is_compiled_afterwards() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(ActNorm(8), nn.Linear(8, 8), ActNorm(8)), torch.randn(16, 8)
    model, reference = moonwalk_compile(copy.deepcopy(base), lowering="eager"), copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model, x), loss(reference, x)
        assert model.plan is None and all(flag.value for flag in flags_of(model))
        model.zero_grad()
        assert compare_steps(model, reference, loss, [x]).exact
    assert model.plan is not None
    assert isinstance(model[0].initialized, Tensor)
    assert model.state_dict().keys() == base.state_dict().keys()


def test_a_flag_is_hidden_only_while_decided() -> None:
    model = nn.Sequential(ActNorm(2), nn.BatchNorm1d(2))
    flags = flags_of(model)
    assert [flag.name for flag in flags] == ["initialized"]  # a counter is none
    with decided(flags):
        assert model[0].initialized is False
    assert isinstance(model[0].initialized, Tensor)
