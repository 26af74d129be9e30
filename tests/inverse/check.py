"""The universal tester: does solving recover what the forward and backward passes computed?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moonwalk_compile.testing import check_rule

SIZES = {"b": (1, 4), "n": (3, 4), "m": (1, 2), "w": (5, 6), "k": (1, 5)}  # by letter, inclusive


@dataclass(frozen=True)
class Case:
    """`function(x, *parameters)` with one shape per argument, spelled by letters of `SIZES` or digits ("b4 nn").

    `invert`: x can be recovered from the result and the parameters. `vijp`: the cotangent of the result can be
    recovered from that of x, with x and the parameters at hand. What is not promised must be refused.
    """

    name: str
    function: Callable[..., Tensor]
    shapes: str
    invert: bool = True
    vijp: bool = True


@cache
def _orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator)
    q = torch.linalg.qr(tall).Q
    return q if rows >= columns else q.T


def draw_arguments(shapes: str, sizes: dict[str, int], seed: int) -> list[Tensor]:
    """Double-precision arguments; all but the first are well-conditioned matrices, or vectors away from zero."""
    found = []
    for position, spelled in enumerate(shapes.split()):
        shape = [sizes[letter] if letter in sizes else int(letter) for letter in spelled]
        noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + position))
        if position == 0:
            found.append(noise)
        elif len(shape) < 2:
            found.append(noise.sign() * (0.5 + noise.abs()))
        else:
            flat = noise.flatten(1)
            found.append((_orthonormal(*flat.shape, seed) + 0.05 * flat).reshape(shape))
    return found


def check_inverse_rule(case: Case, sizes: dict[str, int], seed: int) -> set[str]:
    """Both questions to one case; returns the labels of the edges that answered."""
    arguments = draw_arguments(case.shapes, sizes, seed)
    return check_rule(case.function, *arguments, invert=case.invert, vijp=case.vijp, seed=seed)
