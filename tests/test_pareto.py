"""`moonwalk pareto`: the front falls in peak, rises in time, and every point can be had."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import gpt
from moonwalk_compile.api import model_front, plan_model
from moonwalk_compile.cli import main
from moonwalk_compile.errors import BudgetError
from moonwalk_compile.front import CHECKPOINT, Point, repeated_module, undominated
from moonwalk_compile.options import Options

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def build():
    return gpt.build(blocks=4, width=32, heads=2, batch=2, tokens=32)


@pytest.fixture
def target(tmp_path: Path) -> str:
    text = "from examples import gpt\ndef build(): return gpt.build(blocks=4, width=32, heads=2, batch=2, tokens=32)\n"
    (tmp_path / "small_gpt.py").write_text(text)
    return f"{tmp_path / 'small_gpt.py'}:build"


def test_the_front_is_one_and_can_be_had() -> None:
    options = Options.from_mapping({"lowering": "eager", "budget": "60%"})
    front = model_front(build, options, "cpu", 8)
    free = [point for point in front.points if point.label != CHECKPOINT]
    assert free[0].label == "plain" and free[0].peak_bytes == front.plain_peak_bytes
    assert all(a.peak_bytes > b.peak_bytes and a.time_s < b.time_s for a, b in pairwise(free))
    assert next(p for p in free if p.label == "budget").peak_bytes <= front.budget_bytes
    for point in (free[len(free) // 2], free[-1]):
        plan = plan_model(build, Options.from_mapping({"lowering": "eager", "budget": point.peak_bytes}), "cpu")
        assert plan.peak_bytes <= point.peak_bytes


def test_the_front_goes_on_where_large_tensors_are_split() -> None:
    def build() -> tuple[gpt.Gpt, tuple[Tensor, Tensor]]:
        return gpt.Gpt(4000, 32, 2, 32, 2, 0.0), (torch.zeros(8, 32, dtype=torch.long),) * 2

    options = {"lowering": "eager", "strategies": ("keep", "checkpoint")}
    whole = model_front(build, Options.from_mapping(options), "cpu", 3)
    parts = model_front(build, Options.from_mapping({**options, "strategies": "keep,checkpoint,split"}), "cpu", 3)
    assert parts.plain_peak_bytes == whole.plain_peak_bytes
    smallest = parts.points[-1].peak_bytes
    assert smallest < 0.5 * whole.points[-1].peak_bytes
    bounded = Options.from_mapping({**options, "strategies": "keep,checkpoint,split", "budget": smallest})
    found = plan_model(build, bounded, "cpu")
    assert found.peak_bytes <= smallest and found.plain_peak_bytes == whole.plain_peak_bytes


def test_checkpoint_by_hand_is_one_segment_for_each_block() -> None:
    front = model_front(build, Options(lowering="eager"), "cpu", 3)
    by_hand = next(point for point in front.points if point.label == CHECKPOINT)
    assert by_hand.strategies["checkpoint"] == 4
    assert by_hand.peak_bytes < front.plain_peak_bytes and by_hand.time_s > front.plain_time_s


@pytest.mark.parametrize(
    "path, block",
    [("model.layers.3.mlp", "model.layers.3"), ("blocks.0", "blocks.0"), ("1.weight", "1"), ("head", ""), ("", "")],
)
def test_repeated_modules(path: str, block: str) -> None:
    assert repeated_module(path) == block


def test_dominated_plans_are_left_out() -> None:
    points = [Point(10, 1.0, {}, "plain"), Point(8, 3.0, {}), Point(6, 2.0, {}), Point(7, 9.0, {}, "checkpoint")]
    assert [point.peak_bytes for point in undominated(points)] == [10, 7, 6]


def test_json_table_and_picture(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["pareto", target, "--points", "4", "--lowering", "eager"]
    assert main([*common, "--json", "--budget", "90%"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"plain_peak_bytes", "plain_time_s", "points", "budget_bytes", "device", "lowering", "notes"} <= set(found)
    assert set(found["points"][0]) == {"peak_bytes", "time_s", "strategies", "label"}
    picture = tmp_path / "front.png"
    assert main([*common, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "plain backpropagation" in table and "each block checkpointed" in table


def test_wrong_use(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pareto", target, "--points", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
    assert main(["pareto", target, "--plot", str(tmp_path / "no" / "front.png")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["pareto", target, "--points", "3", "--budget", "1%"]) == 1
    assert "smallest reachable peak" in capsys.readouterr().err


def test_a_budget_below_the_front_is_an_error() -> None:
    with pytest.raises(BudgetError):
        model_front(build, Options.from_mapping({"budget": 1}), "cpu", 3)
