"""What the nodes of a joint graph are: when they run, and what they do beside computing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


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
