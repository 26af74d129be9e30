from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moonwalk_compile.cli import main
from moonwalk_compile.errors import BudgetError, CaptureError, UsageError
from moonwalk_compile.options import Options, parse_bytes
from moonwalk_compile.report import Plan, Segment
from moonwalk_compile.targets import InputSpec, load_target, parse_spec

ROOT = Path(__file__).parent.parent
PLAN = Plan(
    *(1000, 4000, 0.2, 0.1),
    segments=(Segment("all", "checkpoint", "mm", "sum", 100, 0.2, 0.0, "cheap"),),
    timeline=(1000, 10),
    plain_timeline=(4000, 10),
)

MODELS = """
import sys
import torch
from torch import nn

number = 3
instance = nn.Linear(3, 2)
print("importing")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) @ x

class NeedsWidth(Net):
    def __init__(self, width, depth=2):
        super().__init__()

class Zoo:
    net = Net

def with_inputs():
    return Net(), (torch.randn(4, 3),)

def with_tensor():
    return Net(), torch.randn(4, 3)

def with_list():
    return Net(), [torch.randn(4, 3)]

def with_dict():
    return Net(), {"x": torch.randn(4, 3)}

def with_number():
    return Net(), 3

class Labelled(Net):
    def forward(self, x, scale=1.0, labels=None):
        logits = self.linear(x * scale)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

def by_name():
    return Labelled(), {"labels": torch.zeros(4, dtype=torch.int64), "x": torch.randn(4, 3)}

def with_nothing():
    return Net(), ()

def a_string():
    return "Net"

def a_triple():
    return Net(), torch.randn(4, 3), 3

def nothing():
    pass

def broken():
    return nn.Linear(3, 2)(torch.randn(5))

def dividing():
    return 1 / 0

def leaving():
    sys.exit("enough")

def huge():
    print("building")
    return nn.Linear(10**6, 10**6)
"""


@pytest.fixture
def models(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "models.py"
    path.write_text(textwrap.dedent(MODELS))
    return str(path)


class Planner:
    """Stands for `api.plan_model`: builds under fake tensors as it does, then answers with what a test wants."""

    def __init__(self) -> None:
        self.answer: Plan | Exception = PLAN
        self.forward = False

    def __call__(self, build, options, device, outputs=None):
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.model, given = build()
            self.inputs, self.named = given.args, given.kwargs
            if self.forward:
                torch.compile(self.model, backend="eager", fullgraph=True)(*self.inputs)
        self.options, self.device, self.outputs = options, device, outputs
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def planner(monkeypatch) -> Planner:
    planner = Planner()
    monkeypatch.setattr("moonwalk_compile.api.plan_model", planner)
    return planner


def failing(capsys, *arguments: str, status: int = 2) -> str:
    """Stderr of a command that fails in the way that is shown to users: a title, what happened, what to do."""
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "what happened" in err and "what to do" in err
    assert out == ""
    return err


SPECS = {
    "f32[8,3,224,224]": InputSpec(torch.float32, (8, 3, 224, 224)),
    "i64[4,128]<50257": InputSpec(torch.int64, (4, 128), 50257),
    "bf16[2, 3]": InputSpec(torch.bfloat16, (2, 3)),
    " f16[1] ": InputSpec(torch.float16, (1,)),
    "f64[]": InputSpec(torch.float64, ()),
    "bool[5]": InputSpec(torch.bool, (5,)),
    "u8[2]<255": InputSpec(torch.uint8, (2,), 255),
    "labels=i64[4]<9": InputSpec(torch.int64, (4,), 9, "labels"),
}


@pytest.mark.parametrize("text", SPECS)
def test_specs(text):
    assert parse_spec(text) == SPECS[text]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("fake", [False, True])
def test_specs_make_tensors(text, fake):
    spec = SPECS[text]
    if fake:
        with FakeTensorMode():
            tensor = spec.make()
        assert isinstance(tensor, FakeTensor)
    else:
        tensor = spec.make(torch.Generator().manual_seed(0))
        assert torch.equal(tensor, spec.make(torch.Generator().manual_seed(0)))
        assert spec.high is None or (tensor.min() >= 0 and tensor.max() < spec.high)
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)


