"""Rules that rest on the values of buffers: what they recover, and what other values must refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.graph import Edge
from moonwalk_compile.passes.inverse import inverse_edges
from moonwalk_compile.passes.inverse.constants import Constants, computed, is_candidate
from moonwalk_compile.testing import capture_joint, check_reached, true_values

PERMUTATION = torch.tensor([2, 0, 3, 1])
EVEN, ODD = torch.tensor([0, 2]), torch.tensor([1, -1])
MASK = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)


def permuted(x: Tensor, p: Tensor) -> Tensor:
    return x[:, p].exp()


def selected(x: Tensor, p: Tensor) -> Tensor:
    return torch.index_select(x, -1, p).exp()


def coupling(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As nflows writes it."""
    kept, changed = x[:, a], x[:, b]
    y = torch.empty_like(x)
    y[:, a] = kept
    y[:, b] = changed * kept.sin().exp() + kept.cos()
    return y


def masked_forward(x: Tensor, b: Tensor) -> Tensor:
    """As normflows writes it."""
    kept = b * x
    return kept + (1 - b) * (x * torch.exp(kept.sin()) + kept.cos())


def masked_inverse(x: Tensor, b: Tensor) -> Tensor:
    kept = b * x
    return kept + (1 - b) * (x - kept.cos()) * torch.exp(-kept.sin())


def ask(function: Callable[..., Tensor], constants: tuple[Tensor, ...], expected: bool) -> set[str]:
    """Whether x follows from the result and the constants."""
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    capture = capture_joint(function, [x, *constants])
    graph = capture.graph
    assert all(is_candidate(tensor) for tensor in constants)
    known = Constants.of({**dict(zip(graph.primals[1:], constants, strict=True)), **computed(capture)})
    forward = [edge for edge in graph.edges if not edge.effect and not edge.random]
    edges: list[Edge] = [*forward, *inverse_edges(capture, DEVICES["cpu"], constants=known)]
    truth = true_values(capture, [x, *constants])
    used = check_reached(edges, truth, [*graph.output_values, *graph.primals[1:]], graph.primals[:1], expected)
    assert not expected or set(graph.primals[1:]) <= known.trusted  # the compiled step watches what it rests on
    return used


@pytest.mark.parametrize(
    ("function", "constants"),
    [
        (permuted, (PERMUTATION,)),
        (selected, (PERMUTATION,)),
        (permuted, (PERMUTATION - 4,)),
        (coupling, (EVEN, ODD)),
    ],
)
def test_permutations_and_index_sets_are_undone(function: Callable[..., Tensor], constants: tuple[Tensor, ...]) -> None:
    assert "inverse of gathers" in ask(function, constants, True)


def test_what_is_computed_from_nothing_is_known() -> None:
    assert "inverse of gathers" in ask(lambda x: x[:, torch.arange(3, -1, -1)].exp(), (), True)
    ask(lambda x: x[:, torch.arange(4) // 2].exp(), (), False)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("scale", [2, 3, (1, 4)])
def test_upsampling_to_the_nearest_is_undone(scale: int | tuple[int, int], mode: str) -> None:
    def upsampled(x: Tensor) -> Tensor:
        return F.interpolate(x[None, None], scale_factor=scale, mode=mode).exp()

    assert "inverse of repeated elements" in ask(upsampled, (), True)


def test_uneven_upsampling_is_resampling() -> None:
    upsampled = ask(lambda x: F.interpolate(x[None, None], size=(7, 6), mode="nearest").exp(), (), True)
    assert "inverse of repeated elements" not in upsampled and "inverse of resampling" in upsampled


@pytest.mark.parametrize("size", [(5, 3), (10, 2)])
def test_downsampling_is_refused(size: tuple[int, int]) -> None:
    ask(lambda x: F.interpolate(x[None, None], size=size, mode="nearest").exp(), (), False)


@pytest.mark.parametrize("function", [masked_forward, masked_inverse])
def test_mixtures_by_a_mask_are_undone(function: Callable[..., Tensor]) -> None:
    assert "inverse of a mixture" in ask(function, (MASK,), True)


@pytest.mark.parametrize(
    ("function", "constants"),
    [
        (permuted, (torch.tensor([2, 0, 3, 3]),)),  # an element twice
        (permuted, (torch.tensor([2, 0, 3]),)),  # an element is missing
        (permuted, (torch.tensor([2, 0, 3, -2]),)),  # twice, once counted from the end
        (coupling, (EVEN, torch.tensor([1, 2]))),  # overlapping
        (coupling, (EVEN[:1], ODD)),  # a hole
        (masked_forward, (MASK / 2,)),  # no mask
        (masked_inverse, (MASK + 0.25,)),
    ],
)
def test_other_values_are_refused(function: Callable[..., Tensor], constants: tuple[Tensor, ...]) -> None:
    ask(function, constants, False)


def test_a_later_write_hides_an_earlier_one() -> None:
    def overwritten(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:, a] = x[:, a]
        y[:, b] = x[:, b].exp()
        y[:, a] = x[:, b]
        return y

    ask(overwritten, (EVEN, ODD), False)


def test_without_values_nothing_is_assumed() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    capture = capture_joint(permuted, [x, PERMUTATION])
    labels = {edge.label for edge in inverse_edges(capture, DEVICES["cpu"])}
    assert "inverse of gathers" not in labels
