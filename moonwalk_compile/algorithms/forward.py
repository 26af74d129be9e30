"""Forward mode: directional derivatives by jvps, which need no backward pass and keep no activation.

One jvp gives one number, the derivative along one direction. A gradient of n elements takes n of them, in chunks under
functorch's vmap; or it is estimated from a few random directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from ..errors import OptionError, UsageError
from .chain import Batch, Gradients, Layer, Loss, Result, chain_of, scalar
from .replay import Replay, replay_of, untouched

CHUNK = 64


def forward_mode(
    module: nn.Module,
    loss_fn: Loss,
    batch: Batch,
    *,
    per: Literal["element", "layer"] = "element",
    chunk_size: int = CHUNK,
) -> Result:
    """The gradient by one jvp per parameter element: exact, and quadratic in depth.

    Args:
        per: "element" runs every jvp through the whole model; "layer" takes the elements of one layer at a time and
            starts at that layer, whose input is computed once: half of the work in a deep model.
        chunk_size: how many jvps run at once.
    """
    if per not in FORWARD_MODES:
        raise OptionError("Unknown block of jvps", f"per is {per!r}", f"choose one of {', '.join(FORWARD_MODES)}")
    with untouched(batch[0]):
        return FORWARD_MODES[per](module, loss_fn, batch, chunk_size)


def _per_element(module: nn.Module, loss_fn: Loss, batch: Batch, chunk_size: int) -> Result:
    x, target = batch
    model = replay_of([Layer("", module)], x)
    loss = _plain_loss(module, loss_fn, batch)
    gradients = Gradients(module)
    for name, parameter in gradients.parameters.items():

        def loss_of(value: Tensor, name: str = name) -> Tensor:
            return scalar(loss_fn(model(x, {name: value}), target))

        gradients.add_to(name, by_elements(loss_of, parameter, model, chunk_size))
    return loss, gradients.finish()


def _per_layer(module: nn.Module, loss_fn: Loss, batch: Batch, chunk_size: int) -> Result:
    x, target = batch
    layers = chain_of(module)
    gradients = Gradients(module)
    for position, layer in enumerate(layers):
        rest = replay_of(layers[position:], x)
        found = []
        for name, parameter in layer.trained.items():

            def loss_of(value: Tensor, name: str = name, rest: Replay = rest, x: Any = x) -> Tensor:
                return scalar(loss_fn(rest(x, {name: value}), target))

            with untouched(x):
                found.append(by_elements(loss_of, parameter, rest, chunk_size))
        gradients.add(layer, found)
        with torch.no_grad():
            x = layer.module(x)
    with torch.no_grad():
        return scalar(loss_fn(x, target)).detach(), gradients.finish()


FORWARD_MODES = {"element": _per_element, "layer": _per_layer}


def projected_forward(
    module: nn.Module,
    loss_fn: Loss,
    batch: Batch,
    *,
    directions: int = 1,
    chunk_size: int = CHUNK,
    generator: torch.Generator | None = None,
) -> Result:
    """The forward gradient (Baydin et al. 2022): the mean of (gradient . v) v over random directions v.

    v is standard normal over all parameters together, so the mean is unbiased; its squared error is
    (n + 1) / `directions` times the squared norm of the gradient, for n parameter elements.

    Args:
        directions: how many.
        generator: where directions are drawn from; by default torch's own generator of the parameters' device.
    """
    if directions < 1:
        raise OptionError("No directions", f"directions is {directions}", "ask for one direction or more")
    x, target = batch
    model = replay_of([Layer("", module)], x)
    loss = _plain_loss(module, loss_fn, batch)
    gradients = Gradients(module)
    point = {name: parameter.detach() for name, parameter in gradients.parameters.items()}

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return scalar(loss_fn(model(x, parameters), target))

    for count in _chunks(directions if point else 0, chunk_size):
        drawn = {name: normal_like(value, count, generator) for name, value in point.items()}
        with untouched(x):
            slopes = directional(loss_of, point, drawn, model)
        for name, direction in drawn.items():
            gradients.add_to(name, torch.tensordot(slopes / directions, direction, dims=1))
    return loss, gradients.finish()


def normal_like(value: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn((count, *value.shape), dtype=value.dtype, device=value.device, generator=generator)


def input_gradient(module: nn.Module, loss_fn: Loss, batch: Batch, chunk_size: int) -> Tensor:
    """h_0, the gradient of the loss by the input, by one jvp per element of the input."""
    x, target = batch
    model = replay_of([Layer("", module)], x)
    with untouched(x):
        return by_elements(lambda value: scalar(loss_fn(model(value), target)), x, model, chunk_size)


# -- jvps --------------------------------------------------------------------------------------------------------------


def by_elements(loss_of: Callable[[Tensor], Tensor], point: Tensor, model: Replay, chunk_size: int) -> Tensor:
    """The gradient at `point`, one jvp per element, `chunk_size` at a time."""
    point, found, start = point.detach(), [], 0
    for count in _chunks(point.numel(), chunk_size):
        basis = torch.zeros((count, point.numel()), dtype=point.dtype, device=point.device)
        basis[torch.arange(count), start + torch.arange(count)] = 1
        found.append(directional(loss_of, point, basis.view(count, *point.shape), model))
        start += count
    return torch.cat(found).view(point.shape) if found else torch.zeros_like(point)


@torch.no_grad()
def directional(loss_of: Callable[[Any], Tensor], point: Any, directions: Any, model: Replay) -> Tensor:
    """The derivatives along a stack of directions (tensors, or dicts of them): a vector."""

    def slope(direction: Any) -> Tensor:
        return jvp(loss_of, (point,), (direction,))[1]

    with model.same_random_numbers():
        try:
            return vmap(slope, randomness="same")(directions)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UsageError(
                "A jvp of this model failed", str(error), "replace what the jvp cannot do, or use backprop"
            ) from error


@torch.no_grad()
def _plain_loss(module: nn.Module, loss_fn: Loss, batch: Batch) -> Tensor:
    return scalar(loss_fn(module(batch[0]), batch[1]))


def _chunks(total: int, chunk_size: int) -> Iterator[int]:
    if chunk_size < 1:
        raise OptionError("No chunks", f"chunk_size is {chunk_size}", "ask for one jvp at a time or more")
    for start in range(0, total, chunk_size):
        yield min(chunk_size, total - start)