BAD_SPECS = [
    *("", "f32", "[3]", "f32[3", "f32 3]", "f32(3)", "f32[3]]", "f32[[3]]", "f32[3,]", "f32[,3]", "f32[3,,3]"),
    *("f32[-1]", "f32[0]", "f32[1.5]", "f32[a]", "f32[3 3]", "f32[\u0663]", "float32[3]", "F32[3]", "i128[3]"),
    *("f32[3]<5", "bool[3]<2", "i64[3]<", "i64[3]<0", "i64[3]<-1", "i64[3]<x", "i64[3]>5", "i8[3]<128"),
    *("=f32[3]", "3=f32[3]", "a b=f32[3]", "a=b=f32[3]", "a=", "a=f32"),
    *("i64[3]<99999999999999999999", "f32[99999999999,99999999999]", "f32[99999999999999999999]"),
]


@pytest.mark.parametrize("text", BAD_SPECS)
def test_bad_specs(text):
    with pytest.raises(UsageError, match="Bad input spec"):
        parse_spec(text)


def test_plan_prints_the_table(models, planner, capsys):
    assert main(["plan", f"{models}:with_inputs"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{PLAN}\n"
    assert err == "importing\n"
    assert planner.options == Options()
    assert planner.device == "cpu"
    assert [tuple(x.shape) for x in planner.inputs] == [(4, 3)]


@pytest.mark.parametrize("name", ["with_tensor", "with_list", "with_inputs"])
def test_example_inputs(models, planner, name):
    assert main(["plan", f"{models}:{name}"]) == 0
    assert [tuple(x.shape) for x in planner.inputs] == [(4, 3)]


@pytest.mark.parametrize("name", ["instance", "Net", "Zoo.net", "with_inputs", "with_nothing"])
def test_input_specs_replace_example_inputs(models, planner, name):
    assert main(["plan", f"{models}:{name}", "--input", "f32[5,3]", "--input", "i64[2]<9"]) == 0
    assert isinstance(planner.model, torch.nn.Module)
    assert [(x.dtype, tuple(x.shape)) for x in planner.inputs] == [(torch.float32, (5, 3)), (torch.int64, (2,))]


def test_inputs_by_name(models, planner):
    assert main(["plan", f"{models}:with_dict"]) == 0
    assert planner.inputs == () and tuple(planner.named["x"].shape) == (4, 3)
    assert main(["plan", f"{models}:by_name", "--input", "f32[5,3]", "--input", "labels=i64[5]<2"]) == 0
    assert [tuple(x.shape) for x in planner.inputs] == [(5, 3)]
    assert {name: tuple(x.shape) for name, x in planner.named.items()} == {"labels": (5,)}


def test_outputs_by_name_and_position(models, planner):
    assert main(["plan", f"{models}:by_name"]) == 0 and planner.outputs is None
    assert main(["plan", f"{models}:by_name", "--outputs", "loss, 1"]) == 0
    assert planner.outputs == ("loss", 1)


@pytest.mark.parametrize("command", ["plan", "pareto"])
def test_a_model_called_by_name_is_planned_for_its_loss(models, command, capsys):
    target = [command, f"{models}:by_name", "--lowering", "eager", "--json"]
    plain = []
    for outputs in ([], ["--outputs", "loss"]):
        assert main([*target, *outputs]) == 0
        plain.append(json.loads(capsys.readouterr().out)["plain_peak_bytes"])
    assert plain[1] < plain[0]
    assert "'los' is not among 'loss', 'logits'" in failing(capsys, *target[:2], "--outputs", "los")


def test_nothing_is_allocated(models, planner, capsys):
    assert main(["plan", f"{models}:huge", "--input", "f32[1000000,1000000]"]) == 0
    assert isinstance(planner.inputs[0], FakeTensor)
    assert "building" not in capsys.readouterr().out


def test_a_module_in_the_current_folder(models, planner):
    sys.modules.pop("models", None)
    assert main(["plan", "models:with_inputs"]) == 0
    sys.modules.pop("models")


def test_a_module_in_a_package(planner):
    assert main(["plan", "torch.nn:Identity", "--input", "f32[2]"]) == 0


def test_files_import_their_neighbours(tmp_path, models, planner):
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "moonwalk_test_neighbour.py").write_text("from torch import nn\nnet = nn.Linear(1, 1)\n")
    (folder / "torch.py").write_text("raise RuntimeError('shadowed')\n")
    (folder / "main.py").write_text("from moonwalk_test_neighbour import net\n")
    assert main(["plan", "inner/main.py:net", "--input", "f32[1]"]) == 0


def test_options_are_passed_on(models, planner):
    target = f"{models}:with_inputs"
    assert main(["plan", target, "--budget", "40%", "--strategies", "moonwalk,checkpoint", "--lowering", "eager"]) == 0
    expected = Options(parse_bytes("40%"), strategies=("checkpoint", "moonwalk"), lowering="eager")
    assert planner.options == expected
    assert main(["plan", target, "--max-slowdown", "2", "--device", "h100"]) == 0
    assert planner.options == Options(max_slowdown=2.0)
    assert planner.device == "h100"


def test_json(models, planner, capsys):
    assert main(["plan", f"{models}:huge", "--input", "f32[1]", "--json"]) == 0
    assert Plan.from_json(capsys.readouterr().out).peak_bytes == 1000


def test_plot(models, planner, capsys, tmp_path):
    assert main(["plan", f"{models}:with_inputs", "--plot", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert "plan.png" in capsys.readouterr().err


def test_budget_that_cannot_be_met(models, planner, capsys):
    planner.answer = BudgetError(100, 12345, ("output",))
    err = failing(capsys, "plan", f"{models}:with_inputs", "--budget", "100", status=1)
    assert "budget=12345" in err and "pinned by output" in err


def test_budget_that_cannot_be_met_as_json(models, planner, capsys):
    planner.answer = BudgetError(100, 12345, ("output",))
    assert main(["plan", f"{models}:with_inputs", "--budget", "100", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"budget_bytes": 100, "smallest_peak_bytes": 12345, "pinned": ["output"]}
    assert "budget=12345" in err


BAD_TARGETS = {
    "": "Bad target",
    "models": "MODULE:NAME",
    ":Net": "MODULE:NAME",
    "models.py:": "MODULE:NAME",
    "missing.py:Net": "no file",
    "folder/missing:Net": "no file",
    ".:Net": "neither a module",
    "no-such:Net": "neither a module",
    "moonwalk_no_such_module:Net": "no module 'moonwalk_no_such_module'",
    "torch.no_such:Net": "no module 'torch.no_such'",
    "models.py:Nett": 'did you mean "Net"',
    "models.py:zzzzzz": "has no 'zzzzzz'",
    "models.py:Zoo.nett": 'did you mean "net"',
    "models.py:Net.": "has no",
    "models.py:number": "cannot be called",
    "models.py:NeedsWidth": "needs arguments: width",
    "torch:matmul": "failed while calling torch:matmul",
    "models.py:a_string": "returned a str",
    "models.py:a_triple": "tuple of Net, FakeTensor, int",
    "models.py:nothing": "returned a NoneType",
    "models.py:with_number": "example inputs as a int",
    "models.py:with_nothing": "--input",
    "models.py:Net": "--input",
    "models.py:instance": "--input",
}


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_bad_targets(models, planner, capsys, target):
    assert main(["plan", target]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "what to do" in err and out == ""
    assert BAD_TARGETS[target] in err


BAD_ARGUMENTS = {
    "nothing": ([], "COMMAND"),
    "unknown command": (["plam"], "plam"),
    "no target": (["plan"], "TARGET"),
    "unknown flag": (["plan", "{}", "--bugdet", "1"], "--bugdet"),
    "both goals": (["plan", "{}", "--budget", "1", "--max-slowdown", "2"], "not allowed with"),
    "budget without value": (["plan", "{}", "--budget"], "expected one argument"),
    "bad budget": (["plan", "{}", "--budget", "abc"], "'abc'"),
    "negative budget": (["plan", "{}", "--budget", "-5"], "-5"),
    "bad slowdown": (["plan", "{}", "--max-slowdown", "abc"], "'abc'"),
    "small slowdown": (["plan", "{}", "--max-slowdown", "0.5"], "0.5"),
    "nan slowdown": (["plan", "{}", "--max-slowdown", "nan"], "nan"),
    "bad strategy": (["plan", "{}", "--strategies", "keep,invrt"], 'did you mean "invert"'),
    "no strategy": (["plan", "{}", "--strategies", ""], "strategies"),
    "bad device": (["plan", "{}", "--device", "h10"], 'did you mean "h100"'),
    "bad lowering": (["plan", "{}", "--lowering", "xla"], "inductor, eager"),
    "bad profile": (["plan", "{}", "--profile", "measured"], 'did you mean "measure"'),
    "no repeats": (["bench", "{}", "--repeats", "0"], "at least 1"),
    "bad spec": (["plan", "{}", "--input", "f32[0]"], "'0'"),
    "named twice": (["plan", "{}", "--input", "x=f32[5,3]", "--input", "x=f32[4,3]"], "'x' is given twice"),
    "bad plot": (["plan", "{}", "--plot", "plan.jpeg"], ".png"),
    "plot nowhere": (["plan", "{}", "--plot", "no/such/plan.png"], "no folder"),
    "demo with argument": (["demo", "3"], "3"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(models, planner, capsys, case):
    arguments, expected = BAD_ARGUMENTS[case]
    err = failing(capsys, *(argument.format(f"{models}:with_inputs") for argument in arguments))
    assert expected in err


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("dividing", "ZeroDivisionError: division by zero", "return 1 / 0"),
        ("broken", "RuntimeError: ", "nn.Linear(3, 2)(torch.randn(5))"),
        ("leaving", "SystemExit: enough", 'sys.exit("enough")'),
    ],
)
def test_errors_in_the_models_code(models, planner, capsys, name, error, line):
    assert main(["plan", f"{models}:{name}", "--input", "f32[3]"]) == 2
    err = capsys.readouterr().err
    number = next(i for i, text in enumerate(Path(models).read_text().splitlines(), 1) if line in text)
    assert error in err and f"{models}:{number} in {name}" in err
    assert "Traceback" not in err


def test_an_error_that_dynamo_found(models, planner, capsys):
    planner.forward = True
    assert main(["plan", f"{models}:Net", "--input", "f32[4,3]"]) == 2
    err = capsys.readouterr().err
    assert "in forward" in err and models in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_an_input_of_the_wrong_size_for_modules_of_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """None of the user's own lines has run; it is the user's mistake all the same."""
    model = tmp_path / "layers.py"
    model.write_text("from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())\n")
    assert main([command, f"{model}:build", "--input", "f32[3,5]", "--lowering", "eager"]) == 2
    assert "the model's forward pass" in capsys.readouterr().err


IMPORTS = {
    "def f(:\n": "SyntaxError",
    "import moonwalk_no_such_module\n": "moonwalk_no_such_module",
    "x = undefined_name\n": "NameError",
    "raise SystemExit(3)\n": "SystemExit: 3",
    "\x00": "Error",
}


@pytest.mark.parametrize("source", IMPORTS)
@pytest.mark.parametrize("target", ["moonwalk_test_wrong.py:f", "moonwalk_test_wrong:f"])
def test_files_that_cannot_be_imported(tmp_path, models, planner, capsys, source, target):
    (tmp_path / "moonwalk_test_wrong.py").write_text(source)
    assert main(["plan", target]) == 2
    err = capsys.readouterr().err
    assert IMPORTS[source] in err and "moonwalk_test_wrong" in err and "Traceback" not in err


def test_our_own_errors_keep_their_words(models, planner, capsys):
    planner.answer = CaptureError("Graph break", "print in forward", "remove it", where="models.py:9")
    err = failing(capsys, "plan", f"{models}:with_inputs")
    assert "Graph break" in err and "models.py:9" in err


def test_a_bug_is_not_blamed_on_the_user(models, planner, capsys):
    planner.answer = None  # type: ignore[assignment]
    assert main(["plan", f"{models}:with_inputs", "--plot", "p.png"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and "bug of moonwalk_compile" in err


def test_version_and_help(capsys):
    for flags in (["--version"], ["--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 0
    assert "moonwalk" in capsys.readouterr().out


def test_demo(monkeypatch):
    demo = types.ModuleType("moonwalk_compile.demo")
    demo.main = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moonwalk_compile.demo", demo)
    assert main(["demo"]) == 0
    demo.main = lambda: 1  # type: ignore[attr-defined]
    assert main(["demo"]) == 1


def test_load_target_does_not_call(models):
    assert load_target(f"{models}:dividing").value.__name__ == "dividing"


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "moonwalk_compile", "plan", str(tmp_path / "missing.py:Net")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no file" in result.stderr and result.stdout == ""
