"""Moonwalk (arXiv 2402.14212): the cotangent h_0 of the input first, then one sweep through the layers in order.

Each step of the sweep computes x_i again, takes h_i from h_{i-1} by the vector-inverse-Jacobian product (vijp), and
from h_i the layer's parameter gradients. No activation is kept. A layer's Jacobian must be surjective; that its input
can be recovered is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..errors import OptionError
from .chain import Batch, Gradients, Loss, Result, loss_and_cotangent
from .forward import input_gradient
from .links import TOLERANCE, WHAT, Link, check, laid_out, links_of, refused, start

SpineOption = Literal["auto", "invert", "residuals"]
NOISE = 16  # inversion is charged this part of the layer's output: more than a bit per element, less than the element
SPINE_NEEDS: dict[str, tuple[str, ...]] = {"auto": (), "invert": ("back",), "residuals": ("spine",)}


def moonwalk_pure_forward(
    module: nn.Module, loss_fn: Loss, batch: Batch, *, chunk_size: int = 64, tolerance: float = TOLERANCE
) -> Result:
    """Moonwalk with h_0 by forward mode: one jvp per element of the input, `chunk_size` at a time.

    `tolerance` as in `sweep`.
    """
    x, target = batch
    links = links_of(module, x, "moonwalk_pure_forward", ("forward", "sweep"))
    output = start(x)
    for link in links:
        output = link.forward([output])
    loss, last = loss_and_cotangent(loss_fn, output, target)
    del output
    h = input_gradient(module, loss_fn, (start(x), target), chunk_size)
    return loss, sweep(module, links, [start(x), h], last, tolerance)


def moonwalk_mixed(
    module: nn.Module, loss_fn: Loss, batch: Batch, *, spine: SpineOption = "auto", tolerance: float = TOLERANCE
) -> Result:
    """Moonwalk with h_0 by a reverse pass that keeps next to nothing.

    The reverse pass, the spine, needs each layer's h_{i-1} from h_i. A layer that can be inverted gets x_{i-1} back
    from x_i on the way; any other keeps what its Jacobian reads: nothing for a linear layer, a bit per element for |x|.

    Args:
        spine: "invert" or "residuals" for all layers, or "auto": inversion where residuals take more than about two
            bits per element.
        tolerance: as in `sweep`; also of the input, where the spine recovers it.
    """
    if spine not in SPINE_NEEDS:
        raise OptionError("Unknown spine", f"spine is {spine!r}", f"choose one of {', '.join(SPINE_NEEDS)}")
    x, target = batch
    links = links_of(module, x, "moonwalk_mixed", ("forward", "sweep", *SPINE_NEEDS[spine]))
    plan = choose_spine(links, spine)

    state = [start(x)]
    kept: list[list[Tensor]] = []
    for link, choice in zip(links, plan, strict=True):
        state, own = forward_step(link, choice, state)
        kept.append(own)
    loss, last = loss_and_cotangent(loss_fn, state[0], target)

    state.append(laid_out(last, state[0].stride()))  # [x_L, h_L]
    for link, choice in zip(reversed(links), reversed(plan), strict=True):
        state = spine_step(link, choice, state, kept.pop())
    if len(state) == 2:
        check("the input that inversion recovers", state[0], x, tolerance)

    state[:-1] = [start(x)]  # [x_0, h_0]
    return loss, sweep(module, links, state, last, tolerance)


def sweep(
    module: nn.Module, links: Sequence[Link], state: list[Tensor], last: Tensor, tolerance: float
) -> dict[str, Tensor]:
    """From [x_0, h_0] up to [x_L, h_L], and all parameter gradients on the way.

    The sweep must end with the cotangent that the loss gave, `last`. Raises UsageError where the relative distance is
    above `tolerance`: small differences in the cotangents have grown too much.
    """
    gradients = Gradients(module)
    for link in links:
        state, found = link.sweep(state)
        gradients.add(link.layer, found)
    check("the cotangent that the sweep ends with", state[1], last, tolerance)
    for link in links:
        link.commit()
    return gradients.finish()


# -- the spine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How the spine passes a layer. With `keeps_output`, inversion begins at this layer, from its kept output."""

    inverts: bool
    keeps_output: bool = False


def forward_step(link: Link, choice: Choice, state: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """[x] -> [y], and what is kept for the spine."""
    if not choice.inverts:
        output, residuals = link.keeping(state)
        return [output], residuals
    output = link.forward(state)
    return [output], [output] if choice.keeps_output else []


def spine_step(link: Link, choice: Choice, state: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    """[y, h_y] -> [x, h_x]; or, by residuals, [h_y] or [y, h_y] -> [h_x]."""
    given = [*(own or state[:1]), state.pop()] if choice.inverts else [state.pop(), *own]
    state.clear()
    own.clear()
    return link.back(given) if choice.inverts else [link.spine(given)]


def choose_spine(links: Sequence[Link], spine: SpineOption) -> list[Choice]:
    """The choices of least cost: dynamic programming from the last layer to the first.

    Behind each layer its output is at hand or not: the model's output is, and so is what inversion has just recovered.
    """
    if spine == "invert":
        return [Choice(inverts=True) for _ in links]
    ways: dict[bool, tuple[int, tuple[Choice, ...]]] = {True: (0, ())}
    for link in reversed(links):
        found: dict[bool, tuple[int, tuple[Choice, ...]]] = {}
        for at_hand, (kept, chosen) in ways.items():
            for choice, cost in _choices(link, at_hand, spine):
                way = (kept + cost, (choice, *chosen))
                found[choice.inverts] = min(way, found.get(choice.inverts, way), key=lambda way: way[0])
        if not found:
            reasons = (f"cannot {WHAT[way]}: {link.step.refusal(way)}" for way in ("back", "spine"))
            raise refused("moonwalk_mixed", link.layer, "; ".join(reasons))
        ways = found
    return list(min(ways.values(), key=lambda way: way[0])[1])


def _choices(link: Link, at_hand: bool, spine: SpineOption) -> Iterator[tuple[Choice, int]]:
    """What can be done at a layer, and its cost: the bytes that are kept, and for inversion some more.

    What inversion recovers is not exact, and a sign that it gets wrong changes the cotangent for good.
    """
    if link.step.refusal("spine") is None:
        yield Choice(inverts=False), link.step.residual_bytes
    if spine != "residuals" and link.step.refusal("back") is None:
        kept = 0 if at_hand else link.step.output_bytes
        yield Choice(True, keeps_output=not at_hand), kept + link.step.output_bytes // NOISE
