"""Reverse mode in three ways: all activations are kept, or some, or none and they are solved for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .chain import Batch, Gradients, Layer, Loss, Result, chain_of, loss_and_cotangent, scalar
from .links import TOLERANCE, Link, check, laid_out, links_of, start
from .replay import Replay, replay_of, untouched


def backprop(module: nn.Module, loss_fn: Loss, batch: Batch) -> Result:
    """Plain backpropagation: autograd keeps all that the backward pass will read. The others are measured by it."""
    x, target = batch
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        loss = scalar(loss_fn(module(x), target))
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True) if parameters else ()
    return loss.detach(), dict(zip(parameters, found, strict=True))


def checkpointed_backprop(module: nn.Module, loss_fn: Loss, batch: Batch, *, segments: int | None = None) -> Result:
    """Keep the input of each segment of the chain; in the backward pass, run one segment at a time again.

    Args:
        segments: how many; by default the square root of the number of layers (Chen et al. 2016).
    """
    x, target = batch
    checkpoints: list[tuple[Replay, Any]] = []
    for layers in divided(chain_of(module), segments):
        checkpoints.append((replay_of(layers, x), x))
        with torch.no_grad(), untouched(x):
            for layer in layers:
                x = layer.module(x)
    loss, h = loss_and_cotangent(loss_fn, x, target)
    del x

    gradients = Gradients(module)
    while checkpoints:
        segment, x = checkpoints.pop()
        h = segment_backward(segment, x, h, gradients, wants_input=bool(checkpoints))
    return loss, gradients.finish()


def rev_backprop(
    module: nn.Module, loss_fn: Loss, batch: Batch, *, keep: bool = False, tolerance: float = TOLERANCE
) -> Result:
    """RevBackprop (Gomez et al. 2017): keep the output alone, and solve each layer's input from its output.

    Args:
        keep: keep the inputs of layers that cannot be inverted (such as a classifier); without it, they are refused.
        tolerance: raises UsageError where an input that was solved for, and is at hand or can be computed, differs by
            more than this (relative): then the gradients are not to be trusted.
    """
    x, target = batch
    links = links_of(module, x, "rev_backprop", ("forward", "vjp" if keep else "reverse"))
    state, kept = [start(x)], []
    for link in links:
        kept.append([] if link.inverts() else list(state))
        state = [link.forward(state)]
    loss, h = loss_and_cotangent(loss_fn, state[0], target)

    gradients = Gradients(module)
    state.append(laid_out(h, state[0].stride()))  # [x_L, h_L]
    del h
    for link in reversed(links):
        state, found = reverse_step(link, state, kept.pop(), tolerance)
        gradients.add(link.layer, found)
    check("the input that inversion recovers", state[0], x, tolerance)
    for link in links:
        link.commit()
    return loss, gradients.finish()


def reverse_step(
    link: Link, state: list[Tensor], kept: list[Tensor], tolerance: float
) -> tuple[list[Tensor], list[Tensor | None]]:
    """[y, h_y] -> [x, h_x] and the gradients. Where the layer's input was `kept`, y is only compared."""
    if not kept:
        return link.reverse(state)
    check("an output that inversion recovers", state.pop(0), link.forward(list(kept)), tolerance)
    h, found = link.vjp([*kept, state.pop()])
    return [*kept, h], found


# -- checkpoints -------------------------------------------------------------------------------------------------------


def divided(layers: Sequence[Layer], segments: int | None) -> Iterator[Sequence[Layer]]:
    """Runs of layers of about equal length."""
    if segments is not None and segments < 1:
        raise OptionError("No segments", f"segments is {segments}", "ask for one segment or more")
    length = math.ceil(len(layers) / (segments or math.isqrt(len(layers)) or 1))
    for first in range(0, len(layers), max(length, 1)):
        yield layers[first : first + length]


def segment_backward(segment: Replay, x: Any, h: Tensor, gradients: Gradients, wants_input: bool) -> Tensor:
    """Add the parameters' gradients; the input's cotangent (of no use for the first segment)."""
    leaf = x.detach().requires_grad_() if wants_input else x
    parameters = {id(p): p for layer in segment.layers for p in layer.trained.values()}
    leaves = [*parameters.values(), *([leaf] if wants_input else [])]
    with segment.same_random_numbers(), torch.enable_grad():
        y = segment(leaf)
    if y.requires_grad:
        found = torch.autograd.grad(y, leaves, h, allow_unused=True)
        for parameter, gradient in zip(parameters.values(), found, strict=False):
            gradients.add_for(parameter, gradient)
        if wants_input and found[-1] is not None:
            return found[-1]
    return torch.zeros_like(leaf)
