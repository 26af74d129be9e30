"""Normalizations and softmax: what they take out of a cotangent are a few sums, which are kept as its fragment.

A normalization over groups of elements, y = weight z + bias with z = (x - mean) rstd, has the gradient

    g = rstd (u - mean(u) - z mean(u z)),    u = weight h,

for any epsilon, as rstd holds it. Both means are the fragment, two numbers for each group:
u = g / rstd + mean(u) + z mean(u z). x follows from y where mean and rstd are at hand. That no weight is zero, only a
certificate can see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph import Ref
from .pointwise import solvable
from .rule import Call, Recipe, Rule

Named = Mapping[str, Tensor]  # "x", "mean", "rstd" (or "variance"), "weight", "bias": those that there are


@dataclass(frozen=True)
class Groups:
    """What is normalized together: tensors seen as `shape` are averaged over `dims`.

    `statistics` and `weights` are the shapes in which mean and rstd, weight and bias are broadcast to that.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    statistics: tuple[int, ...]
    weights: tuple[int, ...]


def _by_channel(call: Call, source: Tensor) -> Groups:
    column = (-1, *[1] * (source.dim() - 2))
    return Groups(tuple(source.shape), (0, *range(2, source.dim())), column, column)


def _trailing(call: Call, source: Tensor) -> Groups:
    """The last dimensions, as many as `normalized_shape` lists."""
    sizes = next(argument for argument in call.args if isinstance(argument, (list, tuple)))
    shape, count = tuple(source.shape), len(sizes)
    dims = tuple(range(len(shape) - count, len(shape)))
    return Groups(shape, dims, (*shape[:-count], *[1] * count), tuple(sizes))


