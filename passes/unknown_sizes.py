"""Sizes that depend on data (`logits[mask]`, `nonzero`), shut into operations whose results have fixed sizes.

Where values of unknown size become one of fixed size again (a loss over the marked rows, a sum into rows that are
there in any case), all that leads there from values of fixed size is computed as one operation (see `opaque`). The
backward pass has its own operations: what they read of the forward pass is computed again inside. Results that share
their work, one directly behind another, come out of one operation.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ._torch_compat import depends_on_data, tree_flatten
from .cost import base_name
from .enclosed import GENERATED, SizeUnknown, piece_of_graph, target_of
from .nodes import is_effect, is_random, mark_stages
from .opaque import OPAQUE, draw
from .trace import faking_like, storage_keys, tensors_of

aten = torch.ops.aten
NEW = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
SEEDS = 1 << 62


@dataclass
class Group:
    """Results of fixed size that are computed together, and what there is inside that leads to them.

    Plain backpropagation has computed what is in `again` before, and has kept what is in `kept` since the forward pass.
    """

    results: list[fx.Node] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)
    again: set[fx.Node] = field(default_factory=set)
    kept: list[fx.Node] = field(default_factory=list)

    def members(self, order: Mapping[fx.Node, int]) -> list[fx.Node]:
        return sorted(self.inside.union(self.results), key=order.__getitem__)


def enclose_unknown_sizes(joint: fx.GraphModule, forward_outputs: int) -> None:
    """Rewrite the graph, in place, so that every size in it is fixed. Raises `SizeUnknown` where that cannot be."""
    inside = find_inside(joint.graph.nodes)
    if not inside:
        return
    draw_by_seeds(joint.graph, inside)
    nodes = list(joint.graph.nodes)
    inside = find_inside(nodes)
    refuse(nodes, inside)
    outputs: Any = nodes[-1].args[0]
    after_tangents, in_forward = mark_stages(nodes, outputs[:forward_outputs])
    groups = grouped(nodes, inside, after_tangents, in_forward)
    place_checks(nodes, inside, groups)
    compare_with_plain(nodes, groups, in_forward)
    order = {node: place for place, node in enumerate(nodes)}
    for group in groups:
        _replace(joint.graph, group, order)
    for node in reversed(nodes):
        if node in inside or (not node.users and inside.intersection(node.all_input_nodes)):
            joint.graph.erase_node(node)
    joint.graph.lint()
    joint.recompile()


def find_inside(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What has no fixed size, tuples that come from such values, and new tensors that are filled with them."""
    inside: set[fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and (depends_on_data(node.meta.get("val")) or _is_between(node, inside)):
            inside.add(node)
    return inside


def _is_between(node: fx.Node, inside: set[fx.Node]) -> bool:
    if not inside.intersection(node.all_input_nodes):
        return False
    if isinstance(node.meta.get("val"), (tuple, list)):
        return True
    reads = [[read for read in user.all_input_nodes if read is not node] for user in node.users]
    return node.target in NEW and all(any(depends_on_data(read.meta.get("val")) for read in others) for others in reads)


def refuse(nodes: Sequence[fx.Node], inside: set[fx.Node]) -> None:
    """Raise where a size would leave, or where a piece of the graph could not stand for what there is."""
    first = next(node for node in nodes if node in inside)
    for node in nodes:
        if node not in inside and not inside.intersection(node.all_input_nodes):
            continue
        name = base_name(node.target)
        if node.op == "output":
            raise SizeUnknown(first, "a tensor of such a size leaves the model")
        if is_effect(node) and node.target._schema.is_mutable:  # type: ignore[union-attr]
            raise SizeUnknown(first, f"`{name}` changes a tensor there")
        if not isinstance(node.meta.get("val"), Tensor) and not (node in inside or _is_check(node)):
            raise SizeUnknown(first, f"what `{name}` gives is no tensor")
        if any(depends_on_data(leaf) for leaf in tree_flatten((node.args, node.kwargs))[0]):
            raise SizeUnknown(first, f"no operation says what `{name}` is called with")


def draw_by_seeds(graph: fx.Graph, inside: set[fx.Node]) -> None:
    """Where the data tell how many random numbers are drawn, a seed is drawn before: so who computes them again draws
    the same."""
    for node in list(graph.nodes):
        if not is_random(node) or not (node in inside or inside.intersection(node.all_input_nodes)):
            continue
        tensor = next(leaf for read in node.all_input_nodes for leaf in tensors_of(read.meta.get("val")))
        with faking_like(tensor), graph.inserting_before(node):
            seed = graph.call_function(aten.randint.default, (SEEDS, [1]), {"dtype": torch.int64, "device": "cpu"})
            seed.meta = {**node.meta, "val": torch.empty(1, dtype=torch.int64)}
            drawn = graph.call_function(draw, (seed, node.target, *node.args), dict(node.kwargs))
            drawn.meta = dict(node.meta)
        node.replace_all_uses_with(drawn)
        graph.erase_node(node)


def _is_check(node: fx.Node) -> bool:
    return node.op == "call_function" and is_effect(node)


def grouped(
    nodes: Sequence[fx.Node], inside: set[fx.Node], after_tangents: set[fx.Node], in_forward: set[fx.Node]
) -> list[Group]:
    """A result joins the group before it if they share work, and if nothing that has to wait stands between.

    Groups follow one another in the order of the graph, so that no two of them can depend on each other.
    """
    groups: list[Group] = []
    stage, behind = None, set[fx.Node]()  # what depends on the last group
    for node in nodes:
        waits = bool(behind.intersection(node.all_input_nodes))
        if waits:
            behind.add(node)
        if waits and node.op == "call_function" and (is_random(node) or is_effect(node)):
            stage = None
        if node in inside or _is_check(node) or not inside.intersection(node.all_input_nodes):
            continue
        steps, now = leading(node, inside), (node in after_tangents, node in in_forward)
        reads = {read for step in (node, *steps) for read in step.all_input_nodes}
        if now != stage or behind & reads or not steps & groups[-1].inside:
            groups.append(Group())
            behind = set()
        stage = now
        groups[-1].results.append(node)
        groups[-1].inside |= steps
        behind.add(node)
    return groups


def leading(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """What has no fixed size and leads to a node."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = inside.intersection(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def place_checks(nodes: Sequence[fx.Node], inside: set[fx.Node], groups: Sequence[Group]) -> None:
    """What is asserted of sizes is asserted where they are first computed."""
    for node in nodes:
        if not _is_check(node) or not inside.intersection(node.all_input_nodes):
            continue
        steps = leading(node, inside)
        tensors = {step for step in steps if isinstance(step.meta.get("val"), Tensor)}
        group = next((group for group in groups if tensors <= group.inside), None)
        if group is not None:
            group.inside |= {node, *steps}
        elif not str(node.args[1]).startswith(GENERATED):
            raise SizeUnknown(node, "nothing but a check needs it")


def compare_with_plain(nodes: Sequence[fx.Node], groups: Sequence[Group], in_forward: set[fx.Node]) -> None:
    """Mark what groups compute that others have computed. What is kept counts with the last group that reads it."""
    seen: set[fx.Node] = set()
    for group in groups:
        group.again = group.inside & seen
        seen |= group.inside
    inside = set[fx.Node]().union(*(group.inside for group in groups))
    counted = {key for node in nodes if node not in inside for key in storage_keys(tensors_of(node.meta.get("val")))}
    for group in reversed(groups):
        if group.results[0] in in_forward:
            continue
        own = group.inside.union(group.results) - group.again
        for node in group.again & in_forward:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and own.intersection(node.users):
                key = value.untyped_storage()._cdata
                if key not in counted:
                    counted.add(key)
                    group.kept.append(node)


def _replace(graph: fx.Graph, group: Group, order: Mapping[fx.Node, int]) -> None:
    """One operation where the last result was; what reads an earlier one and stood before it follows."""
    members = group.members(order)
    own = set(members)
    operands = list(dict.fromkeys(read for node in members for read in node.all_input_nodes if read not in own))
    if not operands:
        raise SizeUnknown(members[0], "it reads no tensor")
    first, last = group.results[0], group.results[-1]
    with graph.inserting_before(last):
        piece = piece_of_graph(members, operands, group.results, group.again, group.kept)
        call = graph.call_function(OPAQUE, (operands, piece))
        stack = _module_stack(members)
        items = [graph.call_function(operator.getitem, (call, place)) for place in range(len(group.results))]
    end = items[-1]
    late = set(group.results)
    for node in list(order)[order[first] : order[last]]:
        if node not in own and late.intersection(node.all_input_nodes):
            late.add(node)
            end.append(node)
            end = node
    for item, result in zip(items, group.results, strict=True):
        item.meta = {**result.meta, "nn_module_stack": stack}
        result.replace_all_uses_with(item)
        if _shares_memory(result, (*operands, *members)):
            _own_memory(graph, item)
    call.meta = {**first.meta, "val": [item.meta["val"] for item in items]}


def _shares_memory(result: fx.Node, others: Sequence[fx.Node]) -> bool:
    (key,) = storage_keys([result.meta["val"]])
    parent = result.args[0] if result.target is operator.getitem else None
    return any(
        key in storage_keys(tensors_of(other.meta.get("val"))) for other in others if other not in (result, parent)
    )


def _own_memory(graph: fx.Graph, item: fx.Node) -> None:
    """Views come out as tensors of their own; views of these are views of them."""
    view = item.meta["val"]
    (key,) = storage_keys([view])
    with faking_like(view):
        item.meta["val"] = torch.empty_strided(view.size(), view.stride(), dtype=view.dtype, device=view.device)
        renewed = {item}
        for node in graph.nodes:
            if renewed.intersection(node.all_input_nodes) and key in storage_keys(tensors_of(node.meta.get("val"))):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
                node.meta["val"] = target_of(node)(*args, **kwargs)
                renewed.add(node)


def _module_stack(members: Sequence[fx.Node]) -> dict[str, Any]:
    """What those have in common that lie deeper than the outermost: a layer and its surroundings are the layer's."""
    stacks = [list((node.meta.get("nn_module_stack") or {}).items()) for node in members]
    outermost = min(map(len, stacks))
    deeper = [stack for stack in stacks if len(stack) > outermost] or stacks
    return dict(steps[0] for steps in zip(*deeper, strict=False) if all(step == steps[0] for step in steps))
