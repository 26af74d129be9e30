"""An operator that stands for a piece of a graph within which sizes depend on data.

Its results have fixed sizes, so that it can be planned like any other: kept, or computed again. What it holds
meanwhile and how long it takes are those of the largest sizes that may come up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import Library, register_fake
from torch.utils.flop_counter import register_flop_formula

from .graph import Graph
from .program import Program
from .trials import Like

_library = Library("moonwalk_compile", "FRAGMENT")
_library.define("opaque(Tensor[] operands, str piece) -> Tensor[]")


@dataclass(frozen=True)
class Piece:
    """`module` computes results that are laid out as `results`; `program` is the same on the largest sizes.

    Plain backpropagation makes the instructions `again` no second time: for the backward pass it keeps `kept` bytes of
    what they make.
    """

    module: fx.GraphModule
    results: tuple[Like, ...]
    program: Program
    again: frozenset[int]
    kept: int


PIECES: dict[str, Piece] = {}  # by what they compute: equal ones are one


def has_pieces(graph: Graph) -> bool:
    return any(operation.target is OPAQUE for edge in graph.edges for operation in edge.operations)


def piece_of(arguments: Sequence[Any]) -> Piece:
    """What a call with these arguments computes."""
    return PIECES[arguments[1]]


def _run(operands: Sequence[Tensor], piece: str) -> list[Tensor]:
    found = PIECES[piece]
    memory = {operand.untyped_storage().data_ptr() for operand in operands}
    results = []
    for result, like in zip(found.module(*operands), found.results, strict=True):
        storage = result.untyped_storage()
        own = storage.data_ptr() not in memory and storage.nbytes() <= like.bytes
        results.append(result if own and result.stride() == like.stride else _copy(result, like))
        memory.add(results[-1].untyped_storage().data_ptr())
    return results


def draw(seed: Tensor, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What an operation gives when the generator starts from a seed; the generator then goes on from where it was."""
    device = next((item.device for item in (*args, *kwargs.values()) if isinstance(item, Tensor)), seed.device)
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(int(seed))
    try:
        return operation(*args, **kwargs)
    finally:
        generator.set_state(state)


def _copy(result: Tensor, like: Like) -> Tensor:
    return _empty(like).copy_(result)


def _empty(like: Like) -> Tensor:
    return torch.empty_strided(like.size, like.stride, dtype=like.dtype, device=like.device)


@register_fake("moonwalk_compile::opaque")
def _fake(operands: Sequence[Tensor], piece: str) -> list[Tensor]:
    return [_empty(like) for like in PIECES[piece].results]


_library.impl("opaque", _run, "CompositeExplicitAutograd")


@register_flop_formula(torch.ops.moonwalk_compile.opaque, get_raw=True)
def _flops(operands: Sequence[Tensor], piece: str, **_: Any) -> int:
    return int(sum(instruction.operation.flops for instruction in PIECES[piece].program.instructions))


OPAQUE = torch.ops.moonwalk_compile.opaque.default
