"""The chain made ready to run: each layer with its programs, its parameters and buffers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .chain import Layer, chain_of, fingerprint, signature
from .steps import Refused, Step, capture_step, dense_strides

# The programs found for a model, as long as the model lives: those of equal layers are found once.
_FOUND: WeakKeyDictionary[nn.Module, dict[Hashable, Step]] = WeakKeyDictionary()

TOLERANCE = 1e-4  # largest relative error of what is solved for and can be compared

WHAT = {
    "forward": "be computed twice",
    "vjp": "be computed twice",
    "reverse": "be inverted",
    "back": "be inverted",
    "sweep": "give its output's cotangent back from its input's",
    "spine": "hand its cotangent on",
}


@dataclass
class Link:
    """A layer and its programs. They take a list of tensors, which they empty: what nobody else holds is freed."""

    layer: Layer
    step: Step
    state: list[Tensor] = field(init=False)
    updates: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = [*self.layer.trained.values(), *self.layer.fixed.values()]

    def forward(self, given: list[Tensor]) -> Tensor:
        """[x] -> y. What the layer writes into its buffers is written by `commit`."""
        y, *self.updates = self.step.forward(given, self.state)
        return y

    def keeping(self, given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[x] -> y, and the residuals of the spine."""
        y, *rest = self.step.keeping(given, self.state)
        self.updates, residuals = rest[: len(self.step.updates)], rest[len(self.step.updates) :]
        return y, residuals

    def vjp(self, given: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """[x, h_y] -> h_x, and the gradients."""
        h, *gradients = self.step.vjp(given, self.state)
        return laid_out(h, self.step.strides_x), self._spread(gradients)

    def reverse(self, given: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """[y, h_y] -> [x, h_x], and the gradients."""
        x, h, *gradients = self.step.reverse(given, self.state)
        return [x, laid_out(h, self.step.strides_x)], self._spread(gradients)

    def back(self, given: list[Tensor]) -> list[Tensor]:
        """[y, h_y] -> [x, h_x]"""
        x, h = self.step.back(given, self.state)
        return [x, laid_out(h, self.step.strides_x)]

    def spine(self, given: list[Tensor]) -> Tensor:
        """[h_y, *residuals] -> h_x"""
        (h,) = self.step.spine(given, self.state)
        return laid_out(h, self.step.strides_x)

    def sweep(self, given: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """[x, h_x] -> [y, h_y], and the gradients."""
        given[1] = laid_out(given[1], self.step.strides_h_x)
        y, h, *gradients = self.step.sweep(given, self.state)
        return [y, h], self._spread(gradients)

    def _spread(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        found = iter(gradients)
        return [None if value is None else next(found) for value in self.step.parameter_gradients]

    def inverts(self) -> bool:
        return self.step.refusal("reverse") is None

    def commit(self) -> None:
        """Write what the forward pass leaves in the layer's buffers (running statistics)."""
        for position, value in zip(self.step.updates, self.updates, strict=True):
            self.state[position].copy_(value)


def start(x: Tensor) -> Tensor:
    """The input as the first layer's programs take it: without gaps."""
    return laid_out(x.detach(), dense_strides(x))


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`tensor` with these strides; copied only if it has others."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def links_of(module: nn.Module, x: Tensor, algorithm: str, ways: Sequence[str]) -> list[Link]:
    """The layers with their programs. Raises UsageError for the first layer that lacks one of the `ways`."""
    check_input(x)
    found = _FOUND.setdefault(module, {})
    links, like = [], x.detach()
    for layer in chain_of(module):
        link = Link(layer, _step(found, layer, like, algorithm))
        for way in ways:
            if (reason := link.step.refusal(way)) is not None:
                raise refused(algorithm, layer, f"cannot {WHAT[way]}: {reason}")
        links.append(link)
        like = link.step.like(link.step.y)
    _check_shared_updates(links, algorithm)
    return links


def check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise UsageError(
            "This algorithm needs a cotangent of the input",
            f"the input is {f'of type {x.dtype}' if isinstance(x, Tensor) else f'a {type(x).__name__}'}",
            "pass one floating-point tensor, or use checkpointed_backprop",
        )
    if torch.is_autocast_enabled(x.device.type):
        raise UsageError(
            "This algorithm does not run under autocast", "autocast is on", "leave the autocast region, or use backprop"
        )


def _step(found: dict[Hashable, Step], layer: Layer, like: Tensor, algorithm: str) -> Step:
    key = fingerprint(layer.module)
    key = None if key is None else (key, signature(like))
    if key in found:
        return found[key]
    x = torch.empty_strided(like.shape, dense_strides(like), dtype=like.dtype, device=like.device)
    try:
        step = capture_step(layer, x)
    except Refused as reason:
        raise refused(algorithm, layer, str(reason)) from None
    except Exception as error:  # whatever the layer's own code raises while it is traced
        raise refused(algorithm, layer, f"cannot be traced: {type(error).__name__}: {str(error)[:200]}") from error
    if key is not None:
        found[key] = step
    return step


def _check_shared_updates(links: Sequence[Link], algorithm: str) -> None:
    written: set[int] = set()
    for link in links:
        own = {id(link.state[position]) for position in link.step.updates}
        if own & written:
            raise refused(algorithm, link.layer, "overwrites a buffer that another layer overwrites too")
        written |= own


def refused(algorithm: str, layer: Layer, what: str) -> UsageError:
    name = f"layer {layer.name!r} ({type(layer.module).__name__})" if layer.name else f"{type(layer.module).__name__}"
    return UsageError(
        f"{algorithm} cannot train this model", f"{name}: {what}", "use checkpointed_backprop, or change the layer"
    )


def check(what: str, found: Tensor, true: Tensor, tolerance: float) -> None:
    """Raises UsageError where the relative distance is above `tolerance`, or is not a number."""
    scale = float(true.norm())
    error = float((found - true).norm()) / (scale or 1.0)
    if not error <= tolerance:
        raise UsageError(
            "Solving backwards is not accurate enough for this model",
            f"{what} is off by {error:.1e} (relative), tolerance {tolerance:.0e}",
            "compute in double precision, make the layers better conditioned, or use checkpointed_backprop",
        )
