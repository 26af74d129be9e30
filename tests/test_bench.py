"""`moonwalk bench`: real steps of a model, in every way that people train today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from moonwalk_compile import peers
from moonwalk_compile.bench import Bench, _ways, bench_model, scalar_loss
from moonwalk_compile.cli import main
from moonwalk_compile.errors import UsageError
from moonwalk_compile.inputs import Arguments
from moonwalk_compile.measure import gradient_error, gradients
from moonwalk_compile.options import Options, parse_bytes

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(32, 64), nn.Linear(64, 32), nn.Dropout(0.1)
    def forward(self, x):
        return x + self.drop(self.down(torch.tanh(self.up(x))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(32, 8)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def build():
    return Net(), (torch.randn(256, 32),)

def single():
    return nn.Linear(32, 32), (torch.randn(64, 32),)
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(MODEL)
    return str(tmp_path / "net.py")


def test_the_command_measures_every_way(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "bench.png"
    arguments = ["bench", f"{target}:build", "--budget", "60%", "--lowering", "eager", "--repeats", "2", "--json"]
    assert main([*arguments, "--plot", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert next(iter(rows)) == "plain" and list(rows)[-1] == "moonwalk"
    assert {"each block checkpointed", "torch's budget 0.5", "torch's budget 0.1"} < set(rows)
    ours, plain = rows["moonwalk"], rows["plain"]
    assert ours["peak_bytes"] <= found["budget_bytes"] < plain["peak_bytes"]
    assert ours["predicted_peak_bytes"] == pytest.approx(ours["peak_bytes"], rel=0.05)
    assert plain["predicted_peak_bytes"] == pytest.approx(plain["peak_bytes"], rel=0.05)  # the loss is not predicted
    assert any("loss" in note for note in found["notes"])
    assert rows["each block checkpointed"]["peak_bytes"] < plain["peak_bytes"]
    assert ours["gradient_error"] == 0 and plain["time_ratio"] == 1
    assert picture.stat().st_size > 10_000


def test_every_way_keeps_the_settings_that_it_was_compiled_under() -> None:
    """Compiled again, torch's budgets would be those of the moment."""
    given = Arguments((torch.randn(4, 8),))
    ways = list(_ways(Two(), given, Options(parse_bytes("100%"), lowering="eager"), None, []))
    assert {"torch's budget 0.5", "torch's budget 0.1"} < {way.name for way in ways}
    compiled = counters["stats"]["unique_graphs"]
    assert compiled
    for way in ways:
        scalar_loss(way.model, *given.args).backward()
    assert counters["stats"]["unique_graphs"] == compiled


def test_a_budget_out_of_reach_ends_with_status_one(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"{target}:build", "--budget", "1KiB", "--lowering", "eager"]) == 1
    assert "smallest" in capsys.readouterr().err


def test_no_device_no_measurement(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device here")
    for arguments in (["bench"], ["plan", "--profile", "measure"]):
        assert main([*arguments, f"{target}:build", "--device", "h100"]) == 2
        assert "no h100 on this machine" in capsys.readouterr().err


def test_where_nothing_repeats_there_is_no_checkpoint_by_hand(target: str) -> None:
    def build() -> tuple[nn.Module, tuple[Tensor]]:
        return nn.Linear(32, 32), (torch.randn(64, 32),)

    found = bench_model(build, Options(parse_bytes("200%"), lowering="eager"), "cpu", repeats=1)
    assert "each block checkpointed" not in [row.name for row in found.rows]
    assert any("no module repeats" in note for note in found.notes)
    assert isinstance(found, Bench) and "moonwalk" in str(found)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_are_what_repeats_and_is_more_than_a_layer() -> None:
    model = Two()
    assert peers.repeated_blocks(model) == list(model.layers)
    assert peers.checkpointed(nn.Linear(2, 2)) is None


def test_a_checkpointed_copy_has_the_same_gradients_and_leaves_the_model_alone() -> None:
    model, x = Two(), torch.randn(4, 8)
    copied = peers.checkpointed(model)
    assert copied is not None and not any("forward" in vars(layer) for layer in model.layers)
    for network in (copied, model):
        network(x).sum().backward()
    assert gradient_error(gradients(copied), gradients(model)) == 0


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two, self.head = Two(), nn.Linear(8, 512)

    def forward(self, x: Tensor, *, target: Tensor) -> dict[str, Tensor]:
        result = self.head(self.two(x))
        return {"result": result, "loss": (result - target).square().mean()}


def test_a_model_called_by_name_is_measured_by_its_loss() -> None:
    named = {"x": torch.randn(64, 8), "target": torch.randn(64, 512)}
    model, peaks = Named(), []
    assert torch.equal(scalar_loss(model, **named), model(**named)["loss"])
    options = Options(parse_bytes("100%"), lowering="eager")
    for outputs in (None, ("loss",)):
        found = bench_model(lambda: (model, named), options, "cpu", outputs, repeats=1)
        ours = found.rows[-1]
        assert ours.name == "moonwalk" and ours.gradient_error == 0.0
        peaks.append(ours.peak_bytes)
    assert peaks[0] - peaks[1] >= 64 * 512 * 4  # nothing is held for the other output


def test_the_loss_is_the_models_own_or_a_mean_square() -> None:
    x = torch.randn(4, 8)
    model = Two()
    assert torch.equal(scalar_loss(model, x), model(x).square().mean())
    assert scalar_loss(nn.Sequential(model, nn.Flatten(0), nn.Linear(32, 1), nn.Flatten(0)), x).dim() == 0
    with pytest.raises(UsageError, match="requires a gradient"):
        scalar_loss(nn.Identity(), x)
