"""`moonwalk_compile(model)`: one line, a budget in bytes, the same module."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .backend import compile_graph, device_of, needs_gradient, run_autograd
from .errors import BudgetError, CaptureError, MoonwalkError, UsageError
from .front import CHECKPOINT, Front, points_of, undominated
from .inputs import Arguments
from .options import Budget, Options
from .outputs import Wanted, check_outputs, with_outputs
from .passes._torch_compat import (
    NOT_ON_FAKE_TENSORS,
    SIZES,
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    FakeTensorMode,
    TorchDynamoException,
    capturing,
    dynamo_counters,
    in_own_frame,
    tree_flatten,
)
from .passes.cost import find_device
from .replay import Replays, try_out
from .report import Plan
from .session import Session
from .uncaptured import Flag, decided, flags_of

Model = TypeVar("Model", bound=nn.Module)
Call = Callable[..., Any]
TOO_MANY_SIZES = f"there are plans for {SIZES} sizes of its inputs already, and these are others"


def moonwalk_compile(
    model: Model,
    *,
    budget: int | str | None = None,
    max_slowdown: float = 1.5,
    strategies: Iterable[str] = ("keep", "checkpoint", "invert", "moonwalk"),
    tolerance: float = 1e-4,
    lowering: str = "inductor",
    profile: str = "model",
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    fullgraph: bool = True,
    outputs: str | int | Iterable[str | int] | None = None,
) -> Model:
    """Compile `model` in place, so that its training step stays within a memory budget; returns the model.

    Of a `DistributedDataParallel` the model inside is compiled.

    Args:
        budget: bytes, "512MiB", "2GiB" or "40%" (of plain backpropagation's peak): the most that one step's forward
            and backward hold at any moment beyond what was there before. The fastest plan within it is taken.
        max_slowdown: with no budget, the smallest peak whose predicted time is at most this ratio to plain's.
        strategies: what the planner may use. `"split"` beside these computes logits and the like in parts of their
            rows, where they are much larger than all else; under `lowering="inductor"` the default includes it.
        tolerance: largest predicted relative error of a parameter gradient that inversion may cause.
        lowering: "inductor", or "eager" (ATen kernels; gradients of kept and checkpointed parts bitwise as in eager).
        profile: "model" predicts times by the rates of the device; "measure" times each distinct operation once on it,
            and remembers that on disk.
        example_inputs: plan now, on inputs like these, instead of at the first call; a dict gives them by name.
        fullgraph: capture the model as one graph; with False, graph breaks are allowed and each part gets the budget.
        outputs: names or positions of the only outputs that training needs, as in "loss". Calls that record gradients
            return None for the others, and neither they nor gradients for them are held.

    `model.plan` is the `Plan` of the latest compilation (None before the first). Raises OptionError for a bad option;
    BudgetError where a budget cannot be met; with a budget, CaptureError where the model cannot be captured.
    """
    check_model(model)
    options = Options(budget, max_slowdown, strategies, tolerance, lowering, profile)  # type: ignore[arg-type]
    inner = model.module if isinstance(model, DistributedDataParallel) else model  # gradients meet outside of the step
    wanted = check_outputs(outputs)
    driver = _Driver(inner, with_outputs(inner._call_impl, wanted), options, fullgraph, {inner, model})
    inner._compiled_call_impl = driver
    driver.set_plan(None if example_inputs is None else plan_only(inner, example_inputs, options, wanted))
    return model


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise UsageError("There is no model to compile", f"{kind} was given", "pass a model, an object of nn.Module")


class _Driver:
    """What `model(...)` calls: the compiled model, or the plain one where compiling was not possible."""

    def __init__(
        self, model: nn.Module, call: Call, options: Options, fullgraph: bool, shown_by: Iterable[nn.Module]
    ) -> None:
        self.model, self.call, self.options, self.fullgraph = model, call, options, fullgraph
        self.shown_by = tuple(shown_by)  # whose `plan` is set
        self.compiled = in_own_frame(call, self.backend, fullgraph)
        self.inference: Call = model._call_impl  # of calls without gradients: nothing to plan
        if options.lowering == "inductor":
            self.inference = in_own_frame(model._call_impl, "inductor", dynamic=None)
        self.plain = False
        self.replays = Replays(model, options.strategies, options.max_slowdown)  # while it is plain
        self.flags: tuple[Flag, ...] = ()  # on which the model branches
        self.flag_values: tuple[Any, ...] = ()  # when it was given up
        self.tried_out = False
        self.graphs = 0  # compiled for training
        self.granted = 0  # bytes that the budget came to, at most
        self.warned = False

    def backend(self, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += needs_gradient(example_inputs)
        options = self.options.granting(self.granted) if self.fullgraph else self.options
        return compile_graph(gm, example_inputs, options, self.set_plan)

    def set_plan(self, plan: Plan | None) -> None:
        if plan is not None:
            self.granted = max(self.granted, plan.budget_bytes or 0)
        for model in self.shown_by:
            model.plan = plan  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.plain and self.flag_values == self._flag_values():
            return self._run_plain(args, kwargs)
        if not torch.is_grad_enabled():
            return self.inference(*args, **kwargs)
        graphs, breaks = self.graphs, Counter(dynamo_counters["graph_break"])
        while True:
            try:
                with capturing(), decided(self.flags):
                    result = self.compiled(*args, **kwargs)
                break
            except FailOnRecompileLimitHit as error:
                return self._too_many_sizes(error, args, kwargs)
            except TorchDynamoException as error:
                if not self._another_try(error, args, kwargs):
                    return self._give_up(error, args, kwargs)
        self.plain = False
        self._warn_of_breaks(self.graphs - graphs, [*(dynamo_counters["graph_break"] - breaks)], result)
        return result

    def _too_many_sizes(self, error: FailOnRecompileLimitHit, args: Any, kwargs: Any) -> Any:
        """The sizes seen so far keep their plans; this call runs as the model is."""
        if self.options.budget is not None:
            todo = "pad the inputs to fewer different sizes, or leave out the budget to train the others plain"
            raise CaptureError("The model could not be compiled", TOO_MANY_SIZES, todo) from error
        if not self.warned:
            self.warned = True
            name = type(self.model).__name__
            warnings.warn(f"moonwalk: {name} trains plain on some inputs: {TOO_MANY_SIZES}", stacklevel=4)
        return self.call(*args, **kwargs)

    def _flag_values(self) -> tuple[Any, ...]:
        return tuple(flag.value for flag in self.flags)

    def _another_try(self, error: TorchDynamoException, args: Any, kwargs: Any) -> bool:
        """Whether the model might be captured now: branches on its flags are decided, or it has set itself up."""
        if "data-dependent" in str(error).lower():
            undecided, self.flags = not self.flags, self.flags or flags_of(self.model)
            return undecided and bool(self.flags)
        if self.flags or self.tried_out or isinstance(error, BackendCompilerFailed):
            return False
        try_out(self.model, self.call, args, kwargs)
        self.tried_out = True
        return True

    def _give_up(self, error: TorchDynamoException, args: Any, kwargs: Any) -> Any:
        """Run as the model is: for good, or until its flags say that it has initialised itself from data."""
        self.flag_values = self._flag_values()
        if self.flags and not isinstance(unwrap(error), MoonwalkError):
            result = self._run_plain(args, kwargs)
            if self.flag_values != self._flag_values():
                self.replays.forget()
                return result
            reason = self._reason_to_give_up(error, args, kwargs)
        else:
            reason = self._reason_to_give_up(error, args, kwargs)
            result = self._run_plain(args, kwargs)  # what this raises is the user's own error, and nobody gives up
        self.plain = True
        name, how = type(self.model).__name__, self.replays.note
        warnings.warn(f"moonwalk: {name} trains plain{how}; it could not be compiled: {reason}", stacklevel=4)
        return result

    def _run_plain(self, args: Any, kwargs: Any) -> Any:
        call = self.call if torch.is_grad_enabled() else self.model._call_impl
        with self.replays.replaying():
            return call(*args, **kwargs)

    def _warn_of_breaks(self, graphs: int, breaks: Sequence[str], result: Any) -> None:
        """Each part of a broken graph has the whole budget, and what is in no part has none."""
        if self.fullgraph or self.warned:
            return
        trains = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_flatten(result)[0])
        if graphs > 1:
            outcome = f"was captured as {graphs} graphs, each of which has the whole budget"
        elif trains and not self.graphs:
            outcome = "trains plain, no part of it could be captured"
        else:
            return
        self.warned = True
        reason = f": {breaks[-1].splitlines()[0]}" if breaks else ""
        warnings.warn(f"moonwalk: {type(self.model).__name__} {outcome}{reason}", stacklevel=4)

    def _reason_to_give_up(self, error: TorchDynamoException, args: Any, kwargs: Any) -> str:
        """An error of ours is raised as it is; without a budget, a model that cannot be captured trains plain."""
        ours = unwrap(error)
        if isinstance(ours, MoonwalkError):
            raise ours from None
        reason = first_line(ours)
        if self.options.budget is not None:
            try_out(self.model, self.call, args, kwargs)
            raise CaptureError(
                "The model could not be captured as one graph",
                reason,
                "change what is named above, pass fullgraph=False, or leave out the budget to train it plain",
            ) from error
        return reason


def unwrap(error: BaseException) -> BaseException:
    """The exception behind Dynamo's wrapping of a failing backend."""
    inner = getattr(error, "inner_exception", None) if isinstance(error, BackendCompilerFailed) else None
    return error if inner is None else inner


def first_line(error: BaseException) -> str:
    """The first line of a message, with the explanation that Dynamo gives in the second one."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line.rstrip(".") for line in lines if line and line != "Explanation:"]
    shown = lines[:2] if len(lines) > 1 and lines[1].startswith("Explanation:") else lines[:1]
    return f"{type(error).__name__}: {'. '.join(shown)}"


class _Planned(Exception):
    """Ends a compilation when the plan stands and nothing is to run."""


def plan_only(model: nn.Module, inputs: Any, options: Options, outputs: Wanted | None = None) -> Plan:
    """The plan of a training step of `model`, without running it."""
    plan = planned_session(model, inputs, options, outputs=outputs).plan
    assert plan is not None
    return plan


def planned_session(
    model: nn.Module,
    inputs: Any,
    options: Options,
    device: str | None = None,
    outputs: Wanted | None = None,
) -> Session:
    """The session in which a training step of `model` was planned; nothing is lowered and nothing runs. Fake models and
    inputs allocate nothing. `inputs` are what `Arguments.of` takes."""
    given, call = Arguments.of(inputs), with_outputs(model._call_impl, outputs)
    sessions: list[Session] = []
    tried_out = False

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        table = find_device(device) if device else device_of(example_inputs)
        session = Session(options, table, list(example_inputs), lower=False)
        try:
            run_autograd(session, gm, example_inputs)
        finally:
            if session.plan is not None:
                sessions.append(session)
        raise _Planned

    while True:
        try:
            with capturing():
                given.call(in_own_frame(call, backend, fullgraph=True))
            break
        except TorchDynamoException as error:
            ours = unwrap(error)
            if isinstance(ours, MoonwalkError):
                raise ours from None
            if sessions or isinstance(ours, _Planned):
                break
            if tried_out:
                raise CaptureError(
                    "The model could not be captured as one graph", first_line(ours), "change what is named above"
                ) from error
            tried_out = True
            with contextlib.suppress(*NOT_ON_FAKE_TENSORS):
                try_out(model, call, given.args, given.kwargs)
    if not sessions:
        raise CaptureError(
            "There is nothing to plan",
            "the model returned nothing that requires a gradient",
            "train it with parameters that require gradients",
        )
    return sessions[-1]


Build = Callable[[], tuple[nn.Module, Any]]  # a model and what `Arguments.of` takes


def plan_model(build: Build, options: Options, device: str, outputs: Wanted | None = None) -> Plan:
    """Build a model under fake tensors and plan its training step for the named device; no memory is allocated."""
    plan = fake_session(build, options, device, outputs).plan
    assert plan is not None
    return plan


def fake_session(build: Build, options: Options, device: str, outputs: Wanted | None = None) -> Session:
    find_device(device)  # measured before fake tensors rule
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, inputs = build()
        model.train()
        return planned_session(model, inputs, options, device, outputs)


def model_front(build: Build, options: Options, device: str, count: int, outputs: Wanted | None = None) -> Front:
    """The front of `count` plans of a model, captured and analysed once. Raises BudgetError for a budget below it."""
    unbounded = replace(options, budget=Budget(fraction=100))
    session = fake_session(build, unbounded, device, outputs)
    assert session.planner is not None
    plain = session.planner.plain
    planners = [planner for planner in (session.planner, session.planner_in_parts) if planner is not None]
    budget = None if options.budget is None else options.budget.resolve(plain.peak)
    points = undominated(points_of(planners, count, budget))
    if budget is not None and points[-1].peak_bytes > budget:
        raise BudgetError(budget, points[-1].peak_bytes, ())
    notes = () if any(p.label == CHECKPOINT for p in points) else ("no module repeats: nothing to checkpoint by hand",)
    return Front(device, options.lowering, plain.peak, plain.seconds, points, budget, notes)
