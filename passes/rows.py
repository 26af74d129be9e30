"""What becomes of the rows of a tensor: which operations treat each row by itself, and which add rows up.

The rows of a region are numbered alike in all of its tensors; a tensor may hold several entries per row, and its rows
may be spread over neighbouring dimensions (the tokens of [batch, length, width]). A rule says, of one operation, where
the rows of its result are, or that the result is a sum over rows, and how its arguments are to be taken in parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ._torch_compat import OpOverload
from .cost import base_name, qualified_name


@dataclass(frozen=True)
class Rows:
    """Rows lie along the dimensions `start` to `start + lead - 1`, in order; there the sizes multiply to a multiple of
    the number of rows."""

    start: int = 0
    lead: int = 1

    @property
    def dims(self) -> range:
        return range(self.start, self.start + self.lead)

    def part(self, shape: Sequence[int], parts: int) -> list[int]:
        """The shape of one of so many equal parts: as many dimensions, all but the last of the rows' being 1."""
        sizes = list(shape)
        whole = math.prod(sizes[dim] for dim in self.dims)
        assert whole % parts == 0
        for dim in self.dims:
            sizes[dim] = 1
        sizes[self.dims[-1]] = whole // parts
        return sizes


Total = Literal["sum", "mean"]
Labels = Mapping[fx.Node, Rows]


@dataclass(frozen=True)
class Treated:
    """How an operation is done in parts.

    `result` is where the rows of the result are, or how the results of the parts make up the whole; a tuple has one
    entry for each item. `takes` are the arguments that are taken in parts. `args` are those of a part, still naming the
    nodes of the whole, given the number of parts; None if they are the same.
    """

    result: Rows | Total | tuple[Rows | Total | None, ...]
    takes: Mapping[fx.Node, Rows] = field(default_factory=dict)
    args: Callable[[int], tuple[Any, ...]] | None = None

    @property
    def is_total(self) -> bool:
        return isinstance(self.result, str)


Rule = Callable[[fx.Node, Labels, int], Treated | None]


def leading(shape: Sequence[int], rows: int) -> Rows | None:
    """The fewest leading dimensions that hold the rows."""
    whole = 1
    for dim, size in enumerate(shape):
        whole *= size
        if whole % rows == 0:
            return Rows(0, dim + 1)
    return None


