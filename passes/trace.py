"""From FX nodes to operations: sizes, aliases and costs read off the fake tensors that tracing left behind."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._torch_compat import (
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    detect_fake_mode,
    disable_current_modes,
    tree_flatten,
    tree_map,
)
from .cost import count_flops
from .graph import Call, Operation, Ref
from .sizes import storage_bytes
from .trials import frozen_call


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def storage_keys(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.untyped_storage()._cdata for tensor in tensors]


@contextlib.contextmanager
def faking_like(tensor: Tensor) -> Iterator[None]:
    """Tensors that are made meanwhile are fake, as this one is."""
    mode = detect_fake_mode([tensor])
    assert mode is not None
    with disable_current_modes(), mode:
        yield


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
    """Describes each call by the storages that it allocates or shares."""

    def __init__(self) -> None:
        self.held: dict[fx.Node, list[int]] = {}
        self.bytes: dict[fx.Node, int] = {}

    def add_input(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        self._add(node, value, storage_keys(tensors_of(value)))

    def _add(self, node: fx.Node, value: Any, keys: list[int]) -> None:
        self.held[node], self.bytes[node] = keys, storage_bytes(value)

    def add_call(self, node: fx.Node, slots: Mapping[fx.Node, int]) -> Operation:
        """The call of a node; `slots` numbers what it reads."""
        value, inputs = node.meta.get("val"), node.all_input_nodes
        tensors = tensors_of(value)
        keys = storage_keys(tensors)
        new: list[int] = []
        holds: list[tuple[int, int]] = []
        for tensor, key in zip(tensors, keys, strict=True):
            place = next(((slots[read], self.held[read].index(key)) for read in inputs if key in self.held[read]), None)
            if place is None:
                place = (-1, len(new))
                new.append(0 if node.op == "get_attr" else storage_bytes(tensor))
            holds.append(place)
        self._add(node, value, keys)
        made = sum(new)

        def reference(read: fx.Node) -> Any:
            return Ref(slots[read])

        return Operation(
            node.target,
            fx.node.map_arg(node.args, reference),
            fx.node.map_arg(node.kwargs, reference),
            tuple(new),
            tuple(holds),
            count_flops(node) if made else 0.0,
            made and made + sum(self.bytes[read] for read in inputs),
            call_of(node) if made else None,
            may_borrow(node),
        )


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
    recorder, operations, slots = Recorder(), [], dict[fx.Node, int]()
    for node in graph.nodes:
        if node.op == "placeholder":
            recorder.add_input(node)
        elif node.op == "call_function":
            operations.append(recorder.add_call(node, slots))
        slots[node] = len(slots)
    found_at = tuple(slots[result] for result in results)
    return tuple(operations), found_at, tuple(result.meta["val"] for result in results)
