"""Blocks that keep as one: what lies between them is computed again, exactly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile import api, backend, moonwalk_compile, peers
from moonwalk_compile.api import fake_session
from moonwalk_compile.measure import compare_steps, measure_step
from moonwalk_compile.options import Options
from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.moves.checkpoints import Checkpoints
from moonwalk_compile.passes.moves.keeping import RUNS, Keeping
from moonwalk_compile.passes.plan import Planner
from moonwalk_compile.passes.verify import verify
from moonwalk_compile.session import Session


class Residual(nn.Module):
    """The value between two of these is a sum: it follows from what the normalizations and activations keep."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.convolution(x)) + x)


class Net(nn.Module):
    def __init__(self, depth: int = 6, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(channels) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """Where this machine multiplies fast and copies slowly, no run is worth its time."""
    for module in (api, backend):
        monkeypatch.setattr(module, "find_device", lambda name: replace(DEVICES["cpu"], datasheet=False))
    monkeypatch.setattr(Session, "_clock", lambda session: None)  # convolutions are not timed


def image() -> Tensor:
    return torch.randn(8, 3, 32, 32)


def planner_of() -> Planner:
    planner = fake_session(lambda: (Net(), (image(),)), Options(lowering="eager"), "cpu").planner
    assert planner is not None
    return planner


def test_a_run_keeps_less_than_its_blocks_one_by_one() -> None:
    planner = planner_of()
    runs = [m for at in planner.moves for m in at if m.segment.strategy == "keep" and len(m.segment.span) > 1]
    assert {len(move.segment.span) for move in runs} == {*RUNS}
    values = planner.analysis.graph.values
    for move in runs:
        between = {values[v].storage for i in move.segment.span[1:] for v in planner.analysis.blocks[i].live_in}
        assert not between <= {values[v].storage for v in move.segment.kept}


def test_every_run_can_stand_in_a_plan() -> None:
    """Its cost is found once for all that are alike; each is emitted and verified here, with its neighbours kept."""
    planner = planner_of()
    for at in planner.moves:
        for move in at:
            segment = move.segment
            if segment.strategy == "keep" and len(segment.span) > 1:
                before = [planner.maker.keeping.plain(index) for index in range(segment.first)]
                behind = [planner.maker.keeping.plain(index) for index in range(segment.last + 1, len(planner.moves))]
                found = planner.arranged([*before, segment, *behind])
                verify(planner.analysis, found.schedule)
                assert found.peak <= planner.loose.peak


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_of_runs_are_exact(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs as the only other way to keep less, a plan is made of them."""
    alone = Keeping.moves
    monkeypatch.setattr(Keeping, "moves", lambda keeping, index: alone(keeping, index)[:1])
    monkeypatch.setattr(Checkpoints, "moves", lambda checkpoints, last: [])
    monkeypatch.setattr(Checkpoints, "nested", lambda checkpoints, last: [])
    model, x = Net(), image()
    reference = peers.plain(copy.deepcopy(model), lowering)  # at kinks, other roundings are other gradients
    ours = moonwalk_compile(
        copy.deepcopy(model),
        budget="90%" if lowering == "eager" else "75%",
        lowering=lowering,
        strategies=("keep", "checkpoint"),
    )

    def loss(net: nn.Module, value: Tensor) -> Tensor:
        return net(value)

    comparison = compare_steps(ours, reference, loss, (x,))
    assert comparison.gradient_error <= (0 if lowering == "eager" else 1e-5)
    assert any(row.blocks > 1 for row in ours.plan.segments if row.strategy == "keep")

    def step() -> None:
        ours(x).backward()

    step()
    ours.zero_grad(set_to_none=True)
    assert measure_step(step).peak_bytes <= ours.plan.peak_bytes <= ours.plan.budget_bytes
