"""A region of large tensors computed a part of its rows at a time: the same values, of which few are alive at once.

The logits of a large vocabulary, their log-softmax and its gradient are each as large as rows times words, and no
choice of what to keep makes one of them smaller. But each row is computed from its own, and what leaves is a sum over
rows (the loss, the gradient of the weights) or small. So the joint graph is rewritten: the region once for each part of
the rows, sums added up. What is kept of a part, or computed again, is then the planner's choice as anywhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ._torch_compat import disable_current_modes
from .nodes import is_effect, is_random, mark_stages, tuple_items
from .rows import Rows, Treated, alike, constant, leading, shape_of, treat
from .sizes import storage_bytes

aten = torch.ops.aten

PRODUCTS = frozenset([aten.mm.default, aten.addmm.default])
MOST_PARTS = 64
FEWEST_PARTS = 4
WORTH = 2  # times the largest tensor beside the region: otherwise other ways of saving memory do as well


@dataclass(frozen=True)
class Region:
    """Operations on large tensors whose `rows` can be computed apart, in the order of the graph.

    `parts` is how many parts make its tensors as small as the largest tensor beside them, or a few more: several are
    alive at once.
    """

    rows: int
    parts: int
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    treated: Mapping[fx.Node, Treated]
    labels: Mapping[fx.Node, Rows]
    largest: int

    @property
    def note(self) -> str:
        return (
            f"{len(self.forward) + len(self.backward)} operations on tensors of up to {self.largest / 2**20:.1f} MiB "
            f"are computed in {self.parts} parts of their rows, and sums over rows added up"
        )


def find_region(graph: fx.Graph, forward_outputs: int) -> Region | None:
    """The region around the largest result of a matrix product, if its rows can be computed apart."""
    nodes = list(graph.nodes)
    sizes = {node: storage_bytes(node.meta["val"]) for node in nodes if isinstance(node.meta.get("val"), Tensor)}
    after, in_forward = mark_stages(nodes, nodes[-1].args[0][:forward_outputs])
    products = [node for node in nodes if node.target in PRODUCTS and node in in_forward and node not in after]
    if not products:
        return None
    seed = max(products, key=lambda node: sizes[node])
    forward = in_forward - after
    forward |= {item for node in forward for item in tuple_items(node)}
    for rows in _counts(seed):
        found = _grown(nodes, seed, rows, forward)
        if found is not None:
            labels, treated, members = found
            largest = max(sizes[node] for node in members if node in labels)
            parts = _parts(rows, largest, sizes, members)
            if parts < 2:
                return None
            first = tuple(node for node in nodes if node in members and node in forward)
            rest = tuple(node for node in nodes if node in members and node not in forward)
            if _out_of_order(nodes, first) or _out_of_order(nodes, rest):
                return None
            return Region(rows, parts, first, rest, treated, labels, largest)
    return None


def _out_of_order(nodes: Sequence[fx.Node], group: Sequence[fx.Node]) -> bool:
    """Whether something between these operations must happen where it stands: they are moved to the last of them."""
    if not group:
        return False
    span = nodes[nodes.index(group[0]) : nodes.index(group[-1])]
    return any(node.op == "call_function" and (is_effect(node) or is_random(node)) for node in span)


def _counts(seed: fx.Node) -> list[int]:
    """Numbers of rows that may be told apart: all, or those of the first dimension before it was flattened."""
    rows = int(seed.meta["val"].shape[0])
    source: Any = seed.args[-2]
    while isinstance(source, fx.Node) and source.target in (aten.view.default, aten._unsafe_view.default):
        source = source.args[0]
    first = int(source.meta["val"].shape[0]) if source.meta["val"].dim() > 2 else rows
    return [rows, first] if rows % first == 0 and 1 < first < rows else [rows]


def _parts(rows: int, largest: int, sizes: Mapping[fx.Node, int], members: set[fx.Node]) -> int:
    others = (size for node, size in sizes.items() if node.op == "call_function" and node not in members)
    ratio, parts = largest / max(others, default=1), 1
    if ratio < WORTH:
        return 1
    while parts < min(max(ratio, FEWEST_PARTS), MOST_PARTS) and rows % (2 * parts) == 0:
        parts *= 2
    return parts if parts >= FEWEST_PARTS else 1


Grown = tuple[dict[fx.Node, Rows], dict[fx.Node, Treated], set[fx.Node]]


def _grown(nodes: Sequence[fx.Node], seed: fx.Node, rows: int, forward: set[fx.Node]) -> Grown | None:
    """Follow the rows from the seed on; None if something that reads a large tensor cannot be done in parts."""
    large = seed.meta["val"].numel() / 2
    start = leading(shape_of(seed), rows)
    source = seed.args[-2]
    assert start is not None and isinstance(source, fx.Node)
    labels: dict[fx.Node, Rows] = {source: start}
    treated: dict[fx.Node, Treated] = {}
    behind, followed = nodes[nodes.index(seed) :], -1
    while len(treated) > followed:
        followed = len(treated)
        for node in behind:
            found = _item(node, treated)
            known = found is not None or any(argument in labels for argument in node.all_input_nodes)
            if node in treated or node.op == "output" or not known:
                continue
            found = found or treat(node, labels, rows)
            if node is seed:
                del labels[source]  # only what comes from the seed is followed
            if found is not None:
                _follow_back(found.takes, labels, treated, rows, large)
                treated[node] = found
                if isinstance(found.result, Rows):
                    labels[node] = found.result
            elif any(_is_large(n, large, labels) for n in node.all_input_nodes):
                return None
    members = _needed(nodes, treated, labels, large, forward)
    if members is None or seed not in members:
        return None
    return labels, treated, members


def _follow_back(
    takes: Mapping[fx.Node, Rows],
    labels: dict[fx.Node, Rows],
    treated: dict[fx.Node, Treated],
    rows: int,
    large: float,
) -> None:
    """Large tensors that come from outside for one operation are made in parts too, where that is known how."""
    for node, own in takes.items():
        if node in labels or node.op != "call_function" or node.meta["val"].numel() < large:
            continue
        beside = [n for n in node.all_input_nodes if alike(n, node, own)]
        found = constant(node, own) or (treat(node, dict.fromkeys(beside, own), rows) if beside else None)
        if found is not None and found.result == own:
            treated[node], labels[node] = found, own
            _follow_back(found.takes, labels, treated, rows, large)


def _item(node: fx.Node, treated: Mapping[fx.Node, Treated]) -> Treated | None:
    """An item of a tuple is what the tuple's operation says."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source not in treated or not isinstance(treated[source].result, tuple):
        return None
    items = treated[source].result
    assert isinstance(items, tuple) and node in tuple_items(source)
    place: Any = node.args[1]
    result = items[place]
    return None if result is None else Treated(result)


