"""The backend for `torch.compile`: `torch.compile(model, backend="moonwalk", options={"budget": "2GiB"})`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from .anchor import Anchor
from .choice import Known
from .errors import BudgetError, CaptureError
from .inputs import is_real, role_of
from .options import Options
from .passes._torch_compat import disable_current_modes, dynamo_aot_autograd, functorch_config, lookup_backend
from .passes.cost import Device, find_device
from .passes.drift import Drift
from .passes.inductor import lower, warm_up
from .passes.lower import boxed_eager
from .passes.sizes import advice
from .report import Plan
from .session import Session
from .sharing import share_memory
from .units import format_bytes

OnPlan = Callable[[Plan], None]
REFRESH = (10, 50)  # steps at which certificates are measured again; then every REFRESH_EVERY
REFRESH_EVERY = 100
ALARM = 0.25  # part of the tolerance to which the values of a chain may drift before it is measured again
GPU_DRIFTS_EVERY = 10
SHARED = "two inputs share memory, and the model writes to one of them"
NEGLIGIBLE = 4096  # bytes above the budget for which nobody plans again: counters and other scalars
SLIGHT = 0.01  # part of the budget by which a step that cannot be made smaller may exceed it


def moonwalk(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; `options` are those of `moonwalk_compile`.

    Raises OptionError for an unknown option (naming the nearest), BudgetError for a budget that cannot be met.
    """
    return compile_graph(gm, example_inputs, Options.from_mapping({**(options or {}), **kwargs}))


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, on_plan: OnPlan | None = None
) -> Callable[..., Any]:
    """Compile `gm` for training; a graph without gradients is compiled as it is."""

    def compiled(inputs: Sequence[Any]) -> Callable[..., Any]:
        if needs_gradient(inputs):
            return CompiledStep(gm, inputs, options, on_plan)
        return compile_inference(gm, inputs, options)

    return ByGradients(compiled, example_inputs)


class ByGradients:
    """A callable for each set of inputs that require gradients, each compiled when it is first met: the Dynamo of
    torch 2.11 does not see that a parameter has been frozen, or is trained again."""

    def __init__(self, compiler: Callable[[Sequence[Any]], Callable[..., Any]], example_inputs: Sequence[Any]) -> None:
        self.compiler = compiler
        inputs = [specialised(value) for value in example_inputs]
        self.compiled = {self._key(inputs): compiler(inputs)}

    def _key(self, arguments: Sequence[Any]) -> tuple[bool, ...]:
        return tuple(isinstance(v, Tensor) and v.requires_grad for v in arguments) if torch.is_grad_enabled() else ()

    def __call__(self, *arguments: Any) -> Any:
        key = self._key(arguments)
        if key not in self.compiled:
            with disable_current_modes():
                self.compiled[key] = self.compiler([specialised(value) for value in arguments])
        return self.compiled[key](*arguments)


def specialised(value: Any) -> Any:
    """A plan holds for one set of sizes: symbolic integers become the integers they stand for."""
    return int(value) if isinstance(value, torch.SymInt) else value


def needs_gradient(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs)


