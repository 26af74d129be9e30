"""One generated training step: forward, loss, gradients and the optimizer's updates as a single graph.

A gradient is used up where it is produced, so gradients do not add up: with an optimizer the peak is that of the
activations, and with `moonwalk` or `invert` hardly anything of these is left either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from .api import TOO_MANY_SIZES, check_model, first_line, unwrap
from .backend import ByGradients, CompiledStep
from .choice import Known
from .errors import CaptureError, MoonwalkError, OptionError, UsageError
from .inputs import Arguments
from .options import Options
from .outputs import loss_in
from .passes._torch_compat import FailOnRecompileLimitHit, TorchDynamoException, capturing, in_own_frame
from .replay import try_out
from .report import Plan
from .session import Session
from .step_session import TITLE, PlanOnly, StepSession
from .updates import Updater

__all__ = ["TrainingStep", "training_step"]

LossFunction = Callable[[Any, Any], Tensor]
CLIPPED = "the gradients are clipped by their common norm: all are needed at once, so none is freed early"


def training_step(
    model: nn.Module,
    loss_fn: LossFunction | None = None,
    optimizer: Optimizer | None = None,
    *,
    budget: int | str | None = None,
    max_slowdown: float = 1.5,
    strategies: Iterable[str] = ("keep", "checkpoint", "invert", "moonwalk"),
    tolerance: float = 1e-4,
    lowering: str = "inductor",
    profile: str = "model",
    clip_norm: float | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
) -> TrainingStep:
    """A function `step(*inputs)` that trains `model` by one step and returns the loss, detached.

    The loss is `loss_fn(model(*inputs[:-1]), inputs[-1])`; without a `loss_fn` it is `model(*inputs)`, or the entry
    "loss" of what that returns. It must be one floating-point number. Arguments by name are the model's, as in
    `step(input_ids=ids, labels=ids)`. The model itself stays as it is.

    Args:
        optimizer: with one, the step leaves behind what `loss.backward(); optimizer.step(); optimizer.zero_grad()`
            would: each parameter is updated as soon as its gradient is there and nobody reads the parameter any more,
            and the gradient is freed. Its groups are read at each update, so that schedulers work. Without one, the
            step leaves behind what `loss.backward()` would. Parameters that are not the optimizer's get `.grad`.
        clip_norm: clip the norm of the optimizer's gradients, taken together. All gradients are needed at once then,
            so none is freed early, and the optimizer takes its own step.
        budget, max_slowdown, strategies, tolerance, profile: as for `moonwalk_compile`. The peak of a step with an
            optimizer includes what its updates hold meanwhile, but not the optimizer's state.
        lowering: "inductor" (the blocks are compiled, the updates are calls between them), or "eager".
        example_inputs: plan now, on inputs like these, instead of at the first call; a dict gives them by name.

    Raises UsageError for an optimizer that cannot update parameters one at a time, OptionError for a bad option; when
    it plans, BudgetError for a budget that cannot be met and CaptureError for a model that cannot be captured.
    """
    options = Options(budget, max_slowdown, strategies, tolerance, lowering, profile)  # type: ignore[arg-type]
    step = TrainingStep(model, loss_fn, optimizer, options, clip_norm)
    if example_inputs is not None:
        Arguments.of(example_inputs).call(step.prepare)
    return step


class TrainingStep:
    """What `training_step` returns.

    Attributes:
        plan: the `Plan` of the latest compilation, None before the first.
        graph_module: the whole step as one FX graph, None before the first compilation. Under `lowering="eager"` its
            code is what runs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        optimizer: Optimizer | None,
        options: Options,
        clip_norm: float | None = None,
    ) -> None:
        check_call(model, optimizer, clip_norm)
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.options, self.clip_norm = options, clip_norm
        self.updater = self._new_updater()
        self.plan: Plan | None = None
        self.granted = 0  # bytes that the budget came to, at most
        self.graph_module: fx.GraphModule | None = None
        self._key: object = None
        self._compiled: Callable[..., Tensor] | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        compiled = self._current()
        if self.updater is not None:
            self.updater.check()
        with torch.enable_grad():
            loss = self._guarded(compiled, Arguments(inputs, named))
            loss.backward()  # hands on the gradients that are left
        self._finish()
        return loss.detach()

    def prepare(self, *inputs: Any, **named: Any) -> Plan:
        """Plan a step on inputs like these; nothing is run, and the first call plans again on its own inputs."""
        try:
            with torch.enable_grad():
                self._guarded(self._capture(lower=False), Arguments(inputs, named))
        except PlanOnly as planned:
            self.told(planned.plan)
        assert self.plan is not None
        return self.plan

    def told(self, plan: Plan) -> None:
        self.plan, self.granted = plan, max(self.granted, plan.budget_bytes or 0)

    def _new_updater(self) -> Updater | None:
        return Updater(self.optimizer) if self.optimizer is not None and self.clip_norm is None else None

    def _current(self) -> Callable[..., Tensor]:
        """What is compiled holds for these very parameters."""
        key = (tuple(map(id, self.model.parameters())), self.updater.key if self.updater else None)
        if self._compiled is None or key != self._key:
            self.updater = self._new_updater()
            self._key, self._compiled = key, self._capture(lower=True)
        return self._compiled

    def _capture(self, lower: bool) -> Callable[..., Tensor]:
        def loss_of(*inputs: Any, **named: Any) -> Tensor:
            loss = self._loss(*inputs, **named)
            return loss.clone()  # in memory of its own: not a view of a parameter that is updated

        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return ByGradients(lambda inputs: _CompiledTraining(gm, inputs, self, lower), example_inputs)

        return in_own_frame(loss_of, backend, fullgraph=True)

    def _loss(self, *inputs: Any, **named: Any) -> Tensor:
        if self.loss_fn is not None:
            return self.loss_fn(self.model(*inputs[:-1], **named), inputs[-1])
        loss = loss_in(self.model(*inputs, **named))
        if not isinstance(loss, Tensor):
            what = f"the model returned a {type(loss).__name__} for its loss"
            raise UsageError(TITLE, what, "give it what its loss is computed from, or pass a loss_fn")
        return loss

    def _guarded(self, compiled: Callable[..., Tensor], given: Arguments, tried_out: bool = False) -> Tensor:
        try:
            with capturing():
                return given.call(compiled)
        except FailOnRecompileLimitHit as error:
            todo = "pad the inputs to fewer different sizes"
            raise CaptureError("The step could not be compiled", TOO_MANY_SIZES, todo) from error
        except TorchDynamoException as error:
            ours = unwrap(error)
            if isinstance(ours, (MoonwalkError, PlanOnly)):
                raise ours from None
            if not tried_out:  # a model that sets itself up in its first call can be captured then
                try_out(self.model, self._loss, given.args, given.kwargs)
                return self._guarded(compiled, given, tried_out=True)
            todo = "change what is named above; a single step needs a model that is one graph"
            raise CaptureError("The step could not be captured as one graph", first_line(ours), todo) from error

    def _finish(self) -> None:
        """What is left to the optimizer: all where gradients are clipped, else parameters that others gave gradients.

        Schedulers, too, wait for its `step` to be called.
        """
        if self.optimizer is None:
            return
        if self.clip_norm is not None:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def check_call(model: nn.Module, optimizer: Optimizer | None, clip_norm: float | None) -> None:
    """Raise UsageError for what is wrong whatever the model computes."""
    check_model(model)
    if model._compiled_call_impl is not None:
        raise UsageError(TITLE, "the model has been compiled already", "pass the model as it was before")
    if any(isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) for module in model.modules()):
        raise UsageError(TITLE, "gradients of a distributed model are exchanged by hooks", "pass the module within it")
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
        raise OptionError("Bad option: clip_norm", f"{clip_norm!r} is no norm", "give a number above 0, as in 1.0")
    if clip_norm is not None and optimizer is None:
        raise UsageError(TITLE, "clip_norm without an optimizer", "clip the gradients that the step leaves in .grad")


class _CompiledTraining(CompiledStep):
    """The compiled callable of the whole step. Certificates and budgets are looked after as for a model."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], step: TrainingStep, lower: bool) -> None:
        self.step, self.lower = step, lower
        super().__init__(gm, inputs, step.options.granting(step.granted), step.told)

    def _session(self, inputs: Sequence[Any], known: Known, margin: int) -> Session:
        return StepSession(
            *(self.options, self.device, inputs, self.lower),
            known=known,
            margin=margin,
            on_measured=self._measured,
            updater=self.step.updater,
            note=CLIPPED if self.step.clip_norm is not None else "",
        )

    def _compile(self, inputs: Sequence[Any], known: Known | None = None, margin: int = 0) -> Callable[..., Any]:
        compiled = super()._compile(inputs, known, margin)
        if self.session.plan is None:
            what = "the loss does not depend on any parameter that requires a gradient"
            raise UsageError(TITLE, what, "train a model with parameters that require gradients")
        assert isinstance(self.session, StepSession)
        self.step.graph_module = self.session.module
        return compiled