def _is_large(node: fx.Node, large: float, labels: Mapping[fx.Node, Rows]) -> bool:
    return node in labels and isinstance(node.meta["val"], Tensor) and node.meta["val"].numel() >= large


def _needed(
    nodes: Sequence[fx.Node],
    treated: Mapping[fx.Node, Treated],
    labels: Mapping[fx.Node, Rows],
    large: float,
    forward: set[fx.Node],
) -> set[fx.Node] | None:
    """What makes or reads large tensors, and what lies between such operations; None if that leads out and back in."""
    members: set[fx.Node] = set()
    for node in treated:
        if any(_is_large(n, large, labels) for n in (node, *node.all_input_nodes)):
            members.add(node)
            members.update(item for item in tuple_items(node) if item in treated)
    for stage in (True, False):
        own = [node for node in nodes if (node in forward) == stage]
        behind: set[fx.Node] = set()
        for node in own:
            if node in members or any(n in behind for n in node.all_input_nodes):
                behind.add(node)
        ahead: set[fx.Node] = set()
        for node in reversed(own):
            if node in members or any(n in ahead for n in node.users):
                ahead.add(node)
        between = behind & ahead
        if any(node not in treated for node in between):
            return None
        members |= between
        totals = [node for node in own if node in members and treated[node].is_total]
        if any(user in members and (user in forward) == stage for node in totals for user in node.users):
            return None
    return members


def split(graph: fx.Graph, region: Region) -> fx.Graph | None:
    """The joint graph with the region in parts; in the backward pass the last part comes first.

    None if a result would come in another layout than it had.
    """
    done = _Splitter(graph, region).run()
    results = [tuple(g.output_node().all_input_nodes) for g in (graph, done)]
    same = len(results[0]) == len(results[1]) and all(map(_laid_out_alike, *results))
    return done if same else None


