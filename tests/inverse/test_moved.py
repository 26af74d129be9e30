"""What is said to be a moved tensor is one, element by element; and nothing else is said to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moonwalk_compile.passes.inverse.moved import Moved, sources, targets
from moonwalk_compile.passes.inverse.regions import Reader
from moonwalk_compile.testing import capture_joint, true_values

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: F.pad(x, (1, 2, 0, 3)),
    "cropped": lambda x: F.pad(x, (1, -2, -1, 0)),
    "reflected": lambda x: F.pad(x, (2, 1, 3, 0), "reflect"),
    "replicated": lambda x: F.pad(x, (2, 5, 0, 3), "replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 4, 5), "circular"),
    "joined": lambda x: torch.cat([x[..., -2:], x, torch.zeros_like(x[..., :1]), x[..., :1]], -1),
    "strided": lambda x: F.pad(x[..., 1::2, :-1], (1, 1)),
    "twice": lambda x: F.pad(F.pad(x, (1, 1, 0, 0), "circular")[:, :, 1:], (0, 0, 2, 2), "reflect"),
}
UNMOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "another number": lambda x: F.pad(x, (1, 1), value=1.0),
    "an addend": lambda x: torch.add(x, x.flip(-1), alpha=2),
    "another type": lambda x: F.pad(x.float(), (1, 1)),
    "a corner": lambda x: torch.slice_scatter(x, torch.slice_scatter(x[..., :2], x[..., 1:2, :2], 2, 0, 1), 3, 0, 2),
    "turned": lambda x: x.transpose(-1, -2).contiguous(),
}


def capture(function: Callable[[Tensor], Tensor]) -> tuple[Reader, dict[int, Tensor]]:
    """x and the cotangent between others, as they are in a net."""
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    captured = capture_joint(lambda x: function(x.tanh()).exp(), [x])
    return Reader(captured), true_values(captured, [x])


def move(moved: Moved, source: Tensor) -> Tensor:
    for dim, side in enumerate(moved.sides):
        rows = [
            sum((source.select(dim, i) for i in place or ()), torch.zeros_like(source.select(dim, 0))) for place in side
        ]
        source = torch.stack(rows, dim)
    return source


@pytest.mark.parametrize("name", MOVES)
def test_every_description_holds(name: str) -> None:
    reader, truth = capture(MOVES[name])
    (x,), (padded,) = reader.edges("tanh")[0].gives, reader.edges("exp")[0].needs
    cotangent, gradient = reader.edges("mul")[0].gives[0], reader.edges("tanh_backward")[0].needs[0]
    forward, backward = dict(sources(reader, padded)), dict(targets(reader, cotangent))
    assert x in forward and gradient in backward
    pairs = [(source, padded, moved) for source, moved in forward.items()]
    pairs += [(cotangent, target, moved) for target, moved in backward.items()]
    for source, target, moved in pairs:
        assert moved.known and torch.allclose(move(moved, truth[source]), truth[target])


@pytest.mark.parametrize("name", UNMOVED)
def test_what_is_not_moved_is_not_described(name: str) -> None:
    reader, _ = capture(UNMOVED[name])
    (x,), (padded,) = reader.edges("tanh")[0].gives, reader.edges("exp")[0].needs
    assert x not in dict(sources(reader, padded))
