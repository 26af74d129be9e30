"""What is known of the accuracy of inversion, block by block, and how errors add up along a chain of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .emit import Segment


@dataclass(frozen=True)
class Certificate:
    """How much relative noise one block adds (`local`) and by how much it amplifies what it is given (`growth`)."""

    local: float
    growth: float


TRUSTED = Certificate(0.0, 1.0)


@dataclass(frozen=True)
class Noise:
    """Error carried along a chain: invert grows it from last block to first, moonwalk from first to last."""

    strategy: str
    total: float = 0.0
    amplification: float = 1.0
    worst: float = 0.0

    @property
    def error(self) -> float:
        return self.worst

    def grown(self, block: Certificate) -> Noise:
        """Prepend a block to the chain. What is not a number is not trusted."""
        if not (math.isfinite(block.local) and math.isfinite(block.growth) and math.isfinite(self.total)):
            return replace(self, total=math.inf, worst=math.inf)
        if self.strategy == "invert":
            carried = math.hypot(self.total * block.growth, block.local)
            return replace(self, total=carried, worst=max(self.worst, carried))
        # Moonwalk carries noise the other way: a block put in front adds its local error times all growth behind it.
        amplification = max(1.0, self.amplification * block.growth)
        total = math.hypot(self.total, block.local * self.amplification)
        return replace(self, total=total, amplification=amplification, worst=max(self.worst, total))


def chain_error(segment: Segment, certificates: Mapping[tuple[str, int], Certificate]) -> float:
    """Predicted relative error of the gradients of an inverted segment; infinite where a certificate is missing."""
    noise = Noise(segment.strategy)
    for index in reversed(segment.span):
        certificate = certificates.get((segment.strategy, index))
        if certificate is None:
            return math.inf
        noise = noise.grown(certificate)
    return noise.error


def reach(certificates: Iterable[Certificate], tolerance: float) -> int:
    """How many blocks, from the front, an inverted chain may have so that no error in it is above the tolerance.

    Followed from the front, a chain is asked how much noise may come in from behind.
    """
    count, most = 0, tolerance * (1 - 1e-9)
    limit = most
    for block in certificates:
        if not (math.isfinite(block.local) and math.isfinite(block.growth) and block.local <= limit):
            break
        count += 1
        left = math.sqrt(limit**2 - block.local**2) if math.isfinite(limit) else limit
        limit = min(most, left / block.growth) if block.growth > 0 else most
    return count