def _by_group_of_channels(group: int) -> Callable[[Call, Tensor], Groups]:
    def groups(call: Call, source: Tensor) -> Groups:
        count = call.args[group]
        batch, channels, *space = source.shape
        ones = [1] * len(space)
        return Groups(
            shape=(batch, count, channels // count, *space),
            dims=tuple(range(2, source.dim() + 1)),
            statistics=(batch, count, 1, *ones),
            weights=(count, channels // count, *ones),
        )

    return groups


def _wide(tensor: Tensor) -> Tensor:
    """Sums over half-precision numbers are taken in single precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _viewed(groups: Groups, named: Named) -> dict[str, Tensor]:
    """Everything in the shape in which it is broadcast."""
    shapes = {"x": groups.shape, "weight": groups.weights, "bias": groups.weights}
    return {name: _wide(tensor).reshape(shapes.get(name, groups.statistics)) for name, tensor in named.items()}


def _normalized(there: Named) -> Tensor:
    centred = there["x"] - there["mean"] if "mean" in there else there["x"]
    return centred * there["rstd"]


def take_moments(groups: Groups, h: Tensor, named: Named) -> tuple[Tensor, ...]:
    """mean(u) and mean(u z) of every group, in the shape of the statistics; without a mean only the second."""
    there, u = _viewed(groups, named), _wide(h).reshape(groups.shape)
    if "weight" in there:
        u = u * there["weight"]
    second = (u * _normalized(there)).mean(groups.dims, keepdim=True)
    return (u.mean(groups.dims, keepdim=True), second) if "mean" in there else (second,)


def solve_cotangent(groups: Groups, g: Tensor, named: Named, moments: Sequence[Tensor]) -> Tensor:
    """h, from the gradient and the moments that were taken of h."""
    there, *first, second = _viewed(groups, named), *moments
    u = torch.addcmul(_wide(g).reshape(groups.shape) / there["rstd"], _normalized(there), second)
    u = u + first[0] if first else u
    return (u / there["weight"] if "weight" in there else u).reshape(g.shape)


def solve_input(groups: Groups, y: Tensor, named: Named) -> Tensor:
    there, z = _viewed(groups, named), _wide(y).reshape(groups.shape)
    z = z - there["bias"] if "bias" in there else z
    z = z / there["weight"] if "weight" in there else z
    x = z / there["rstd"]
    return (x + there["mean"] if "mean" in there else x).reshape(y.shape)


# -- the calls -----------------------------------------------------------------------------------------------------


def _present(call: Call, places: Mapping[str, int]) -> dict[str, int]:
    """The positions of the tensors that stand at these arguments."""
    found = {name: call.args[place] for name, place in places.items() if place < len(call.args)}
    return {name: ref.slot for name, ref in found.items() if isinstance(ref, Ref)}


def _gradient(view: Callable[[Call, Tensor], Groups], **places: int) -> Rule:
    """The rule of a backward operation: its first argument is the cotangent, `places` say where the others stand."""

    def rule(call: Call) -> Iterator[Recipe]:
        named, cotangent = _present(call, places), call.tensors[call.args[0].slot]
        if "rstd" not in named or not cotangent.numel():
            return
        groups, reads = view(call, cotangent), tuple(named.values())
        yield Recipe(
            (call.args[0].slot,),
            lambda g, *rest: solve_cotangent(groups, g, dict(zip(named, rest, strict=False)), rest[len(named) :]).to(
                cotangent.dtype
            ),
            reads,
            note="by a weight that may be zero",
            fragment=lambda h, *rest: take_moments(groups, h, dict(zip(named, rest, strict=True))),
            fragment_reads=reads,
        )

    return rule


def _forward(view: Callable[[Call, Tensor], Groups], statistics: Sequence[str], weight: int, bias: int = 99) -> Rule:
    """The rule of a forward operation, whose first results are y and then the `statistics`."""

    def rule(call: Call) -> Iterator[Recipe]:
        named, source = _present(call, {"weight": weight, "bias": bias}), call.tensors[call.args[0].slot]
        groups, names = view(call, source), (*statistics, *named)
        yield Recipe(
            (call.args[0].slot,),
            lambda y, *rest: solve_input(groups, y, dict(zip(names, rest, strict=True))).to(source.dtype),
            tuple(named.values()),
            tuple(range(1 + len(statistics))),
            note="by a weight that may be zero",
        )

    return rule


# -- batch normalization by running statistics: affine ---------------------------------------------------------------


def batch_norm_by_running_statistics(call: Call) -> Iterator[Recipe]:
    named = _present(call, {"weight": 1, "bias": 2, "mean": 3, "variance": 4})
    source, epsilon = call.tensors[call.args[0].slot], call.args[6]
    groups = _by_channel(call, source)

    def function(y: Tensor, *rest: Tensor) -> Tensor:
        there = dict(zip(named, rest, strict=True))
        there["rstd"] = (there.pop("variance") + epsilon).rsqrt()
        return solve_input(groups, y, there).to(source.dtype)

    yield Recipe((call.args[0].slot,), function, tuple(named.values()), note="by a weight that may be zero")


def batch_norm_backward(call: Call) -> Iterator[Recipe]:
    """In training as any normalization; by running statistics, g = h weight / sqrt(variance + epsilon)."""
    if call.args[7]:
        yield from _gradient(_by_channel, x=1, weight=2, mean=5, rstd=6)(call)
        return
    named, epsilon = _present(call, {"variance": 4, "weight": 2}), call.args[8]
    cotangent = call.tensors[call.args[0].slot]
    groups = _by_channel(call, cotangent)

    def function(g: Tensor, variance: Tensor, *weight: Tensor) -> Tensor:
        there = {"rstd": (variance + epsilon).rsqrt(), **dict(zip(("weight",), weight, strict=False))}
        return solve_input(groups, g, there).to(cotangent.dtype)

    if "variance" in named:
        yield Recipe((call.args[0].slot,), function, tuple(named.values()), note="by a weight that may be zero")


# -- softmax ---------------------------------------------------------------------------------------------------------


def log_softmax_backward(call: Call) -> Iterator[Recipe]:
    """g = h - exp(y) S, and S = sum(h) is the fragment."""
    position, dim = solvable(call, 0), call.args[2]
    if position is not None and isinstance(call.args[1], Ref):
        yield Recipe(
            (position,),
            lambda g, y, total: (_wide(g) + y.exp() * total).to(g.dtype),
            (call.args[1].slot,),
            fragment=lambda h: (_wide(h).sum(dim, keepdim=True),),
        )


def softmax_backward(call: Call) -> Iterator[Recipe]:
    """g = p (h - s), and s = sum(p h) is the fragment. What is left of h was multiplied by p, small or not."""
    position, dim = solvable(call, 0), call.args[2]
    if position is not None and isinstance(call.args[1], Ref):
        p = call.args[1].slot
        yield Recipe(
            (position,),
            lambda g, p, total: (_wide(g) / p + total).to(g.dtype),
            (p,),
            note="by a probability that may be zero",
            fragment=lambda h, p: ((_wide(h) * p).sum(dim, keepdim=True),),
            fragment_reads=(p,),
        )


_FUNCTIONAL = _forward(_by_channel, ("mean", "rstd"), 1, 2)


def batch_norm(call: Call) -> Iterator[Recipe]:
    """Of the batch's own statistics. The call that was given running ones is another."""
    training = call.args[5] if call.name.endswith("functional") else call.args[3]
    if training is True:
        yield from _FUNCTIONAL(call)


RULES: dict[str, Rule] = {
    "_native_batch_norm_legit": batch_norm,
    "_native_batch_norm_legit_functional": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm_by_running_statistics,
    "native_batch_norm_backward": batch_norm_backward,
    "native_layer_norm": _forward(_trailing, ("mean", "rstd"), 2, 3),
    "native_layer_norm_backward": _gradient(_trailing, x=1, mean=3, rstd=4, weight=5),
    "native_group_norm": _forward(_by_group_of_channels(6), ("mean", "rstd"), 1, 2),
    "native_group_norm_backward": _gradient(_by_group_of_channels(8), x=1, mean=2, rstd=3, weight=4),
    "_fused_rms_norm": _forward(_trailing, ("rstd",), 2),
    "_fused_rms_norm_backward": _gradient(_trailing, x=1, rstd=3, weight=4),
    "_log_softmax_backward_data": log_softmax_backward,
    "_softmax_backward_data": softmax_backward,
}
