"""Convolutions that a mask makes triangular: solved where its values say so, and refused otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.passes.inverse import inverse_edges, solve
from moonwalk_compile.passes.inverse.constants import Constants
from moonwalk_compile.testing import capture_joint, true_values

CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def raster(*kernel: int, reverse: bool = False) -> Tensor:
    """Ones up to the middle, in the order of rows."""
    ones = torch.zeros(kernel, dtype=torch.float64)
    ones.view(-1)[: ones.numel() // 2 + 1] = 1
    return ones.flip(tuple(range(len(kernel)))) if reverse else ones


def layer(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    groups = x.shape[1] // weight.shape[1]
    return CONVOLVE[x.dim()](x, weight * mask, padding=tuple(k // 2 for k in weight.shape[2:]), groups=groups)


def answers(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, mask: Tensor, known: bool = True
) -> tuple[bool, bool]:
    """Whether the image and the cotangent are solved for by substitution; what is solved must be right."""
    capture = capture_joint(function, [x, weight, mask], [True, True, False])
    graph, truth = capture.graph, true_values(capture, [x, weight, mask])
    constants = Constants.of({graph.primals[2]: mask} if known else {})
    forward = [edge for edge in graph.edges if edge.stage == "forward"]
    inverse = [e for e in inverse_edges(capture, DEVICES["cpu"], constants=constants) if "triangular" in e.label]
    assert not inverse or constants.trusted == {graph.primals[2]}  # the compiled step watches what it rests on
    found = []
    for start, wanted in ((graph.output_values, graph.primals[:1]), ([graph.gradients[0].slot], graph.tangents)):
        solution = solve([*forward, *inverse], [*start, *graph.primals[1:]], wanted)
        found.append(not solution.missing)
        if not solution.missing:
            environment = {value: truth[value] for value in solution.known}
            (value,) = wanted
            reached = run_edges(solution.program(wanted), environment)[value]
            assert (reached - truth[value]).norm() < 1e-8 * truth[value].norm()
    return found[0], found[1]


def draw(*sizes: int, channels: int = 4, groups: int = 1, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """An image, and a kernel with an orthogonal tap in the middle."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *sizes, dtype=torch.float64, generator=generator)
    weight = 0.1 * torch.randn(channels, channels // groups, *kernel, dtype=torch.float64, generator=generator)
    for group in weight[(..., *(k // 2 for k in kernel))].chunk(groups):
        group.copy_(torch.linalg.qr(group).Q)
    return x, weight


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("sizes", "kernel", "groups"),
    [((40,), (3,), 1), ((6, 7), (3, 3), 1), ((5, 40), (3, 5), 2), ((3, 4, 5), (3, 3, 3), 1), ((6, 7), (3, 3), 4)],
)
def test_masked_convolutions_are_solved(
    sizes: tuple[int, ...], kernel: tuple[int, ...], groups: int, reverse: bool
) -> None:
    x, weight = draw(*sizes, groups=groups, kernel=kernel)
    mask = raster(*kernel, reverse=reverse)
    for spelled in (mask, mask[None, None], mask.expand_as(weight).clone()):
        assert answers(layer, x, weight, spelled) == (True, True)


def shifted(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (2, 0, 1, 1)), weight * mask)


def halved(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return F.conv2d(x, weight * mask * 2, padding=1)


def strided(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return F.conv2d(x, weight * mask, padding=1, stride=2)


FULL, HALF = torch.ones(3, 3, dtype=torch.float64), raster(3, 3)
BEHIND = HALF + torch.eye(9, dtype=torch.float64)[5].view(3, 3)
WITHOUT = HALF - torch.eye(9, dtype=torch.float64)[4].view(3, 3)


@pytest.mark.parametrize(
    ("function", "mask", "known"),
    [
        (layer, HALF, False),  # nobody knows its values
        (layer, FULL, True),
        (layer, BEHIND, True),  # a tap behind the middle
        (layer, WITHOUT, True),  # nothing is read at an output's own place
        (layer, HALF / 2, True),  # no mask
        (halved, HALF, True),  # the mask is not the last factor
        (strided, HALF, True),
        (shifted, WITHOUT, True),
    ],
)
def test_other_masks_are_refused(function: Callable[..., Tensor], mask: Tensor, known: bool) -> None:
    x, weight = draw(6, 8, kernel=(3, 3))
    assert answers(function, x, weight, mask, known) == (False, False)


def test_a_mask_of_channels_is_the_union_of_its_taps() -> None:
    """Of two channels, one reads the tap behind the middle."""
    x, weight = draw(6, 7, channels=2, kernel=(3, 3))
    mask = HALF.expand_as(weight).clone()
    mask[0, 1] = BEHIND
    assert answers(layer, x, weight, mask) == (False, False)
