"""Updating one parameter at a time, exactly as its optimizer would, and refusing what cannot be done so.

No update is written down here: a twin of the optimizer, which shares its state, takes a step for a single parameter.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import UsageError
from .passes._torch_compat import disable_current_modes, global_optimizer_hooks
from .passes.workspace import ProfilerBusy, watched

# Their update of a parameter depends on nothing but the parameter, its gradient, its state and its group.
PER_PARAMETER: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)

_WHY = {
    torch.optim.LBFGS: "LBFGS evaluates the loss several times in a step, and looks at all gradients together",
    torch.optim.SparseAdam: "SparseAdam takes sparse gradients, and the step's are dense",
}
_INSTEAD = "leave the optimizer out: the step then sets .grad, and you call optimizer.step() yourself"


@dataclass(frozen=True)
class Owned:
    """A parameter of the optimizer: where it stands there."""

    parameter: nn.Parameter
    group: int


class Updater:
    """Updates the parameters of one optimizer, each by its number. The optimizer's groups are read at each update.

    Raises UsageError for an optimizer whose step is not one update for each parameter.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        check_kind(optimizer)
        self.optimizer = optimizer
        self.owned: list[Owned] = [
            Owned(parameter, place)
            for place, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]
        if any(type(owned.parameter.data) is not Tensor for owned in self.owned):
            raise _refusal("its parameters are tensors of a kind of their own, such as those of a distributed model")
        self.twin = copy.copy(optimizer)  # without hooks, and without what a scheduler wraps around `step`
        self.check()

    @property
    def key(self) -> tuple[object, ...]:
        """Changes when the optimizer gets other parameters."""
        return tuple((id(p), place) for place, group in enumerate(self.optimizer.param_groups) for p in group["params"])

    def check(self) -> None:
        """Raise UsageError for hooks, which would see no gradient or no step."""
        optimizer = self.optimizer
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or global_optimizer_hooks():
            raise _refusal("it has step hooks, and there is no moment at which all gradients are there")
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise _refusal("it is differentiable, and the step's updates are not recorded")
        for owned in self.owned:
            if owned.parameter._backward_hooks or owned.parameter._post_accumulate_grad_hooks:
                raise _refusal("a parameter has gradient hooks, which would not be called")

    def begin(self) -> None:
        """Before each step: `load_state_dict` puts a new state in the place of the old one."""
        self.twin.state = self.optimizer.state

    def update(self, number: int, parameter: Tensor, gradient: Tensor) -> None:
        """Update in place. A gradient that the parameter has already is added, as `backward()` would, and freed."""
        own = self.owned[number].parameter
        if own.grad is not None:
            gradient = own.grad.add_(gradient)
        own.grad = gradient
        self._step(self.twin, own, self.owned[number].group)
        own.grad = None

    def _step(self, optimizer: Optimizer, parameter: nn.Parameter, place: int) -> None:
        group = {**self.optimizer.param_groups[place], "params": [parameter]}
        if "foreach" in group:
            group["foreach"] = False
        optimizer.param_groups = [group]
        optimizer.step()

    def workspaces(self, numbers: Sequence[int]) -> dict[int, int]:
        """Bytes that each update holds within its call, measured on copies; parameters alike are tried once."""
        found: dict[object, int] = {}
        result = {}
        for number in numbers:
            parameter, place = self.owned[number].parameter, self.owned[number].group
            key = (parameter.shape, parameter.stride(), parameter.dtype, parameter.device, place)
            if key not in found:
                found[key] = self._workspace(parameter, place)
            result[number] = found[key]
        return result

    def _workspace(self, parameter: nn.Parameter, place: int) -> int:
        with disable_current_modes(), torch.no_grad():
            trial = nn.Parameter(torch.zeros_like(parameter))
            trial.grad = torch.ones_like(parameter)
            twin = copy.copy(self.optimizer)
            twin.state = defaultdict(dict)
            if parameter in self.optimizer.state:
                twin.state[trial] = copy.deepcopy(self.optimizer.state[parameter])
            self._step(twin, trial, place)  # makes the state, which stays
            try:
                _, top, end = watched(lambda: self._step(twin, trial, place), parameter.device)
            except ProfilerBusy:
                return 0
        return top - end

    def rest(self) -> None:
        """The optimizer's own step, for parameters with gradients from elsewhere; schedulers wait for it."""
        self.optimizer.step()


def check_kind(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        what = f"the optimizer is a {type(optimizer).__name__}"
        raise UsageError("Not an optimizer", what, "pass one of torch.optim")
    if type(optimizer) in PER_PARAMETER:
        return
    name = type(optimizer).__name__
    unknown = f"{name} is not known to update each parameter by itself"
    raise _refusal(_WHY.get(type(optimizer), unknown))


def _refusal(why: str) -> UsageError:
    return UsageError("This optimizer cannot update within the step", why, _INSTEAD)
