"""A piece of the joint graph, within which sizes depend on data, made into an operation of its own (see `opaque`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ._torch_compat import largest, tree_flatten
from .cost import base_name
from .graph import Ref
from .opaque import PIECES, Piece, draw
from .program import Instruction, Program
from .sizes import storage_bytes
from .trace import Recorder, faking_like
from .trials import Like

GENERATED = "Runtime assertion failed"  # how torch begins the message of what it has assumed


class SizeUnknown(Exception):
    """Names the operation that makes sizes depend on data, the line that calls it, and why nothing can be done."""

    def __init__(self, node: fx.Node, why: str) -> None:
        trace = (node.meta.get("stack_trace") or "").strip().splitlines()
        places = [place for place, line in enumerate(trace) if line.lstrip().startswith("File ")]
        where = ": ".join(line.strip() for line in trace[places[-1] :][:2]) if places else "nothing says where"
        super().__init__(f"sizes depend on data from `{base_name(node.target)}` on ({where}), and {why}")


def piece_of_graph(
    members: Sequence[fx.Node],
    operands: Sequence[fx.Node],
    results: Sequence[fx.Node],
    again: Container[fx.Node],
    kept: Sequence[fx.Node],
) -> str:
    """The name under which `opaque` finds what `members` compute; equal pieces of a graph have one.

    `again` and `kept` are those members of which `Piece` tells.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sizes = LargestSizes(members[0])
    for place, operand in enumerate(operands):
        copies[operand] = graph.placeholder(f"operand_{place}")
        copies[operand].meta["val"] = sizes.fixed(operand.meta["val"])
    for node in members:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = graph.call_function(target_of(node), tuple(map(_unnamed, args)), kwargs)
        copies[node].meta["val"] = sizes.of(node.meta.get("val"))
    graph.output([copies[result] for result in results])
    layouts = [_layout(node.meta.get("val")) for node in graph.nodes]
    repeated = frozenset(place for place, node in enumerate(members) if node in again)
    kept_bytes = sum(storage_bytes(copies[node].meta["val"]) for node in kept)
    name = hashlib.sha256(f"{graph} {layouts} {sorted(repeated)} {kept_bytes}".encode()).hexdigest()[:16]
    if name not in PIECES:
        likes = tuple(Like.of(result.meta["val"]) for result in results)
        PIECES[name] = Piece(_module(graph), likes, _program(graph), repeated, kept_bytes)
    return name


def target_of(node: fx.Node) -> Callable[..., Any]:
    assert callable(node.target)
    return node.target


def _unnamed(argument: Any) -> Any:
    """What torch itself asserts of sizes names nodes: otherwise equal pieces would differ."""
    generated = isinstance(argument, str) and argument.startswith(GENERATED)
    return f"{GENERATED}: of a size that depends on data" if generated else argument


def _layout(value: Any) -> Any:
    return [Like.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in tree_flatten(value)[0]]


def _module(graph: fx.Graph) -> fx.GraphModule:
    """Without the metadata: fake tensors hold on to all that was traced with them."""
    bare = fx.Graph()
    bare.output(bare.graph_copy(graph, {}))
    return fx.GraphModule(torch.nn.Module(), bare)


class LargestSizes:
    """Tensors of the largest sizes that may come up in the place of those whose sizes depend on data."""

    def __init__(self, first: fx.Node) -> None:
        self.first = first
        self.storages: dict[int, Tensor] = {}

    def fixed(self, tensor: Tensor) -> Tensor:
        """Of a tensor whose size is known; views of it are views of it still."""
        self.storages.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self.of(item) for item in value)
        return largest(value) or 0 if isinstance(value, torch.SymInt) else None

    def _tensor(self, tensor: Tensor) -> Tensor:
        size, stride = [self._most(length) for length in tensor.size()], [self._most(step) for step in tensor.stride()]
        key = tensor.untyped_storage()._cdata
        with faking_like(tensor):
            if key not in self.storages:
                needs = Like(tuple(size), tuple(stride), tensor.dtype, tensor.device).bytes
                room = max(needs, self._most(tensor.untyped_storage().nbytes()))
                self.storages[key] = torch.empty(room, dtype=torch.uint8, device=tensor.device)
            owner = self.storages[key].view(tensor.dtype)
            return owner.as_strided(size, stride)

    def _most(self, size: Any) -> int:
        found = largest(size)
        if found is None:
            raise SizeUnknown(self.first, f"nothing says how large {size} may get; `torch._check({size} <= ...)` does")
        return found


def _program(graph: fx.Graph) -> Program:
    """What is computed inside, for the planner's models of memory and time."""
    recorder, slots = Recorder(), dict[fx.Node, int]()
    inputs: list[tuple[int, int]] = []
    instructions: list[Instruction] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            recorder.add_input(node)
            inputs.append((len(slots), len(slots)))
        elif node.op == "call_function":
            instructions.append(_instruction(recorder, node, slots))
        slots[node] = len(slots)
    results: Any = graph.output_node().args[0]
    return Program(tuple(inputs), tuple(instructions), tuple(Ref(slots[result]) for result in results))


def _instruction(recorder: Recorder, node: fx.Node, slots: Mapping[fx.Node, int]) -> Instruction:
    operation = recorder.add_call(node, slots)
    if operation.target is draw:
        operation = replace(operation, target=node.args[1])  # takes as long as what it calls
    return Instruction(len(slots), operation, tuple(range(len(slots))))
