"""Reading AOTAutograd's joint graph into a `Graph`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._torch_compat import depends_on_data, fx_graph_cse
from .cost import Device, base_name, operations_seconds, qualified_name
from .graph import Edge, Graph, Ref, Role, Stage, Value
from .nodes import is_effect, is_random, is_tangent, is_view, mark_stages, tuple_items
from .trace import Recorder
from .unknown_sizes import enclose_unknown_sizes


@dataclass(frozen=True)
class Capture:
    """The joint graph as data, and the FX node of each value for the fake tensor in its metadata."""

    graph: Graph
    nodes: dict[int, fx.Node]

    def fake(self, value: int) -> Any:
        return self.nodes[value].meta.get("val")


class JointReader:
    """One pass over the nodes. A tuple operation and its `getitem` nodes become one edge with several results."""

    def __init__(self, joint: fx.Graph, roles: Mapping[int, Role], device: Device) -> None:
        self.joint, self.roles, self.device = joint, roles, device
        self.values: list[Value] = []
        self.index: dict[fx.Node, int] = {}
        self.owners: dict[int, int] = {}
        self.edges: list[Edge] = []
        self.recorder = Recorder()
        self.after_tangents: set[fx.Node] = set()
        self.in_forward: set[fx.Node] = set()

    def read(self, forward_outputs: int) -> Capture:
        nodes = list(self.joint.nodes)
        self.after_tangents, self.in_forward = mark_stages(nodes, nodes[-1].args[0][:forward_outputs])
        self._one_view_each(nodes)
        results = list(nodes[-1].args[0])
        tangents: list[int] = []
        primals: list[int] = []
        for node in self.joint.nodes:
            if node.op == "placeholder":
                (tangents if is_tangent(node) else primals).append(self._add_input(node, len(primals)))
            elif node.op in ("call_function", "get_attr"):
                self._add_call(node)
        graph = Graph(
            tuple(self.values),
            tuple(self.edges),
            tuple(primals),
            tuple(tangents),
            tuple(self._result(result) for result in results[:forward_outputs]),
            tuple(self._result(result) for result in results[forward_outputs:]),
            self._mutated(),
            self._differentiated(forward_outputs),
        )
        return Capture(graph, {index: node for node, index in self.index.items()})

    def _one_view_each(self, nodes: Sequence[fx.Node]) -> None:
        """A view that only the backward pass reads is made once for each reader: shared, it ties their blocks."""
        for node in reversed(nodes):
            if self._stage(node) == "late" and is_view(node):
                for user in list(node.users)[1:]:
                    with self.joint.inserting_after(node):
                        user.replace_input_with(node, self.joint.node_copy(node))

    def _stage(self, node: fx.Node) -> Stage:
        if node in self.after_tangents:
            return "backward"
        return "forward" if node in self.in_forward else "late"

    def _add_input(self, node: fx.Node, position: int) -> int:
        self.recorder.add_input(node)
        role: Role = "tangent" if is_tangent(node) else self.roles.get(position, "parameter")
        return self._add_value(node, role, len(self.values))

    def _add_value(self, node: fx.Node, role: Role, storage: int) -> int:
        fake = node.meta.get("val")
        shape = tuple(int(size) for size in fake.shape) if isinstance(fake, Tensor) else ()
        dtype = str(fake.dtype).removeprefix("torch.") if isinstance(fake, Tensor) else type(fake).__name__
        index = self.index[node] = len(self.values)
        stage: Stage = "backward" if node in self.after_tangents else self._stage(node)
        self.values.append(Value(index, node.name, self.recorder.bytes[node], storage, shape, dtype, role, stage))
        for key in self.recorder.held[node]:
            self.owners.setdefault(key, index)
        return index

    def _add_call(self, node: fx.Node) -> None:
        if node.target is operator.getitem and node.args[0] not in self.index:
            return  # belongs to the edge of its tuple
        items = tuple_items(node)
        inputs = list(dict.fromkeys(node.all_input_nodes))
        slots = {read: position for position, read in enumerate(inputs)}
        operations = []
        for member in (node, *items):
            operations.append(self.recorder.add_call(member, slots))
            slots[member] = len(slots)
        gives = items if items or isinstance(node.meta.get("val"), (tuple, list)) else [node]
        given = tuple(self._add_value(item, "computed", self._storage_of(item)) for item in gives)
        edge = Edge(
            gives=given,
            needs=tuple(self.index[read] for read in inputs),
            operations=tuple(operations),
            results=tuple(slots[item] for item in gives),
            label=qualified_name(node.target),
            stage=self._stage(node),
            seconds=operations_seconds(operations, self.device),
            random=is_random(node),
            effect=is_effect(node),
            sequence=node.meta.get("seq_nr"),
            source=node.meta.get("stack_trace") or "",
        )
        self.edges.append(edge)

    def _storage_of(self, node: fx.Node) -> int:
        own = len(self.values)
        return next((self.owners.get(key, own) for key in self.recorder.held[node]), own)

    def _result(self, result: Any) -> Any:
        return Ref(self.index[result]) if isinstance(result, fx.Node) else result

    def _differentiated(self, forward_outputs: int) -> tuple[int, ...]:
        """AOTAutograd describes its outputs, and names the one that each tangent belongs to."""
        described = list(self.joint.output_node().meta.get("desc") or ())[:forward_outputs]
        tangents = [node for node in self.joint.find_nodes(op="placeholder") if is_tangent(node)]
        wanted = [getattr(node.meta.get("desc"), "output", None) for node in tangents]
        return tuple(described.index(output) for output in wanted if output in described)

    def _mutated(self) -> frozenset[int]:
        return frozenset(edge.needs[0] for edge in self.edges if edge.effect and edge.label.endswith("_"))


def _replace_argument(user: fx.Node, node: fx.Node, number: int) -> None:
    def replaced(argument: fx.Node) -> Any:
        return number if argument is node else argument

    user.args = fx.node.map_arg(user.args, replaced)
    user.kwargs = fx.node.map_arg(user.kwargs, replaced)


def _inline_sizes(graph: fx.Graph) -> None:
    """Sizes that are inputs, or computed, become the integers they stand for: a plan holds for one set of sizes."""
    for node in graph.nodes:
        size = node.meta.get("val")
        if not isinstance(size, (torch.SymInt, int)) or isinstance(size, bool) or depends_on_data(size):
            continue
        for user in list(node.users):
            _replace_argument(user, node, int(size))


def _drop_running_statistics(graph: fx.Graph) -> None:
    """In training, the gradient of batch normalization is given running statistics but does not read them."""
    for node in graph.nodes:
        if node.op == "call_function" and base_name(node.target) == "native_batch_norm_backward" and node.args[7]:
            node.args = (*node.args[:3], None, None, *node.args[5:])


def read_joint(
    joint: fx.GraphModule,
    forward_outputs: int,
    device: Device,
    roles: Mapping[int, Role] | None = None,
    rewrite: Callable[[fx.Graph], fx.Graph] = lambda graph: graph,
) -> Capture:
    """Turn AOTAutograd's joint graph into a `Graph`; common subexpressions are merged first, in place.

    `rewrite` may then put another graph with the same inputs and outputs in its place.
    """
    _inline_sizes(joint.graph)
    enclose_unknown_sizes(joint, forward_outputs)
    merged = fx_graph_cse(joint.graph)
    _drop_running_statistics(merged)
    merged.eliminate_dead_code()
    merged = rewrite(merged)
    merged.owning_module = joint  # where the constants of the captured graph are looked up
    return JointReader(merged, roles or {}, device).read(forward_outputs)
