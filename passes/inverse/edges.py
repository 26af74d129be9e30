"""From rules to edges: every call and region of a captured step becomes ways to solve for what it read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..capture import Capture
from ..cost import Device, operations_seconds
from ..graph import Edge, Graph, Kind, Operation, Stage, refs_in
from ..layout import lay_out
from ..sizes import storage_bytes
from ..trace import trace_operations
from . import convolution, erasing, linear, normalization, pointwise, pooling, resampled, shape
from .constants import Constants, constant_regions, divides_by_mask
from .orthogonal import orthogonal_values
from .padded import find_padded
from .rank_one import find_rank_one
from .reader import Reader
from .regions import find_regions
from .rule import Call, Recipe, Region, Rule, result_places
from .spine import find_input_gradients
from .triangular import find_triangular

FAMILIES = (pointwise, erasing, pooling, shape, linear, convolution, normalization, resampled)
RULES: dict[str, Rule] = {name: rule for family in FAMILIES for name, rule in family.RULES.items()}
CUSTOM: dict[str, Rule] = {}  # what users have registered, by qualified name
FRAGILE_SECONDS = 1e3  # the price of a fragile recipe: above that of any sturdy one
WAITING_BYTES_PER_S = 1e9  # the price of what is kept for the spine, or between spine and sweep


def make_call(capture: Capture, edge: Edge, orthogonal: frozenset[int] = frozenset()) -> Call:
    """What a rule sees of an edge of the joint graph; `orthogonal` are values, not positions."""
    operation = edge.operations[0]
    return Call(
        edge.label,
        tuple(operation.args),
        operation.kwargs,
        tuple(capture.fake(value) for value in edge.needs),
        _outputs(capture, edge),
        frozenset(position for position, value in enumerate(edge.needs) if value in orthogonal),
    )


def _outputs(capture: Capture, edge: Edge) -> tuple[Tensor | None, ...]:
    fakes = [capture.fake(value) for value in edge.gives]
    places = result_places(edge)
    if not edge.gives or edge.results == (len(edge.needs),):
        return tuple(fakes)
    whole = capture.nodes[edge.gives[0]].args[0]
    given = dict(zip(places, fakes, strict=True))
    return tuple(given.get(i) for i in range(len(whole.meta["val"])))  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Fragment:
    """How the fragments of a recipe are taken, and what they look like."""

    operations: tuple[Operation, ...] = ()
    results: tuple[int, ...] = ()
    fakes: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Way:
    """Operations that were found to give tensors of the right shapes, dtypes and layouts."""

    operations: tuple[Operation, ...]
    results: tuple[int, ...]
    fragment: _Fragment
    seconds: float


def _dense_strides(fake: Tensor) -> tuple[int, ...]:
    """The strides that are asked of a solved value: its own, without the gaps of a piece of a larger storage."""
    return tuple(torch.empty_like(fake).stride())


def _trace(
    function: Callable[..., Any], inputs: Sequence[Tensor], solved: Sequence[Tensor]
) -> tuple[tuple[Operation, ...], tuple[int, ...]] | None:
    """The operations of `function` ending in the layout of `solved`, or None if its results are something else."""
    strides = [_dense_strides(fake) for fake in solved]

    def laid_out(*arguments: Tensor) -> Any:
        results = function(*arguments)
        listed = [results] if isinstance(results, Tensor) else list(results)
        return [_match(result, like, wanted) for result, like, wanted in zip(listed, solved, strides, strict=True)]

    with torch.no_grad():
        operations, slots, fakes = trace_operations(laid_out, inputs)
    same = all((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in zip(fakes, solved, strict=True))
    return (operations, slots) if same else None


def _match(result: Tensor, like: Tensor, strides: Sequence[int]) -> Tensor:
    return lay_out(result, strides) if result.shape == like.shape else result


def _sound(call: Call, recipe: Recipe) -> bool:
    """Whether all that the recipe needs is there, and nothing that it solves for stands in the call twice."""
    places = [ref.slot for ref in refs_in((call.args, call.kwargs))]
    return (
        all(call.outputs[position] is not None for position in recipe.outputs)
        and all(places.count(position) == 1 for position in recipe.solves)
        and not set(recipe.solves) & set(recipe.reads)
    )


AddValue = Callable[[int, Tensor, str], int]  # a new value like another one: its fake tensor, what its name ends in


class _Inverter:
    """Traces each distinct recipe once: a net has hundreds of identical layers."""

    def __init__(self, capture: Capture, device: Device, orthogonal: frozenset[int], add_value: AddValue) -> None:
        self.capture, self.device, self.orthogonal, self.add_value = capture, device, orthogonal, add_value
        self.layouts: dict[int, Any] = {}
        self.ways: dict[Any, tuple[tuple[Recipe, _Way], ...]] = {}
        self.region_ways: dict[Any, _Way | None] = {}

    def of_edge(self, edge: Edge) -> Iterator[Edge]:
        """The inverse edges of one call."""
        found = self._ways_of(edge)
        items = dict(zip(result_places(edge), edge.gives, strict=True)) if found else {}
        for recipe, way in found:
            gives = tuple(edge.needs[position] for position in recipe.solves)
            if all(_is_constant(self.capture.graph, value) for value in gives):
                continue
            needs = tuple(items[position] for position in recipe.outputs) + tuple(edge.needs[p] for p in recipe.reads)
            reads = tuple(edge.needs[p] for p in recipe.fragment_reads)
            yield from self._edges(way, gives, needs, reads, edge)

    def of_region(self, region: Region) -> Iterator[Edge]:
        way = self._way_through(region)
        if way is not None:
            yield from self._edges(way, region.gives, region.needs, region.fragment_needs, region)

    def _edges(
        self,
        way: _Way,
        gives: tuple[int, ...],
        needs: tuple[int, ...],
        reads: tuple[int, ...],
        origin: Edge | Region,
    ) -> Iterator[Edge]:
        """The edge that solves for `gives`, behind the one that takes its fragments where it wants any."""
        taken = way.fragment
        if taken.fakes:  # of cotangents only, and while they are at hand
            if not self._are_cotangents(gives):
                return
            fragments = tuple(self.add_value(gives[0], fake, "fragment") for fake in taken.fakes)
            seconds = operations_seconds(taken.operations, self.device)
            name = f"fragment of {origin.label}"
            yield Edge(fragments, gives + reads, taken.operations, taken.results, name, "fragment", "backward", seconds)
            needs += fragments
        stage = self._stage((*gives, *needs))
        if isinstance(origin, Region):
            kind: Kind = "inverse" if origin.inverse else "forward"
            yield Edge(gives, needs, way.operations, way.results, origin.label, kind, stage, way.seconds)
            return
        label = f"inverse of {origin.label}"
        yield Edge(
            *(gives, needs, way.operations, way.results, label, "inverse", stage, way.seconds),
            sequence=origin.sequence,
            source=origin.source,
        )

    def _stage(self, touched: Iterable[int]) -> Stage:
        values = self.capture.graph.values
        backward = any(value < len(values) and values[value].stage == "backward" for value in touched)
        return "backward" if backward else "forward"

    def _are_cotangents(self, values: Sequence[int]) -> bool:
        return all(self.capture.graph.values[value].stage == "backward" for value in values)

    def _way(
        self, origin: Recipe | Region, inputs: Sequence[Tensor], solved: Sequence[Tensor], reads: Sequence[Tensor]
    ) -> _Way | None:
        """Bytes that wait from the spine to the sweep count as time, as residuals do (`solutions.block_spine`)."""
        fragment = _trace_fragment(origin.fragment, [*solved, *reads])
        traced = _trace(origin.function, [*inputs, *fragment.fakes], solved)
        if traced is None:
            return None
        waiting = sum(storage_bytes(fake) for fake in fragment.fakes) / WAITING_BYTES_PER_S
        price = FRAGILE_SECONDS if origin.fragile else 0.0
        return _Way(*traced, fragment, operations_seconds(traced[0], self.device) + waiting + price)

    def _way_through(self, region: Region) -> _Way | None:
        key = (_function_key(region.function), self._layouts_of(region.needs), self._layouts_of(region.gives))
        if key not in self.region_ways:
            inputs, solved, reads = (
                [self.capture.fake(value) for value in values]
                for values in (region.needs, region.gives, region.fragment_needs)
            )
            self.region_ways[key] = self._way(region, inputs, solved, reads)
        return self.region_ways[key]

    def _ways_of(self, edge: Edge) -> tuple[tuple[Recipe, _Way], ...]:
        rule = RULES.get(edge.label) or CUSTOM.get(edge.label)
        if rule is None or edge.random or edge.effect:
            return ()
        layouts = self._layouts_of(edge.needs)
        if not all(layouts):
            return ()
        proved = tuple(position for position, value in enumerate(edge.needs) if value in self.orthogonal)
        key = (edge.label, edge.operations[0].text, layouts, edge.results, self._layouts_of(edge.gives), proved)
        if key not in self.ways:
            call = make_call(self.capture, edge, self.orthogonal)
            self.ways[key] = tuple(self._recipe_ways(call, rule))
        return self.ways[key]

    def _recipe_ways(self, call: Call, rule: Rule) -> Iterator[tuple[Recipe, _Way]]:
        for recipe in _recipes(call, rule):
            if not _sound(call, recipe):
                continue
            outputs = [call.outputs[position] for position in recipe.outputs]
            inputs = [fake for fake in outputs if fake is not None] + [call.tensors[p] for p in recipe.reads]
            solved = [call.tensors[position] for position in recipe.solves]
            reads = [call.tensors[p] for p in recipe.fragment_reads]
            way = self._way(recipe, inputs, solved, reads)
            if way is not None:
                yield recipe, way

    def _layouts_of(self, values: Iterable[int]) -> tuple[Any, ...]:
        return tuple(self._layout_of(value) for value in values)

    def _layout_of(self, value: int) -> Any:
        """What a trace depends on; None where a value is no tensor."""
        if value not in self.layouts:
            fake = self.capture.fake(value)
            tensor = isinstance(fake, Tensor)
            self.layouts[value] = (tuple(fake.shape), fake.dtype, fake.stride(), fake.device) if tensor else None
        return self.layouts[value]


def _function_key(function: Callable[..., Any]) -> Any:
    return (function.func, function.args) if isinstance(function, partial) else function


def _recipes(call: Call, rule: Rule) -> Iterator[Recipe]:
    """A rule that fails is a bug of the rule, and no reason not to train: the operation is then not inverted."""
    try:
        yield from rule(call)
    except Exception as error:
        message = f"moonwalk: the inverse rule of {call.name} failed ({type(error).__name__}: {error}); it is left out"
        warnings.warn(message, stacklevel=2)


def _trace_fragment(function: Callable[..., tuple[Tensor, ...]] | None, inputs: Sequence[Tensor]) -> _Fragment:
    if function is None:
        return _Fragment()
    with torch.no_grad():
        return _Fragment(*trace_operations(function, inputs))


def _is_constant(graph: Graph, value: int) -> bool:
    """Parameters, buffers and their views need no solving."""
    return graph.values[graph.values[value].storage].role in ("parameter", "buffer")


def inverse_edges(
    capture: Capture,
    device: Device,
    is_orthogonal_input: Callable[[int], bool] = lambda _: False,
    add_value: AddValue | None = None,
    constants: Constants | None = None,
) -> tuple[Edge, ...]:
    """All the ways to solve for values of the step: edges of kind "inverse", and of kind "forward" for shortcuts.

    In front of an inverse that needs fragments stands the edge of kind "fragment" that takes them; they are values of
    their own, numbered by `add_value` (by default from the number of the graph's values on).

    An edge is of stage "backward" if it touches a cotangent. A solved value has the shape, dtype and strides of the
    one it replaces; if that was a piece of a larger storage, it is dense in the same order of dimensions.
    `is_orthogonal_input` says whether a primal is a matrix with orthonormal rows or columns, `constants` holds buffers
    that rules may look at.
    """
    orthogonal = orthogonal_values(capture, is_orthogonal_input)
    numbers = count(len(capture.graph.values))
    inverter = _Inverter(capture, device, orthogonal, add_value or (lambda like, fake, suffix: next(numbers)))
    known = constants or Constants()
    found = [inverse for edge in capture.graph.edges for inverse in inverter.of_edge(edge)]
    found = [edge for edge in found if not divides_by_mask(capture, known, edge)]
    reader = Reader(capture)
    regions = (
        *find_regions(reader),
        *find_rank_one(reader),
        *find_padded(reader),
        *find_triangular(reader, known),
        *resampled.find_resampled(reader),
        *find_input_gradients(capture),
        *constant_regions(reader, known),
    )
    found += [inverse for region in regions for inverse in inverter.of_region(region)]
    return tuple(found)