def treat(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    """How the rows of its arguments (`labels`) pass through a call; None if that is not known to be row by row."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return None
    rule = _RULES.get(qualified_name(node.target))
    tags = node.target.tags
    if rule is None and torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        rule = _pointwise
    found = rule(node, labels, rows) if rule is not None else None
    if found is None or any(found.takes.get(argument) != labels.get(argument) for argument in _labelled(node, labels)):
        return None
    return found


def constant(node: fx.Node, rows: Rows) -> Treated | None:
    """How a tensor of one number is made in parts, where it was made for something that is done in parts."""
    place = _SIZE_OF.get(qualified_name(node.target))
    if place is None:
        return None
    args = _arguments(node)
    return Treated(rows, {}, lambda parts: (*args[:place], rows.part(args[place], parts), *args[place + 1 :]))


def alike(node: fx.Node, other: fx.Node, rows: Rows) -> bool:
    """Whether a tensor is as long as another where that has its rows."""
    mine, theirs = shape_of(node), shape_of(other)
    return len(mine) == len(theirs) and all(mine[dim] == theirs[dim] for dim in rows.dims)


def _labelled(node: fx.Node, labels: Labels) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if argument in labels]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _pointwise(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    """Arguments are aligned at the last dimension; one that has a single entry for all rows is taken whole."""
    if not isinstance(node.meta["val"], Tensor):
        return None
    shape, takes = shape_of(node), {}
    arguments = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if any(len(shape_of(n)) > len(shape) or not _fits(shape_of(n), shape) for n in arguments):
        return None
    aligned = {Rows(labels[n].start + len(shape) - len(shape_of(n)), labels[n].lead) for n in arguments if n in labels}
    if len(aligned) != 1:
        return None
    (result,) = aligned
    for argument in arguments:
        own, offset = shape_of(argument), len(shape) - len(shape_of(argument))
        sizes = [own[dim - offset] if dim >= offset else 1 for dim in result.dims]
        if sizes == [shape[dim] for dim in result.dims] and result.start >= offset:
            takes[argument] = Rows(result.start - offset, result.lead)
        elif any(size != 1 for size in sizes) or argument in labels:
            return None
    return Treated(result, takes)


def _fits(own: Sequence[int], shape: Sequence[int]) -> bool:
    return all(size in (1, wide) for size, wide in zip(own[::-1], shape[::-1], strict=False))


def _view(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    source, shape = _arguments(node)[0], shape_of(node)
    found, own = leading(shape, rows), labels[source]
    if found is None or own != leading(shape_of(source), rows):
        return None
    return Treated(found, {source: own}, lambda parts: (source, found.part(shape, parts)))


def _transposed(order: Sequence[int], node: fx.Node, labels: Labels) -> Treated | None:
    source = _arguments(node)[0]
    own = labels[source]
    places = [order.index(dim) for dim in own.dims]
    if places != list(range(places[0], places[0] + own.lead)):
        return None
    return Treated(Rows(places[0], own.lead), {source: own})


def _t(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    return _transposed([1, 0], node, labels) if len(shape_of(node)) == 2 else None


def _transpose(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    count = len(shape_of(node))
    order = list(range(count))
    a, b = (int(dim) % count for dim in _arguments(node)[1:3])
    order[a], order[b] = order[b], order[a]
    return _transposed(order, node, labels)


def _permute(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    count = len(shape_of(node))
    return _transposed([int(dim) % count for dim in _arguments(node)[1]], node, labels)


def _product(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    """`mm`, and `addmm` whose first summand is the same for all rows."""
    *bias, a, b = _arguments(node)
    if any(n in labels for n in bias) or a is b:
        return None
    first, second = labels.get(a), labels.get(b)
    if bias and (first != Rows() or second is not None or len(shape_of(bias[0])) != 1):
        return None
    if first == Rows(0) and second is None:
        return Treated(Rows(0), {a: Rows(0)})
    if second == Rows(1) and first is None:
        return Treated(Rows(1), {b: Rows(1)})
    if first in (Rows(1), None) and second in (Rows(0), None):
        return Treated("sum", {a: Rows(1), b: Rows(0)})
    return None


def _along(node: fx.Node, dims: Sequence[int], labels: Labels) -> Treated | None:
    """One result for each entry, of others beside it: along dimensions that the rows do not lie along."""
    taken = {argument: labels[argument] for argument in node.all_input_nodes if argument in labels}
    where = {*taken.values()}
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if len(where) != 1:
        return None
    (own,) = where
    count = len(shape_of(next(iter(taken))))
    if {int(dim) % count for dim in dims}.intersection(own.dims):
        return None
    outer = [shape_of(n) for n in (*tensors, node)]
    if any([shape[dim] for dim in own.dims] != [outer[0][dim] for dim in own.dims] for shape in outer):
        return None
    return Treated(own, dict.fromkeys(tensors, own))


def _along_dim(place: int) -> Rule:
    """The rule of an operation along the one dimension that the argument at `place` names (the first by default)."""

    def rule(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
        return _along(node, [*_arguments(node)[place : place + 1], 0][:1], labels)

    return rule


def _slice_backward(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    gradient, sizes, dim, *reach = _arguments(node)
    own = labels[gradient]
    if dim % len(sizes) in own.dims:
        return None
    return Treated(own, {gradient: own}, lambda parts: (gradient, own.part(sizes, parts), dim, *reach))


def _inserted(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    """`unsqueeze`: dimensions behind the new one move."""
    source, dim = _arguments(node)
    own, place = labels[source], dim % len(shape_of(node))
    if own.start < place < own.start + own.lead:
        return None
    return Treated(Rows(own.start + (place <= own.start), own.lead), {source: own})


def _removed(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    """`select`, and `squeeze` of one dimension: dimensions behind it move."""
    source, dim = _arguments(node)[:2]
    own, count = labels[source], len(shape_of(source))
    place = dim % count if isinstance(dim, int) else own.start
    if place in own.dims or len(shape_of(node)) != count - 1:
        return None
    return Treated(Rows(own.start - (place < own.start), own.lead), {source: own})


def _sized(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    """`expand` and `new_zeros`: their second argument is the size of the result."""
    source, _, *rest = _arguments(node)
    own, shape = labels[source], shape_of(node)
    offset = len(shape) - len(shape_of(source)) if base_name(node.target) == "expand" else 0
    result = Rows(own.start + offset, own.lead)
    if [*shape[result.start :][: own.lead]] != [shape_of(source)[dim] for dim in own.dims]:
        return None
    return Treated(result, {source: own}, lambda parts: (source, result.part(shape, parts), *rest))


def _reduction(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    args, name = _arguments(node), base_name(node.target)
    source = args[0]
    own, count = labels[source], len(shape_of(source))
    given: Any = args[1] if len(args) > 1 else node.kwargs.get("dim")
    named = [given] if isinstance(given, int) else list(given or range(count))
    dims = {int(dim) % count for dim in named}
    if name == "mean" and _is_floating(node) and dims.issuperset(own.dims):
        return Treated("mean", {source: own})
    if name == "sum" and dims.issuperset(own.dims):
        return Treated("sum", {source: own})
    if dims.intersection(own.dims):
        return None
    keepdim = bool(args[2]) if len(args) > 2 else bool(node.kwargs.get("keepdim", False))
    before = 0 if keepdim else sum(dim < own.start for dim in dims)
    return Treated(Rows(own.start - before, own.lead), {source: own})


def _is_floating(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())


def _nll_loss(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    """A sum, and the weights' sum; the mean is one divided by the other, when both are complete."""
    source, target, weight, reduction, ignored = _arguments(node)
    if labels.get(source) != Rows(0) or len(shape_of(source)) != 2:
        return None
    if reduction == 1 and not any(item.args[1] == 1 for item in node.users):
        return None  # the sum of weights is not at hand
    takes, alone = {source: Rows(0), target: Rows(0)}, reduction == 0
    result: Rows | Total = Rows(0) if alone else "sum"
    return Treated((result, "sum"), takes, lambda parts: (source, target, weight, 0 if alone else 2, ignored))


def _nll_loss_backward(node: fx.Node, labels: Labels, rows: int) -> Treated | None:
    gradient, source, target, _, reduction, *_ = _arguments(node)
    if labels.get(source) != Rows(0) or len(shape_of(source)) != 2:
        return None
    own = {gradient: Rows(0)} if reduction == 0 else {}
    return Treated(Rows(0), {source: Rows(0), target: Rows(0), **own})


_SIZE_OF = {"zeros": 0, "ones": 0, "full": 0, "new_zeros": 1, "new_ones": 1, "new_full": 1}

_RULES: dict[str, Rule] = {
    "view": _view,
    "_unsafe_view": _view,
    "t": _t,
    "transpose": _transpose,
    "permute": _permute,
    "mm": _product,
    "addmm": _product,
    "_log_softmax": _along_dim(1),
    "_softmax": _along_dim(1),
    "_log_softmax_backward_data": _along_dim(2),
    "_softmax_backward_data": _along_dim(2),
    "gather": _along_dim(1),
    "scatter": _along_dim(1),
    "scatter_add": _along_dim(1),
    "slice": _along_dim(1),
    "slice_backward": _slice_backward,
    "unsqueeze": _inserted,
    "select": _removed,
    "squeeze": _removed,
    "expand": _sized,
    "new_zeros": _sized,
    "zeros_like": _pointwise,
    "ones_like": _pointwise,
    "full_like": _pointwise,
    "sum": _reduction,
    "mean": _reduction,
    "amax": _reduction,
    "amin": _reduction,
    "logsumexp": _reduction,
    "nll_loss_forward": _nll_loss,
    "nll_loss_backward": _nll_loss_backward,
    "_to_copy": _pointwise,
    "clone": _pointwise,
    "detach": _pointwise,
    "alias": _pointwise,
}
