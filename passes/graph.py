"""The training step as data: values, and the edges that say how one value is obtained from others.

An `Edge` is a hyperedge: a short straight line of operations that turns the values it *needs* into the values it
*gives*. An ATen call of the joint graph is an edge; so is an inverse rule, and so is the packing of a mask into
bits. Everything behind capture (blocks, liveness, planner, emission) sees only these frozen dataclasses, so it can
be tested with graphs written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Stage = Literal["forward", "late", "backward"]
Role = Literal["parameter", "buffer", "input", "tangent", "computed"]
Kind = Literal["forward", "inverse", "codec", "fragment"]


@dataclass(frozen=True, slots=True, repr=False)
class Ref:
    """A reference to a slot, inside the arguments of an operation or an instruction."""

    slot: int

    def __repr__(self) -> str:
        return f"%{self.slot}"


def map_refs(tree: Any, function: Callable[[Ref], Any]) -> Any:
    """Replace every `Ref` in nested tuples, lists, dicts and slices."""
    if isinstance(tree, Ref):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_refs(item, function) for item in tree)
    if isinstance(tree, Mapping):
        return {key: map_refs(item, function) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_refs(part, function) for part in (tree.start, tree.stop, tree.step)))
    return tree


def refs_in(tree: Any) -> Iterator[Ref]:
    """Every `Ref` in nested arguments, in order."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from refs_in(item)
    elif isinstance(tree, Mapping):
        yield from refs_in(list(tree.values()))
    elif isinstance(tree, slice):
        yield from refs_in((tree.start, tree.stop, tree.step))


Call = tuple[Any, Any, Any]  # operation, arguments and keyword arguments, hashable


@dataclass(frozen=True)
class Operation:
    """One call. Slots below the number of inputs are the inputs, the others earlier results.

    `new` lists the bytes of the storages that the call allocates (several for a tuple); `holds` says which storages
    the result refers to: `(-1, j)` is its own j-th new one, `(slot, j)` the j-th that `slot` holds (a view, an item).
    `call` describes the call (shapes, strides, types); `borrows` says that it may need memory beyond its results.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    new: tuple[int, ...] = ()
    holds: tuple[tuple[int, int], ...] = ()
    flops: float = 0.0
    moved: int = 0
    call: Call | None = field(default=None, compare=False, repr=False)
    borrows: bool = field(default=True, compare=False, repr=False)

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """The slots that it reads, in order."""
        return tuple(ref.slot for ref in refs_in((self.args, self.kwargs)))

    @cached_property
    def text(self) -> str:
        """What is called, and how: equal for operations that do the same to tensors of equal layout."""
        return f"{self.target} {self.args} {self.kwargs}"


@dataclass(frozen=True)
class Value:
    """One tensor of the step; `bytes` is its storage's size and `storage` the index of the value that owns it."""

    index: int
    name: str
    bytes: int
    storage: int
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    role: Role = "computed"
    stage: Stage = "forward"


@dataclass(frozen=True)
class Edge:
    """One way to obtain the values `gives` from the values `needs`.

    `results[i]` is the slot of `gives[i]`. `random` edges may be emitted once in a step, `effect` edges (mutations)
    once and in their place. `seconds` is what the cost model predicts.
    """

    gives: tuple[int, ...]
    needs: tuple[int, ...]
    operations: tuple[Operation, ...]
    results: tuple[int, ...]
    label: str = ""
    kind: Kind = "forward"
    stage: Stage = "forward"
    seconds: float = 0.0
    random: bool = False
    effect: bool = False
    sequence: int | None = None
    source: str = ""

    @property
    def is_view(self) -> bool:
        return not any(operation.new for operation in self.operations)

    @property
    def expensive(self) -> bool:
        return any(operation.flops for operation in self.operations)


@dataclass(frozen=True)
class Graph:
    """The joint graph: definitions in topological order, and what goes in and out."""

    values: tuple[Value, ...]
    edges: tuple[Edge, ...]
    primals: tuple[int, ...]
    tangents: tuple[int, ...]
    outputs: tuple[Any, ...]  # Ref(value index) or a constant
    gradients: tuple[Any, ...]
    mutated: frozenset[int] = frozenset()  # primals that the forward pass overwrites
    differentiated: tuple[int, ...] = ()  # the places of the outputs whose gradients the tangents are, where known

    @cached_property
    def definition(self) -> dict[int, Edge]:
        """The edge of the joint graph that gives each computed value."""
        return {value: edge for edge in self.edges for value in edge.gives}

    @cached_property
    def position(self) -> dict[int, int]:
        """Where the edge that gives each computed value stands."""
        return {value: position for position, edge in enumerate(self.edges) for value in edge.gives}

    @cached_property
    def uses(self) -> dict[int, list[Edge]]:
        """The edges of the joint graph that read each value."""
        found: dict[int, list[Edge]] = {}
        for edge in self.edges:
            for value in edge.needs:
                found.setdefault(value, []).append(edge)
        return found

    @cached_property
    def free(self) -> frozenset[int]:
        """Values that the backward pass can read without keeping anything: the inputs that nobody overwrites."""
        return frozenset(self.primals) - self.mutated

    @cached_property
    def static(self) -> frozenset[int]:
        """Free values and their views (`weight.t()`): available everywhere, at no bytes and no time.

        So are constants (`eye`, `arange`), which are made again where they are read: shared by all layers, they would
        cross every border between them.
        """
        known = set(self.free)
        for edge in self.edges:
            cheap = edge.is_view or not (edge.needs or edge.random)
            if edge.stage != "backward" and cheap and not edge.effect and known.issuperset(edge.needs):
                known.update(edge.gives)
        return frozenset(known)

    @cached_property
    def output_values(self) -> tuple[int, ...]:
        return tuple(ref.slot for ref in refs_in(self.outputs))

    @cached_property
    def gradient_values(self) -> tuple[int, ...]:
        return tuple(ref.slot for ref in refs_in(self.gradients))

    def stage_edges(self, *stages: Stage) -> Iterator[Edge]:
        return (edge for edge in self.edges if edge.stage in stages)

    def storage_bytes(self, values: Iterable[int]) -> int:
        """Bytes of the distinct storages behind `values`."""
        return sum(self.values[root].bytes for root in {self.values[value].storage for value in values})
