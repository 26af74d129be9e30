"""What a model is called with, and the inputs of its captured graph: what they are to the user, where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .passes._torch_compat import FakeTensor, InputMutationAOTOutput, PlainAOTInput, tree_map
from .passes.graph import Role


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call, by position and by name."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> Arguments:
        """A mapping names them; one tensor need not stand in a list."""
        if isinstance(given, Arguments):
            return given
        if isinstance(given, Mapping):
            return cls((), dict(given))
        return cls((given,) if isinstance(given, Tensor) else tuple(given))

    def call(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.kwargs)

    def to(self, device: torch.device) -> Arguments:
        moved = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (self.args, self.kwargs))
        return Arguments(*moved)

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)


def role_of(value: Any) -> Role:
    """Dynamo marks the tensors that modules own."""
    if isinstance(value, torch.nn.Parameter):
        return "parameter"
    return "buffer" if getattr(value, "_dynamo_static_input_type", None) else "input"


def is_real(values: Sequence[Any]) -> bool:
    return not any(isinstance(value, FakeTensor) for value in values)


def input_positions(joint: fx.GraphModule) -> dict[int, int]:
    """The position in the captured graph's inputs of each primal, by AOTAutograd's descriptions."""
    found, primal = {}, 0
    for node in joint.graph.find_nodes(op="placeholder"):
        if "tangents" in str(node.target):
            continue
        description = node.meta.get("desc")
        if isinstance(description, PlainAOTInput):  # not an effect token, a base of views or a seed
            found[primal] = description.idx
        primal += 1
    return found


def written_positions(
    joint: fx.GraphModule, mutated: Iterable[int], positions: Mapping[int, int], inputs: Sequence[Any]
) -> frozenset[int]:
    """Inputs that the graph writes to, or AOTAutograd behind it. Where inputs share memory and one of them is written
    to, AOTAutograd merges them, and they have no position."""
    described = joint.graph.output_node().meta.get("desc") or ()
    behind = [d.mutated_input for d in described if isinstance(d, InputMutationAOTOutput)]
    found = {positions[value] for value in mutated if value in positions}
    found |= {source.idx for source in behind if isinstance(source, PlainAOTInput)}
    tensors = {place for place, value in enumerate(inputs) if isinstance(value, Tensor)}
    return frozenset(found | (tensors - set(positions.values())))
