"""All moves of a step, by their last blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..certificates import Certificate
from ..emit import Segment
from ..inverse import INVERTED
from ..solutions import Facts
from .chains import Chains
from .checkpoints import Checkpoints
from .keeping import Keeping
from .kinds import Kinds
from .move import Move


class MoveMaker:
    """Makes the moves of one step. What no certificate changes is made once."""

    def __init__(self, facts: Facts, strategies: Sequence[str], tolerance: float) -> None:
        self.strategies = tuple(strategies)
        self.kinds = Kinds(facts)
        self.keeping = Keeping(self.kinds)
        self.checkpoints = Checkpoints(self.kinds, self.keeping if "keep" in strategies else None)
        self.chains = Chains(self.kinds, strategies, tolerance)
        self.exact: dict[int, list[Move]] = {}  # by last block

    def ending_at(self, last: int) -> list[Move]:
        """Every segment of an allowed strategy whose last block is `last`; of inverted chains this one block."""
        if last not in self.exact:
            self.exact[last] = self._exact_moves(last)
        chains = self.chains
        inverted = [chains.inversion(last, last)] if chains.reach[last] >= last else []
        return [*self.exact[last], *inverted, *chains.walks(last)]

    def _exact_moves(self, last: int) -> list[Move]:
        moves = [*self.keeping.moves(last), *self.keeping.runs(last)] if "keep" in self.strategies else []
        if "checkpoint" in self.strategies:
            moves = [*moves, *self.checkpoints.moves(last), *self.checkpoints.nested(last)]
        return moves

    def segment(self, move: Move) -> Segment:
        """The segment of a chosen move, whole."""
        segment = move.segment
        if segment.strategy in INVERTED:
            return self.chains.segment(segment.strategy, segment.first, segment.last)
        return replace(segment, inner=self.checkpoints.inner(move))

    def certify(self, certificates: Mapping[tuple[str, int], Certificate]) -> None:
        self.chains.certify(certificates)

    def forbid_inversion(self) -> None:
        self.strategies = tuple(name for name in self.strategies if name not in INVERTED)
        self.chains.forbid()