def _laid_out_alike(a: fx.Node, b: fx.Node) -> bool:
    mine, theirs = a.meta.get("val"), b.meta.get("val")
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return type(mine) is type(theirs)
    return (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@dataclass
class _Splitter:
    old: fx.Graph
    region: Region
    new: fx.Graph = field(default_factory=fx.Graph)
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    taken: dict[tuple[fx.Node, Rows, int], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = [n for node in self.region.forward if (n := node.meta.get("seq_nr")) is not None]
        self.first, self.last = min(numbers, default=0), max(numbers, default=0)
        self.members = {*self.region.forward, *self.region.backward}
        self.mode = self.region.forward[0].meta["val"].fake_mode

    def run(self) -> fx.Graph:
        ends = {group[-1]: group for group in (self.region.forward, self.region.backward) if group}
        waiting: list[fx.Node] = []
        for node in self.old.nodes:
            if node not in self.members:
                if all(argument in self.env for argument in node.all_input_nodes):
                    self._copy(node)
                else:
                    waiting.append(node)
            if node in ends:
                self._emit(ends[node], forward=ends[node] is self.region.forward)
                still = []
                for late in waiting:
                    if all(argument in self.env for argument in late.all_input_nodes):
                        self._copy(late)
                    else:
                        still.append(late)
                waiting = still
        assert not waiting, "the region is not in one piece"
        return self.new

    def _copy(self, node: fx.Node) -> None:
        copied = self.env[node] = self.new.node_copy(node, self.env.__getitem__)
        copied.meta["seq_nr"] = self._number(node, self.region.parts - 1)

    def _number(self, node: fx.Node, part: int) -> int | None:
        """AOTAutograd's number, which ties backward nodes to their forward operation: apart for each part."""
        number = node.meta.get("seq_nr")
        if number is None or number < self.first:
            return number
        return number + (self.last - self.first + 1) * part

    def _emit(self, group: Sequence[fx.Node], forward: bool) -> None:
        count = self.region.parts
        sums: dict[fx.Node, fx.Node] = {}
        leaving = [node for node in group if any(user not in self.members for user in node.users)]
        leaving += [node for node in group if node not in self.region.labels and node not in leaving]
        for part in range(count) if forward else reversed(range(count)):
            for node in group:
                made = self.parts[node, part] = self._part(node, part)
                if node in leaving and self.region.treated[node].is_total:
                    sums[node] = self._added(sums.get(node), made)
        for node in leaving:
            if self.region.treated[node].is_total:
                self.env[node] = self._whole(node, sums[node])
            elif node in self.region.labels:
                self.env[node] = self._joined(node)
        for node in leaving:
            self._finish_mean(node)

    def _added(self, total: fx.Node | None, part: fx.Node) -> fx.Node:
        """Sums of 16-bit numbers are single-precision ones until all parts are in them."""
        if total is not None:
            return self._call(aten.add.Tensor, (total, part), part)
        if part.meta["val"].dtype in (torch.float16, torch.bfloat16):
            return self._call(aten._to_copy.default, (part,), part, kwargs={"dtype": torch.float32})
        return part

    def _part(self, node: fx.Node, part: int) -> fx.Node:
        how, source = self.region.treated[node], node.args[0]
        if node.target is operator.getitem and isinstance(source, fx.Node):
            return self._call(node.target, (self.parts[source, part], node.args[1]), node, part)
        given = node.args if how.args is None else how.args(self.region.parts)

        def argument(read: fx.Node) -> fx.Node:
            if read not in how.takes:
                return self.env[read]
            if (read, part) in self.parts and read in self.region.labels:
                return self.parts[read, part]
            return self._take(read, how.takes[read], part)

        args = fx.node.map_arg(given, argument)
        kwargs = fx.node.map_arg(node.kwargs, argument)
        return self._call(node.target, args, node, part, kwargs)

    def _take(self, whole: fx.Node, rows: Rows, part: int) -> fx.Node:
        """A part of a tensor from outside: a view."""
        key = (whole, rows, part)
        if key not in self.taken:
            count, shape, source = self.region.parts, list(shape_of(whole)), self.env[whole]
            size, dim = rows.part(shape, count), rows.dims[-1]
            if rows.lead > 1:
                flat = list(size)
                flat[dim] = size[dim] * count
                source = self._call(aten.view.default, (source, flat), source)
            reach = (source, dim, part * size[dim], (part + 1) * size[dim])
            self.taken[key] = self._call(aten.slice.Tensor, reach, source)
        return self.taken[key]

    def _joined(self, node: fx.Node) -> fx.Node:
        rows, pieces = self.region.labels[node], [self.parts[node, part] for part in range(self.region.parts)]
        whole = self._call(aten.cat.default, (pieces, rows.dims[-1]), node, self.region.parts - 1)
        if rows.lead > 1:
            whole = self._call(aten.view.default, (whole, list(shape_of(node))), node, self.region.parts - 1)
        return whole

    def _whole(self, node: fx.Node, total: fx.Node) -> fx.Node:
        if self.region.treated[node].result == "mean":
            total = self._call(aten.div.Tensor, (total, self.region.parts), total)
        dtype = node.meta["val"].dtype
        if total.meta["val"].dtype != dtype:
            total = self._call(aten._to_copy.default, (total,), total, kwargs={"dtype": dtype})
        return total

    def _finish_mean(self, node: fx.Node) -> None:
        """The mean of `nll_loss`: the whole sum over the whole weight."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.target is not aten.nll_loss_forward.default:
            return
        if node.args[1] == 0 and source.args[3] == 1:
            weight = next(item for item in tuple_items(source) if item.args[1] == 1)
            self.env[node] = self._call(aten.div.Tensor, (self.env[node], self.env[weight]), self.env[node])

    def _call(
        self,
        target: Any,
        args: tuple[Any, ...],
        like: fx.Node,
        part: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """A call with the fake result that it has; `like` is where its origin is told from, an old node with `part`."""
        made = self.new.call_function(target, args, dict(kwargs or {}))
        made.meta.update({k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "desc")})
        if part is not None:
            made.meta["seq_nr"] = self._number(like, part)
        values = fx.node.map_arg((made.args, made.kwargs), lambda node: node.meta["val"])
        with disable_current_modes(), self.mode, torch.no_grad():
            made.meta["val"] = target(*values[0], **values[1])
        return made
