"""Each example trains: the loss goes down, plain and, as soon as there is a compiler, compiled."""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import moonwalk_compile
from examples import flow, gpt, lipschitz, reversible, revnet
from examples.training import train

FOLDER = Path(gpt.__file__).parent
EXAMPLES = (flow, gpt, lipschitz, reversible, revnet)

SMALL_REVERSIBLE = {"blocks": 4, "half": 16, "batch": 4, "tokens": 64}
SMALL_REVNET = {"blocks": 1, "channels": 4, "size": 8, "batch": 32}
SMALL_LIPSCHITZ = {"layers": 8, "width": 32, "batch": 256}
CASES = {
    "additive": (reversible, SMALL_REVERSIBLE, 3e-3),
    "affine": (reversible, {**SMALL_REVERSIBLE, "coupling": "affine"}, 3e-3),
    "leapfrog": (reversible, {**SMALL_REVERSIBLE, "coupling": "leapfrog"}, 1e-2),
    "gpt": (gpt, {"blocks": 2, "width": 32, "heads": 2, "batch": 4, "tokens": 32}, 3e-3),
    "gpt-dropout": (gpt, {"blocks": 2, "width": 32, "heads": 2, "batch": 4, "tokens": 32, "dropout": 0.1}, 3e-3),
    "abs": (lipschitz, SMALL_LIPSCHITZ, 3e-4),
    "maxmin": (lipschitz, {**SMALL_LIPSCHITZ, "activation": "maxmin"}, 3e-4),
    "leaky-relu": (lipschitz, {**SMALL_LIPSCHITZ, "activation": "leaky_relu", "layers": 3}, 1e-3),
    "parametrized": (lipschitz, {**SMALL_LIPSCHITZ, "parametrized": True}, 3e-4),
    "revnet": (revnet, SMALL_REVNET, 3e-3),
    "flow": (flow, {"couplings": 6, "hidden": 16, "batch": 256}, 3e-3),
}


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """Stands in for scikit-learn: each digit is a bar at its own place, in noise."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(100) % 10
    images = 4 * torch.rand(100, 8, 8, generator=generator)
    images.flatten(1)[torch.arange(100)[:, None], 6 * target[:, None] + torch.arange(6)] += 12
    data = SimpleNamespace(images=images.double().numpy(), target=target.numpy())
    module = ModuleType("sklearn.datasets")
    module.load_digits = lambda: data
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)


def need_compiler():
    if not hasattr(moonwalk_compile, "moonwalk_compile"):
        pytest.skip("the compiler is not there yet")


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_goes_down(case, compile):
    if compile:
        need_compiler()
    example, sizes, lr = CASES[case]
    torch.manual_seed(0)
    model, inputs = example.build(**sizes)
    options = {"lowering": "eager"} if compile else {}
    losses = train(model, example.loss, example.batches(*inputs), steps=30, lr=lr, plain=not compile, **options)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


@pytest.mark.parametrize("arguments", [["--plain"], ["--lowering", "eager"]], ids=["plain", "compiled"])
def test_an_example_as_a_program(arguments, monkeypatch, capsys):
    if "--plain" not in arguments:
        need_compiler()
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["flow.py", *arguments, "--steps", "2", "couplings=2", "batch=64"])
    runpy.run_path(str(FOLDER / "flow.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "loss" in printed
    assert "measured peak" in printed


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda module: module.__name__)
def test_the_models_know_nothing_of_the_compiler(example):
    assert "moonwalk" not in Path(example.__file__).read_text()


def test_leapfrog_and_couplings_keep_the_shape():
    for coupling in reversible.COUPLINGS:
        model, (x,) = reversible.build(coupling=coupling, **SMALL_REVERSIBLE)
        assert model(x).shape == x.shape


@pytest.mark.parametrize("activation", ["abs", "maxmin"])
def test_lipschitz_keeps_distances_from_growing(activation):
    torch.manual_seed(0)
    model, (x,) = lipschitz.build(activation=activation, **SMALL_LIPSCHITZ)
    y = model(x)
    before, after = torch.dist(x[:128], x[128:]), torch.dist(y[:128], y[128:])
    assert after <= before * (1 + 1e-5)


def test_revnet_keeps_all_but_the_last_layer_invertible():
    torch.manual_seed(0)
    model, (x,) = revnet.build(**SMALL_REVNET)
    y = model[:-1](x)
    assert y.shape == (32, x[0].numel())
    images, labels = next(revnet.batches(x))
    assert images.shape == x.shape
    assert images.is_contiguous()
    assert labels.shape == (32,)
    block = model[0]
    y1, y2 = block(x).chunk(2, dim=1)
    x2 = y2 - block.g(y1)
    torch.testing.assert_close(torch.cat([y1 - block.f(x2), x2], dim=1), x)


def test_the_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="scikit-learn"):
        revnet.digits()


def test_gpt_returns_logits_without_targets():
    model, (tokens, targets) = gpt.build(blocks=1, width=16, heads=2, batch=2, tokens=8)
    logits = model(tokens)
    assert logits.shape == (2, 8, len(gpt.corpus()[1]))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected)


def test_the_log_determinant_of_the_flow():
    torch.manual_seed(0)
    model, (points,) = flow.build(couplings=4, hidden=8, batch=1)
    _, log_determinant = _push(model, points)
    jacobian = torch.autograd.functional.jacobian(lambda x: _push(model, x)[0], points)[0, :, 0]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_determinant[0].detach(), atol=1e-5, rtol=1e-4)


def _push(model, x):
    log_determinant = 0
    for coupling in model.couplings:
        x, contribution = coupling(x)
        log_determinant = log_determinant + contribution
    return x, log_determinant
