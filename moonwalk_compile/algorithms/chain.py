"""A model as a chain of layers x_i = f_i(x_{i-1}), and what all algorithms share: the loss, gradients by name."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UsageError

Loss = Callable[[Any, Any], Tensor]
Batch = tuple[Any, Any]
Result = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Layer:
    """One link of the chain: a module from one tensor to one tensor, and the path to it in the model."""

    name: str
    module: nn.Module

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers."""
        frozen = {name: p.detach() for name, p in self.module.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.module.named_buffers())}


def chain_of(module: nn.Module) -> tuple[Layer, ...]:
    """The children of an `nn.Sequential`, nested ones in their places; any other module is one layer."""
    return tuple(_links("", module))


def _links(name: str, module: nn.Module) -> Iterator[Layer]:
    if type(module).forward is not nn.Sequential.forward or has_hooks(module):
        yield Layer(name, module)
        return
    for child, inner in module._modules.items():  # `named_children` leaves out a layer that stands there twice
        assert inner is not None
        yield from _links(f"{name}.{child}" if name else child, inner)


def has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict))


def call(module: nn.Module, tensors: Mapping[str, Tensor], x: Any) -> Any:
    """The module with other parameters and buffers. Tied ones are replaced together.

    `functional_call` with `tie_weights` leaves the wrong tensors behind in a module that stands in two places.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    given = {id(own[name]): tensor for name, tensor in tensors.items()}
    places = {}
    for path, inner in module.named_modules():
        for name, tensor in {**inner._parameters, **inner._buffers}.items():
            if id(tensor) in given:
                places[f"{path}.{name}" if path else name] = given[id(tensor)]
    return functional_call(module, places, (x,), tie_weights=False)


class Gradients:
    """The gradients by the model's parameter names. Tied parameters add up; those that nothing reads have zeros."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.name_of = {id(p): name for name, p in self.parameters.items()}
        self.found: dict[str, Tensor] = {}

    def add(self, layer: Layer, gradients: Sequence[Tensor | None]) -> None:
        """Add what one layer has found for each of `layer.trained`."""
        for parameter, gradient in zip(layer.trained.values(), gradients, strict=True):
            self.add_for(parameter, gradient)

    def add_for(self, parameter: Tensor, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.add_to(self.name_of[id(parameter)], gradient)

    def add_to(self, name: str, gradient: Tensor) -> None:
        self.found[name] = self.found[name] + gradient if name in self.found else gradient

    def finish(self) -> dict[str, Tensor]:
        return {name: self.found.get(name, torch.zeros_like(p)).detach() for name, p in self.parameters.items()}


def loss_and_cotangent(loss_fn: Loss, output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """The loss, and h_L: its gradient with respect to the output."""
    if not isinstance(output, Tensor):
        raise UsageError(
            "The model's output is not one tensor",
            f"it is a {type(output).__name__}",
            "return a tensor, or use backprop",
        )
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        loss = scalar(loss_fn(leaf, target))
    return loss.detach(), torch.autograd.grad(loss, leaf, materialize_grads=True)[0]


def scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim():
        raise UsageError(
            "The loss is not a scalar",
            f"loss_fn(output, target) returned {type(loss).__name__} of shape {tuple(getattr(loss, 'shape', ()))}",
            "reduce it to one number, for example by .mean()",
        )
    return loss


# -- equal layers ------------------------------------------------------------------------------------------------------

_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, *_TORCH)
_OWN = frozenset(vars(nn.Module())) - {"training"}


class _Opaque(Exception):
    """Something whose state a fingerprint cannot describe."""


def fingerprint(module: nn.Module) -> Hashable | None:
    """Equal for modules that compute the same function of input, parameters and buffers; None if that is not known."""
    try:
        return _fingerprint(module), _ties(module)
    except _Opaque:
        return None


def _fingerprint(module: nn.Module) -> Hashable:
    if has_hooks(module):
        raise _Opaque
    attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
    return (
        type(module),
        _frozen(attributes),
        tuple((name, _described(tensor)) for name, tensor in {**module._parameters, **module._buffers}.items()),
        tuple((name, child and _fingerprint(child)) for name, child in module._modules.items()),
    )


def _ties(module: nn.Module) -> Hashable:
    """Which parameters and buffers are one tensor."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(tensor), position) for position, (_, tensor) in enumerate(tensors))


def _described(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (signature(tensor), isinstance(tensor, nn.Parameter), tensor.requires_grad)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return (type(value), repr(value))
    if isinstance(value, (tuple, list)):
        return (type(value), *(_frozen(item) for item in value))
    if isinstance(value, Mapping):
        return (type(value), *((_frozen(key), _frozen(item)) for key, item in value.items()))
    if isinstance(value, type) or (isinstance(value, types.BuiltinFunctionType) and _is_free(value.__self__)):
        return value
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        return (value, _frozen(value.__defaults__))
    raise _Opaque


def _is_free(owner: Any) -> bool:
    """Of a builtin function: whether it is no method of some object."""
    return owner is None or isinstance(owner, (type, types.ModuleType))


def signature(tensor: Tensor) -> Hashable:
    return (tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.device)
