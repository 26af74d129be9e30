"""Normalizations that are spelled out in operations: RMSNorm, and division by the Euclidean norm.

Both have a gradient of the form g = scale (u - z sum(z u) / n), the identity less a matrix of rank one, which the joint
graph holds as a sum of products. Taken together it reads x and one number for each row; the products read several
tensors of the size of x. The sum over z u is the fragment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..graph import Edge
from .reader import Reader
from .rule import Region
from .sums import added_up, subtract, sum_roots


@dataclass(frozen=True)
class Norm:
    """Over `dims`. With an `epsilon`: x / max(|x|, epsilon), of |x|; without: x times its inverse root mean square."""

    dims: tuple[int, ...]
    epsilon: float | None = None

    def scale(self, statistic: Tensor) -> Tensor:
        return statistic if self.epsilon is None else 1 / statistic.clamp_min(self.epsilon)

    def along(self, u: Tensor, z: Tensor, statistic: Tensor) -> Tensor:
        """The part of u that lies along z; nothing of it is taken away where the norm was clamped."""
        if self.epsilon is None:
            return (u * z).mean(self.dims, keepdim=True)
        total = (u * z).sum(self.dims, keepdim=True)
        return torch.where(statistic >= self.epsilon, total, torch.zeros_like(total))


def _gradient(norm: Norm, u: Tensor, x: Tensor, statistic: Tensor, *others: Tensor) -> Tensor:
    scale = norm.scale(statistic)
    z = x * scale
    return sum(others, (u - z * norm.along(u, z, statistic)) * scale)


def _take(norm: Norm, u: Tensor, x: Tensor, statistic: Tensor) -> tuple[Tensor, ...]:
    return (norm.along(u, x * norm.scale(statistic), statistic),)


def _solve(norm: Norm, total: Tensor, x: Tensor, statistic: Tensor, *rest: Tensor) -> Tensor:
    *others, along = rest
    scale = norm.scale(statistic)
    return torch.addcmul(subtract(total, others) / scale, x * scale, along)


@dataclass(frozen=True)
class _Match:
    """The gradient of one normalization: its cotangent `u`, and the products that add up to the gradient."""

    norm: Norm
    u: int
    x: int
    statistic: int
    products: tuple[int, ...]


def find_rank_one(reader: Reader) -> Iterator[Region]:
    """For each match, the gradient's inverse and a cheaper way to the gradient itself."""
    roots = {value: root for root in sum_roots(reader) for value in added_up(reader, root)}
    for match in (*_root_mean_squares(reader), *_lengths(reader)):
        root = roots.get(match.products[0])
        if root is None:
            continue
        others = added_up(reader, root)
        if any(product not in others for product in set(match.products)):
            continue
        for product in match.products:
            others.remove(product)
        if set(others) & {match.u, *match.products}:
            continue
        total, read, norm = root.gives[0], (match.x, match.statistic), match.norm
        yield Region(
            (match.u,),
            (total, *read, *others),
            partial(_solve, norm),
            "inverse of a normalization's gradient",
            fragment=partial(_take, norm),
            fragment_needs=read,
        )
        yield Region(
            (total,),
            (match.u, *read, *others),
            partial(_gradient, norm),
            "a normalization's gradient",
            inverse=False,
        )


# -- reading the graph -----------------------------------------------------------------------------------------------


def _aliases(reader: Reader, value: int) -> list[int]:
    """The value and what `detach` made of it."""
    found = [value]
    for alias in found:
        found += [edge.gives[0] for edge in reader.uses.get(alias, ()) if edge.label == "detach"]
    return found


def _read_by(reader: Reader, values: Iterable[int], label: str, *constants: object) -> Iterator[Edge]:
    """The calls of one name that read one of `values`, with these constants in order."""
    for value in values:
        for edge in reader.uses.get(value, ()):
            if edge.label == label and not edge.operations[0].kwargs and _constants(edge) == constants:
                yield edge


def _constants(edge: Edge) -> tuple[object, ...]:
    return tuple(arg for arg in edge.operations[0].args if isinstance(arg, (int, float)))


def _made(reader: Reader, value: int | None, label: str, *constants: object) -> Edge | None:
    edge = reader.made_by(value, label)
    plain = edge is not None and not edge.operations[0].kwargs and _constants(edge) == constants
    return edge if plain else None


def _other(edge: Edge, value: int) -> int | None:
    """The other one of two different factors."""
    rest = [need for need in edge.needs if need != value]
    return rest[0] if len(rest) == 1 and value in edge.needs else None


def _product(reader: Reader, first: int, second: int) -> int | None:
    """The product of two values, if it is there."""
    for edge in _read_by(reader, (first,), "mul"):
        if _other(edge, first) == second:
            return edge.gives[0]
    return None


def _dims(reader: Reader, edge: Edge, argument: int, source: int) -> tuple[int, ...] | None:
    """The dimensions over which a reduction that keeps them reduces, counted from the front."""
    args, shape = (*reader.args(edge), None, None), reader.shape(source)
    if edge.operations[0].kwargs or not isinstance(args[argument], (list, tuple)) or args[argument + 1] is not True:
        return None
    dims = {dim % len(shape) for dim in args[argument]} if shape else set()
    return tuple(sorted(dim for dim in dims if shape[dim] != 1)) or None


def _summed(reader: Reader, total: int | None, dims: tuple[int, ...]) -> int | None:
    """What was summed over `dims`."""
    edge = reader.made_by(total, "sum")
    return edge.needs[0] if edge is not None and _dims(reader, edge, 1, edge.needs[0]) == dims else None


