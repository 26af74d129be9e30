"""Certificates hold near the weights and inputs for which they were measured: this tells when a step is far from them.

Training moves weights slowly, and what it does to inversion is seen step by step (`passes/drift.py`). A checkpoint that
is loaded, or weights that are reset, may spoil the very next step; they are seen here, before it runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLE = 64  # elements of a parameter
INPUT_SAMPLE = 1024
FAR = 0.5  # of the size of a parameter
SMALL = 0.1  # a bias or a scale that is smaller than this counts as so large
WIDER = 2.0  # times the size of the largest input, or below the smallest by as much: not measured yet


class Anchor:
    """A sample of each parameter of a graph, and the sizes of its other inputs, at the last certificates.

    On a CPU each step is compared. Elsewhere that would wait for the device, so it is done only where the parameters
    were not written to as often as in the step before.
    """

    def __init__(self, inputs: Sequence[Any], parameters: Sequence[int], others: Sequence[int]) -> None:
        self.parameters = [flat for flat in parameters if inputs[flat].numel()]
        self.others = [flat for flat in others if is_sizeable(inputs[flat])]
        self.on_cpu = all(inputs[flat].device.type == "cpu" for flat in (*self.parameters, *self.others))
        self.written = self._writes(inputs)
        self.pace: list[int] = []
        self.ranges = dict.fromkeys(self.others, (math.inf, 0.0))
        self.set(inputs)

    @torch.no_grad()
    def set(self, inputs: Sequence[Any]) -> None:
        """Certificates have been measured on these."""
        self.samples = [sample.clone() for sample in self._samples(inputs)]
        floors = (SMALL if inputs[flat].dim() < 2 else 0.0 for flat in self.parameters)
        found = zip(norms(self.samples), floors, self.samples, strict=True)
        self.sizes = [max(size, floor * math.sqrt(len(sample))) for size, floor, sample in found]
        for flat, size in zip(self.others, self._sizes(inputs), strict=True):
            low, high = self.ranges[flat]
            self.ranges[flat] = min(low, size), max(high, size)

    @torch.no_grad()
    def is_far(self, inputs: Sequence[Any]) -> bool:
        """Whether anything is far from what it was."""
        if not self.on_cpu and self._as_usual(inputs):
            return False
        samples = self._samples(inputs)
        moved = norms(torch._foreach_sub(samples, self.samples)) if samples else []
        for sample, distance, size in zip(samples, moved, self.sizes, strict=True):
            if distance > FAR * size and distance > FAR * float(sample.norm()):
                return True
        ranges = self.ranges.values()
        return any(
            size > WIDER * high or size < low / WIDER
            for size, (low, high) in zip(self._sizes(inputs), ranges, strict=True)
        )

    def _as_usual(self, inputs: Sequence[Any]) -> bool:
        before, self.written = self.written, self._writes(inputs)
        usual, self.pace = self.pace, [now - then for (_, now), (_, then) in zip(self.written, before, strict=True)]
        same_places = all(now == then for (now, _), (then, _) in zip(self.written, before, strict=True))
        return same_places and self.pace == (usual or self.pace)

    def _writes(self, inputs: Sequence[Any]) -> list[tuple[int, int]]:
        """Where each parameter lies, and how often it was written to."""
        return [(inputs[flat].data_ptr(), inputs[flat]._version) for flat in self.parameters]

    def _samples(self, inputs: Sequence[Any]) -> list[Tensor]:
        return [spread(inputs[flat].detach(), SAMPLE) for flat in self.parameters]

    def _sizes(self, inputs: Sequence[Any]) -> list[float]:
        found = norms([spread(inputs[flat].detach(), INPUT_SAMPLE) for flat in self.others])
        return [0.0 if math.isnan(size) else size for size in found]


def is_sizeable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def spread(tensor: Tensor, most: int) -> Tensor:
    """A flat view of a few elements, an odd number apart: an even one might meet a single column of a matrix."""
    count = min(most, tensor.numel())
    step = tensor.numel() // count
    if not tensor.is_contiguous():
        return tensor.flatten()[::step][:count]
    return tensor.as_strided((count,), (step - 1 + step % 2,))


def norms(tensors: Sequence[Tensor]) -> list[float]:
    found = torch._foreach_norm(list(tensors)) if tensors else ()
    return [float(norm) for norm in found] if len({norm.dtype for norm in found}) != 1 else torch.stack(found).tolist()
