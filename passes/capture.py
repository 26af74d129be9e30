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
from .trace import Recorder


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


def mark_stages(nodes: Sequence[fx.Node], outputs: Sequence[Any]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that depend on tangents, and those that the forward pass needs for its outputs and effects."""
    after_tangents: set[fx.Node] = set()
    for node in nodes:
        if is_tangent(node) or any(argument in after_tangents for argument in node.all_input_nodes):
            after_tangents.add(node)
    wanted = {output for output in outputs if isinstance(output, fx.Node)}
    in_forward: set[fx.Node] = set()
    for node in reversed(nodes):
        effect = node.op == "call_function" and is_effect(node) and node not in after_tangents
        if (node in wanted or effect) and node.op != "output":
            in_forward.add(node)
            wanted.update(node.all_input_nodes)
    return after_tangents, in_forward


def tuple_items(node: fx.Node) -> list[fx.Node]:
    """The `getitem` nodes of a tuple operation, in order of position."""
    if not isinstance(node.meta.get("val"), (tuple, list)):
        return []
    items = [user for user in node.users if user.target is operator.getitem]
    return sorted(items, key=lambda user: int(str(user.args[1])))


def is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)


def is_random(node: fx.Node) -> bool:
    """Whether the call draws random numbers. Fused attention carries the tag, but without dropout it draws none."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return bool(given != 0.0)


def is_effect(node: fx.Node) -> bool:
    """Mutations, and calls without any tensor result (assertions): emitted once, in their place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or not schema.returns)


def is_view(node: fx.Node) -> bool:
    """Whether the call gives another view of what it reads, and changes nothing."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(given.alias_info for given in schema.returns)


def _replace_argument(user: fx.Node, node: fx.Node, number: int) -> None:
    def replaced(argument: fx.Node) -> Any:
        return number if argument is node else argument

    user.args = fx.node.map_arg(user.args, replaced)
    user.kwargs = fx.node.map_arg(user.kwargs, replaced)


class SizeUnknown(Exception):
    """Names the operation that makes sizes depend on data, and the line that calls it."""

    def __init__(self, node: fx.Node) -> None:
        trace = (node.meta.get("stack_trace") or "").strip().splitlines()
        places = [place for place, line in enumerate(trace) if line.lstrip().startswith("File ")]
        where = ": ".join(line.strip() for line in trace[places[-1] :][:2]) if places else "nothing says where"
        super().__init__(f"sizes depend on data from `{base_name(node.target)}` on ({where})")


def _inline_sizes(graph: fx.Graph) -> None:
    """Sizes that are inputs, or computed, become the integers they stand for: a plan holds for one set of sizes."""
    for node in graph.nodes:
        size = node.meta.get("val")
        if node.op == "call_function" and depends_on_data(size):
            raise SizeUnknown(node)
        if not isinstance(size, (torch.SymInt, int)) or isinstance(size, bool):
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
    merged = fx_graph_cse(joint.graph)
    _drop_running_statistics(merged)
    merged.eliminate_dead_code()
    merged = rewrite(merged)
    merged.owning_module = joint  # where the constants of the captured graph are looked up
    return JointReader(merged, roles or {}, device).read(forward_outputs)