# -- x rsqrt(mean(x^2) + epsilon) ------------------------------------------------------------------------------------


def _root_mean_squares(reader: Reader) -> Iterator[_Match]:
    for edge in reader.edges("rsqrt"):
        statistic = edge.gives[0]
        shifted = reader.made_by(edge.needs[0], "add")
        mean = reader.made_by(shifted.needs[0], "mean") if shifted is not None and _constants(shifted) else None
        square = reader.graph.definition.get(mean.needs[0]) if mean is not None else None
        if mean is None or square is None or not _is_square(reader, square):
            continue
        x = square.needs[0]
        dims = _dims(reader, mean, 1, x)
        if dims is not None:
            yield from _of_root_mean_square(reader, x, statistic, dims)


def _is_square(reader: Reader, edge: Edge) -> bool:
    if edge.label == "mul":
        return len(edge.needs) == 1 and not _constants(edge)
    return edge.label == "pow" and _constants(edge) == (2,)


def _of_root_mean_square(reader: Reader, x: int, statistic: int, dims: tuple[int, ...]) -> Iterator[_Match]:
    """g = u r + k 2 x, with k = -r^3 sum(u x) / 2 / n."""
    count = 1
    for dim in dims:
        count *= reader.shape(x)[dim]
    for cube in _read_by(reader, _aliases(reader, statistic), "pow", 3):
        for scaled in _read_by(reader, cube.gives, "mul"):
            half = _made(reader, _other(scaled, cube.gives[0]), "mul", -0.5)
            summed = _summed(reader, half.needs[0], dims) if half is not None else None
            product = _made(reader, summed, "mul")
            u = _other(product, x) if product is not None else None
            if u is None or reader.shape(u) != reader.shape(x):
                continue
            first = _product(reader, u, statistic)
            second = _twice(reader, _spread(reader, scaled.gives[0], count), x)
            if first is not None and second:
                yield _Match(Norm(dims), u, x, statistic, (first, *second))


def _spread(reader: Reader, value: int, count: int) -> list[int]:
    """A mean's gradient: expanded, and divided by the number of elements."""
    expanded = [edge.gives[0] for edge in _read_by_any(reader, value, "expand")]
    return [edge.gives[0] for edge in _read_by(reader, expanded, "div", count)]


def _read_by_any(reader: Reader, value: int, label: str) -> Iterator[Edge]:
    return (edge for edge in reader.uses.get(value, ()) if edge.label == label)


def _twice(reader: Reader, factors: Iterable[int], x: int) -> tuple[int, ...]:
    """The summands that make up 2 k x: of x^2, one product with 2 x; of x x, the same product twice."""
    for factor in factors:
        for edge in _read_by(reader, (factor,), "mul"):
            other = _other(edge, factor)
            if other == x:
                return (edge.gives[0], edge.gives[0])
            double = _made(reader, other, "mul", 2.0)
            power = _made(reader, double.needs[0], "pow", 1.0) if double is not None else None
            if power is not None and power.needs == (x,):
                return (edge.gives[0],)
    return ()


# -- x / max(|x|, epsilon) -------------------------------------------------------------------------------------------


def _lengths(reader: Reader) -> Iterator[_Match]:
    for edge in reader.edges("linalg_vector_norm"):
        x, statistic = edge.needs[0], edge.gives[0]
        dims = _dims(reader, edge, 2, x) if reader.args(edge)[1:2] == (2.0,) else None
        if dims is None:
            continue
        for clamped in _read_by_any(reader, statistic, "clamp_min"):
            epsilon = reader.args(clamped)[1]
            if isinstance(epsilon, float) and epsilon > 0:
                for n in _read_by_any(reader, clamped.gives[0], "expand"):
                    yield from _of_length(reader, x, statistic, n.gives[0], Norm(dims, epsilon))


def _of_length(reader: Reader, x: int, statistic: int, n: int, norm: Norm) -> Iterator[_Match]:
    """g = h / n + w x / |x|, with w = sum(-h (x / n / n)) where |x| is not clamped."""
    ratio = _quotients(reader, x, n)
    twice = [value for quotient in ratio for value in _quotients(reader, quotient, n)]
    lengths = _aliases(reader, statistic)
    units = [
        fill.gives[0]
        for alias in lengths
        for quotient in _quotients(reader, x, alias)
        for fill in _read_by(reader, (quotient,), "masked_fill", 0)
        if (zeros := _made(reader, reader.value(fill, 1), "eq", 0)) is not None and zeros.needs[0] in lengths
    ]
    for choice in reader.edges("where"):
        mask, total, zero = (reader.value(choice, place) for place in range(3))
        kept = _made(reader, mask, "ge", norm.epsilon)
        product = _made(reader, _summed(reader, total, norm.dims), "mul")
        if kept is None or kept.needs != (statistic,) or product is None or not _is_zero(reader, zero):
            continue
        negated = next((need for need in product.needs if reader.made_by(need, "neg")), None)
        if negated is None or _other(product, negated) not in twice:
            continue
        h = reader.graph.definition[negated].needs[0]
        for unit in units:
            second = _product(reader, choice.gives[0], unit)
            for first in _quotients(reader, h, n):
                if second is not None:
                    yield _Match(norm, h, x, statistic, (first, second))


def _quotients(reader: Reader, over: int, under: int) -> list[int]:
    return [edge.gives[0] for edge in _read_by(reader, (over,), "div") if edge.needs == (over, under)]


def _is_zero(reader: Reader, value: int | None) -> bool:
    edge = reader.made_by(value, "scalar_tensor")
    return edge is not None and reader.args(edge) == (0.0,)
