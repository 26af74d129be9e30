"""From FX nodes to operations: sizes, aliases and costs read off the fake tensors that tracing left behind."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._torch_compat import FakeTensorMode, OpOverload, TorchDispatchMode, tree_flatten, tree_map
from .cost import count_flops
from .graph import Call, Operation, Ref
from .sizes import storage_bytes
from .trials import frozen_call


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def storage_keys(value: Any) -> list[int]:
    return [tensor.untyped_storage()._cdata for tensor in tensors_of(value)]


def call_of(node: fx.Node) -> Call | None:
    """What the time and the memory of a call depend on."""
    if not isinstance(node.target, OpOverload):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: item.meta.get("val"))
    return (node.target, *frozen_call(args, kwargs))


def may_borrow(node: fx.Node) -> bool:
    """Pointwise operations on one type need no memory of their own; of several, CPU kernels copy operands to one.

    Losses are tagged pointwise too: where one number comes out, what it is the mean of has been held meanwhile.
    """
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return True
    operands = [tensor for argument in node.all_input_nodes for tensor in tensors_of(argument.meta.get("val"))]
    results = tensors_of(node.meta.get("val"))
    kinds = {(tensor.dtype, tensor.device) for tensor in (*operands, *results)}
    return len(kinds) != 1 or max(t.numel() for t in operands) > min(t.numel() for t in results)


class Recorder:
    """Numbers FX nodes as slots and describes each call by the storages that it allocates or shares."""

    def __init__(self) -> None:
        self.slot: dict[fx.Node, int] = {}
        self.held: list[list[int]] = []

    def add_input(self, node: fx.Node) -> None:
        self.slot[node] = len(self.held)
        self.held.append(storage_keys(node.meta.get("val")))

    def add_call(self, node: fx.Node) -> Operation:
        value = node.meta.get("val")
        inputs = [self.slot[argument] for argument in node.all_input_nodes]
        new: list[int] = []
        holds: list[tuple[int, int]] = []
        for tensor, key in zip(tensors_of(value), storage_keys(value), strict=True):
            place = next(((slot, self.held[slot].index(key)) for slot in inputs if key in self.held[slot]), None)
            if place is None:
                place = (-1, len(new))
                new.append(0 if node.op == "get_attr" else storage_bytes(tensor))
            holds.append(place)
        self.add_input(node)
        flops = count_flops(node) if any(new) else 0.0
        moved = sum(new) and sum(new) + sum(
            storage_bytes(argument.meta.get("val")) for argument in node.all_input_nodes
        )
        return Operation(
            node.target,
            self.arguments(node.args),
            self.arguments(node.kwargs),
            tuple(new),
            tuple(holds),
            flops,
            moved,
            call_of(node) if any(new) else None,
            may_borrow(node),
        )

    def arguments(self, tree: Any) -> Any:
        """Nested arguments with each node replaced by a reference to its slot."""
        if isinstance(tree, Mapping):
            return {key: self.arguments(item) for key, item in tree.items()}
        return fx.node.map_arg(tree, self._ref)

    def _ref(self, node: fx.Node) -> Any:
        return Ref(self.slot[node])


class _Recording(TorchDispatchMode):
    """Writes each call into a graph. (`make_fx` patches `nn.Module` for every function that it traces, which takes
    milliseconds where many modules are defined.)"""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.tensors: list[Tensor] = []  # alive, so that no other object gets their identity
        for position, tensor in enumerate(inputs):
            self._name(self.graph.placeholder(f"input_{position}"), tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named_args, named_kwargs = tree_map(self.node, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        call = self.graph.call_function(func, named_args, named_kwargs)
        if isinstance(result, Tensor):
            self._name(call, result)
            return result
        call.meta["val"] = result
        for position, item in enumerate(result if isinstance(result, (tuple, list)) else ()):
            if isinstance(item, Tensor):
                self._name(self.graph.call_function(operator.getitem, (call, position)), item)
        return result

    def node(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) not in self.nodes:
            raise NotImplementedError("a rule may not use a constant tensor")
        return self.nodes[id(item)]

    def _name(self, node: fx.Node, tensor: Tensor) -> None:
        node.meta["val"] = tensor
        self.nodes[id(tensor)] = node
        self.tensors.append(tensor)


def trace_operations(
    function: Callable[..., Any], examples: Sequence[Tensor]
) -> tuple[tuple[Operation, ...], tuple[int, ...], tuple[Tensor, ...]]:
    """Run `function` on fake tensors; return its operations, the slots of its results, and the fake results."""
    mode = next(example.fake_mode for example in examples if hasattr(example, "fake_mode"))
    assert isinstance(mode, FakeTensorMode)
    recording = _Recording(examples)
    with mode, recording:
        found = function(*examples)
    results = [recording.node(item) for item in ([found] if isinstance(found, Tensor) else found)]
    graph = recording.graph
    graph.output(tuple(results))
    graph.eliminate_dead_code()
    recorder, operations = Recorder(), []
    for node in graph.nodes:
        if node.op == "placeholder":
            recorder.add_input(node)
        elif node.op == "call_function":
            operations.append(recorder.add_call(node))
    slots = tuple(recorder.slot[result] for result in results)
    return tuple(operations), slots, tuple(result.meta["val"] for result in results)
