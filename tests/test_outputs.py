"""`outputs=`: what training does not need is not returned, and nothing is held for it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moonwalk_compile import BudgetError, OptionError, UsageError, moonwalk_compile, training_step
from moonwalk_compile.measure import gradient_error, gradients

pytestmark = pytest.mark.usefixtures("fresh_compiler")

eager = partial(moonwalk_compile, lowering="eager")


@dataclass
class Record:
    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class Mapped(OrderedDict[str, Any]):
    """A dataclass that is a mapping of its set fields, as transformers' outputs are."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits"):
            value = getattr(self, name)
            if value is not None:
                self[name] = value


class Pair(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None


FORMS = {
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "ordered": lambda loss, logits: OrderedDict(loss=loss, logits=logits),
    "dataclass": Record,
    "mapped": Mapped,
    "namedtuple": Pair,
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
}
ENTRY = {"dict": "loss", "ordered": "loss", "mapped": "loss", "tuple": 0, "list": 0}


class Classifier(nn.Module):
    """Its logits are by far its largest tensor."""

    def __init__(self, form: str = "dict", branches: bool = False) -> None:
        super().__init__()
        self.form, self.branches = form, branches
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 512)

    def forward(self, x: Tensor, labels: Tensor | None) -> Any:
        hidden = self.body(x)
        if self.branches and hidden.sum() > 1e9:
            hidden = hidden + 1
        logits = self.head(hidden)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return FORMS[self.form](loss, logits)


def loss_of(form: str, result: Any) -> Tensor:
    found = result[ENTRY[form]] if form in ENTRY else result.loss
    assert isinstance(found, Tensor)
    return found


def logits_of(form: str, result: Any) -> Tensor | None:
    if form in ("tuple", "list"):
        found = result[1]
    else:
        found = result.get("logits") if isinstance(result, dict) else result.logits
    return found


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 8, generator=generator), torch.randint(0, 512, (64,), generator=generator)


def both(form: str = "dict", **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Classifier(form, **kwargs)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("form", FORMS)
def test_the_kind_of_result_stays_and_the_gradients_too(form: str) -> None:
    plain, model = both(form)
    eager(model, outputs=0 if form in ("tuple", "list") else "loss")
    expected, result = plain(*batch()), model(*batch())
    assert type(result) is type(expected)
    assert logits_of(form, expected) is not None and logits_of(form, result) is None
    loss_of(form, expected).backward()
    loss_of(form, result).backward()
    assert gradient_error(gradients(model), gradients(plain)) == 0


def test_neither_the_output_nor_a_gradient_for_it_is_held() -> None:
    """The measured peaks differ by both, and each is as predicted."""
    peaks, logits = [], 64 * 512 * 4
    for outputs in (None, ("loss",)):
        _, model = both()
        eager(model, budget="100%", outputs=outputs, example_inputs=batch())
        for _ in range(3):
            model(*batch())["loss"].backward()
            model.zero_grad()
        plan = model.plan  # type: ignore[attr-defined]
        assert plan.measured_peak_bytes == pytest.approx(plan.peak_bytes, abs=4096)
        peaks.append(plan.measured_peak_bytes)
    assert peaks[0] - peaks[1] >= 2 * logits - 4096


@pytest.mark.parametrize("form", ["dict", "dataclass", "mapped", "namedtuple"])
def test_a_training_step_takes_the_loss_and_arguments_by_name(form: str) -> None:
    """Without a loss function the loss is the one that the model returns; the logits are no output of the step."""
    plain, model = both(form)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, foreach=False) for m in (plain, model)]
    x, labels = batch()
    named = {"labels": labels, "x": x}
    step = training_step(model, optimizer=optimizers[1], lowering="eager", example_inputs=named)
    assert step.plan is not None
    for _ in range(3):
        expected = loss_of(form, plain(**named))
        expected.backward()
        optimizers[0].step(), optimizers[0].zero_grad()
        assert step(**named).equal(expected.detach())
    assert step.plan.measured_peak_bytes == pytest.approx(step.plan.peak_bytes, abs=4096)
    assert step.graph_module is not None and len(step.graph_module.graph.output_node().args[0]) == 1
    assert step(x, labels=labels).equal(loss_of(form, plain(**named)))


@pytest.mark.parametrize(("form", "labels", "kind"), [("dict", False, "NoneType"), ("tuple", True, "tuple")])
def test_a_training_step_without_a_loss(form: str, labels: bool, kind: str) -> None:
    """As where the labels were forgotten, or the loss stands in a tuple."""
    model, (x, targets) = both(form)[0], batch()
    step = training_step(model, lowering="eager")
    with pytest.raises(UsageError, match=f"returned a {kind} for its loss"):
        step(x, targets if labels else None)


def test_arguments_by_name_are_the_models_where_the_loss_is_another_function() -> None:
    plain, model = both()
    x, labels = batch()
    step = training_step(model, lambda result, scale: result["loss"] * scale, lowering="eager")
    scale = torch.tensor(3.0)
    loss = step(x, scale, labels=labels)
    expected = plain(x, labels)["loss"] * scale
    expected.backward()
    assert loss.equal(expected.detach()) and gradient_error(gradients(model), gradients(plain)) == 0


def test_without_gradients_all_is_returned() -> None:
    _, model = both()
    eager(model, outputs="loss")
    assert model(*batch())["logits"] is None
    with torch.no_grad():
        assert model(*batch())["logits"].shape == (64, 512)


def test_a_model_that_trains_plain_returns_the_same() -> None:
    _, model = both(branches=True)
    eager(model, outputs="loss")
    with pytest.warns(UserWarning, match="trains plain"):
        result = model(*batch())
    assert result["logits"] is None and result["loss"].requires_grad
    with torch.no_grad():
        assert model(*batch())["logits"] is not None


@pytest.mark.parametrize("budget", [None, "100%"])
@pytest.mark.parametrize(("form", "outputs"), [("dict", "los"), ("tuple", 2), ("tuple", "loss"), ("dataclass", "x")])
def test_an_output_that_there_is_not(budget: str | None, form: str, outputs: Any) -> None:
    _, model = both(form)
    eager(model, budget=budget, outputs=outputs)
    with pytest.raises(UsageError, match=f"{outputs!r} is not among"):
        model(*batch())
    with pytest.raises(UsageError, match=f"{outputs!r} is not among"):
        eager(both(form)[1], budget=budget, outputs=outputs, example_inputs=batch())


def test_one_tensor_has_no_outputs_to_choose_from() -> None:
    with pytest.raises(UsageError, match="nothing that has a name"):
        eager(nn.Linear(4, 4), outputs="loss")(torch.randn(2, 4))


@pytest.mark.parametrize("outputs", [(), 1.5, True, {"loss": 1}, ["loss", None]])
def test_bad_values_are_refused(outputs: Any) -> None:
    with pytest.raises(OptionError, match="outputs"):
        eager(nn.Linear(4, 4), outputs=outputs)


def test_a_plan_and_a_refusal_name_the_option() -> None:
    _, model = both()
    eager(model, budget="100%", example_inputs=batch())
    assert any("outputs=" in note for note in model.plan.notes)  # type: ignore[attr-defined]
    with pytest.raises(BudgetError, match="outputs="):
        eager(both()[1], budget=1, example_inputs=batch())
    _, model = both()
    eager(model, budget="100%", outputs="loss", example_inputs=batch())
    assert not any("outputs=" in note for note in model.plan.notes)  # type: ignore[attr-defined]
    assert model.plan.segments[0].name.split(".")[0] in ("body", "head")  # type: ignore[attr-defined]