def compile_inference(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Nothing to plan without a backward pass."""
    if options.lowering == "eager":
        return gm.forward
    return lookup_backend("inductor")(gm, list(inputs))


def device_of(inputs: Sequence[Any]) -> Device:
    device = next((v.device for v in inputs if isinstance(v, Tensor) and v.device.type != "cpu"), None)
    if device is None:
        return find_device("cpu")
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return find_device(next((key for key in ("h200", "h100", "a100", "l4", "rtx4090") if key in name), "cuda"))


def run_autograd(session: Session, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """AOTAutograd with our partitioner and the halves that it lowered."""

    def inference(module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        eager = session.options.lowering == "eager"
        return boxed_eager(module) if eager else lower(module, is_backward=False).call

    compiler = dynamo_aot_autograd(
        fw_compiler=session.compile_forward,
        bw_compiler=session.compile_backward,
        inference_compiler=inference,
        partition_fn=session.partition,
        keep_inference_input_mutations=True,
    )
    with functorch_config.patch(donated_buffer=False, enable_autograd_cache=False):
        return compiler(gm, inputs)


@dataclass(frozen=True)
class Trusted:
    """A small buffer whose values inverse rules rest on. On CPU they are compared at each step; elsewhere that would
    wait for the device, and the tensor's version tells."""

    value: Tensor
    address: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Trusted:
        return cls(tensor.detach().clone(), tensor.data_ptr(), tensor._version)

    def holds(self, tensor: Tensor) -> bool:
        if tensor.device.type == "cpu":
            return torch.equal(tensor, self.value)
        return (tensor.data_ptr(), tensor._version) == (self.address, self.version) or torch.equal(tensor, self.value)


class CompiledStep:
    """The compiled callable of one graph. It may swap its plan, but only at a forward call."""

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], options: Options, on_plan: OnPlan | None = None
    ) -> None:
        self.gm, self.options, self.on_plan = gm, options, on_plan
        self.device = device_of(inputs)
        self.steps = 0
        self.alarms: dict[Drift, float] = {}  # where not the usual one
        self.overshoot: int | None = None  # bytes by which the first steps exceeded the prediction, and the budget
        self.corrected = False
        self.session: Session
        self.anchor: Anchor | None = None
        self.warned = False
        self.inputs = [place for place, value in enumerate(inputs) if role_of(value) == "input"]
        self.current: Callable[..., Any] | None = self._compile(inputs)
        if self._shared(inputs):
            self.current = None  # it holds for nothing else

    def _compile(self, inputs: Sequence[Any], known: Known | None = None, margin: int = 0) -> Callable[..., Any]:
        if self.options.lowering == "inductor" and self.device.name == "cpu":
            warm_up()
        session = self._session(inputs, known or {}, margin)
        compiled = run_autograd(session, self.gm, inputs)
        with disable_current_modes():
            self.trusted = {flat: Trusted.of(inputs[flat]) for flat in session.trusted}
            self.anchor = None
            if is_real(inputs) and session.inverts:
                self.anchor = Anchor(inputs, session.places("parameter"), session.places("input"))
        session.example_inputs = None  # nothing may outlive the step because of us
        self.options = replace(self.options, lowering=session.options.lowering)
        self.session, self.written = session, session.written.intersection(self.inputs)
        if session.plan is not None:
            self._publish(session.plan)
        return compiled

    def _session(self, inputs: Sequence[Any], known: Known, margin: int) -> Session:
        given = (self.options, self.device, inputs)
        return Session(*given, known=known, margin=margin, on_measured=self._measured)

    def __call__(self, *arguments: Any) -> Any:
        if self._shared(arguments):
            return self._run_plain(arguments)
        if self.current is None:
            with disable_current_modes():
                self.current = self._compile(arguments)
        self.steps += 1
        if not all(trusted.holds(arguments[flat]) for flat, trusted in self.trusted.items()):
            with disable_current_modes():
                self.current = self._compile(arguments)  # an index or a mask of the model has changed
        if self.overshoot is not None:
            self._correct(arguments)
        elif self.session.inverts:
            self._check(arguments)
        return self.current(*arguments)

    def _shared(self, arguments: Sequence[Any]) -> bool:
        """Whether the step writes to an input that shares memory with another one."""
        return bool(self.written) and share_memory(arguments, self.written, self.inputs)

    def _run_plain(self, arguments: Sequence[Any]) -> Any:
        if self.options.budget is not None:
            todo = "pass a clone of one of them, or leave out the budget to train such calls plain"
            raise CaptureError("The model cannot be compiled for this call", SHARED, todo)
        if not self.warned:
            self.warned = True
            warnings.warn(f"moonwalk: a call trains plain: {SHARED}", stacklevel=3)
        return self.gm(*arguments)

    def _measured(self, peak: int) -> None:
        """The first steps have run: the plan knows what they held."""
        plan = self.session.plan
        assert plan is not None
        self._publish(replace(plan, measured_peak_bytes=peak))
        if plan.budget_bytes is not None and peak > plan.budget_bytes + NEGLIGIBLE and not self.corrected:
            self.overshoot = peak - plan.peak_bytes

    def _publish(self, plan: Plan) -> None:
        self.session.plan = plan
        if self.on_plan is not None:
            self.on_plan(plan)

    def _correct(self, arguments: Sequence[Any]) -> None:
        """Plan again, once, for a budget that is smaller by what the prediction had missed. Where no plan needs less,
        and little is missing, training goes on as it has begun."""
        plan, overshoot = self.session.plan, self.overshoot
        assert plan is not None and plan.measured_peak_bytes is not None and overshoot is not None
        self.overshoot, self.corrected = None, True
        if not is_real(arguments):
            return
        warnings.warn(
            f"moonwalk: the first steps held {format_bytes(plan.measured_peak_bytes)}, above the budget of "
            f"{format_bytes(plan.budget_bytes or 0)} (predicted: {format_bytes(plan.peak_bytes)}); planning again with "
            f"{format_bytes(overshoot)} less",
            stacklevel=3,
        )
        try:
            with disable_current_modes():
                self.current = self._compile(arguments, self.session.known, overshoot)
        except BudgetError:
            if plan.measured_peak_bytes > (1 + SLIGHT) * (plan.budget_bytes or 0):
                raise
            hint = advice(value.device for value in arguments if isinstance(value, Tensor))
            warnings.warn(
                f"moonwalk: no plan needs less; training goes on, slightly above the budget{hint}", stacklevel=3
            )

    def _check(self, arguments: Sequence[Any]) -> None:
        """Measure certificates again where the last ones may not hold, and now and then."""
        if not is_real(arguments):
            return
        with disable_current_modes():
            far = self.anchor is not None and self.anchor.is_far(arguments)
        drifts = self._drifts()
        if far or drifts:
            self._refresh(arguments, drifts, anew=True)
        elif self.steps in REFRESH or self.steps % REFRESH_EVERY == 0:
            self._refresh(arguments, drifts, anew=False)

    def _drifts(self) -> dict[Drift, float]:
        """The chains that the last step saw drift. On a GPU, asking waits for it, so that is done now and then."""
        if self.steps % (1 if self.device.name == "cpu" else GPU_DRIFTS_EVERY):
            return {}
        usual = ALARM * self.options.tolerance
        return {d: size for d, size in self.session.drifts().items() if not size <= self.alarms.get(d, usual)}

    def _refresh(self, arguments: Sequence[Any], drifts: Mapping[Drift, float], anew: bool) -> None:
        """Measure the certificates again, with the weights as they are now: training may have spoilt the conditioning.

        If not `anew`, then only their growth. A chain that drifts below the tolerance is measured again when it has
        drifted twice as far.
        """
        session, tolerance = self.session, self.options.tolerance
        assert session.planned is not None
        known = None if anew else session.certificates
        certificates = session.certify(arguments, session.planned.segments, known)
        if anew and self.anchor is not None:
            with disable_current_modes():
                self.anchor.set(arguments)
        certificates |= session.contradicted([d for d, size in drifts.items() if not size <= tolerance], certificates)
        error = max([session.error_under(certificates), *drifts.values()])
        self.alarms |= {drift: min(tolerance, 2 * size) for drift, size in drifts.items()}
        if error <= tolerance:
            return
        self.alarms.clear()
        warnings.warn(
            f"moonwalk: inversion would now cause a gradient error of {error:.1e}, above the tolerance "
            f"{self.options.tolerance:.1e} (step {self.steps}); planning again without it where needed",
            stacklevel=3,
        )
        with disable_current_modes():
            self.current = self._compile(arguments, {session.in_parts: certificates})
