"""What a single layer can do, found by the engine: from some values of the layer's own training step to others.

A layer is y = f(x), with h_x = h_y f'(x) for cotangents. Its joint graph is captured once, and `solve` is asked for

    forward     x        ->  y
    vjp         x, h_y   ->  h_x, gradients
    reverse     y, h_y   ->  x, h_x, gradients      (needs an f that can be inverted)
    back        y, h_y   ->  x, h_x                 (the same without the gradients)
    spine       r, h_y   ->  h_x                    (r: residuals, what f' reads of the forward pass, or bits of it)
    sweep       x, h_x   ->  y, h_y, gradients      (the vijp: needs a surjective f')

Layers that differ in nothing but the values of their parameters share these programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..passes.capture import Capture
from ..passes.graph import Edge, Ref, map_refs
from ..passes.inverse import Solution, solve
from ..passes.lower import Boxed, boxed_eager
from ..passes.program import Builder, Program
from ..testing import capture_joint
from .chain import Layer, call
from .edges import LayerEdges, Spine


class Refused(Exception):
    """A layer cannot do what is asked; the message says why."""


@dataclass(frozen=True)
class Way:
    """A program of a layer, ready to run. `reads` are the positions of the parameters and buffers that it needs."""

    call: Boxed
    reads: tuple[int, ...]

    @torch.no_grad()
    def __call__(self, carried: list[Tensor], state: Sequence[Tensor]) -> list[Tensor]:
        """Run it. The list `carried` is emptied: what nobody else holds is freed after its last use."""
        arguments = [*carried, *(state[position].detach() for position in self.reads)]
        carried.clear()
        return list(self.call(arguments))


def dense_strides(like: Tensor) -> tuple[int, ...]:
    """The strides of `like`, without gaps."""
    return tuple(torch.empty_like(like).stride())


def runnable(program: Program) -> Boxed:
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {slot: graph.placeholder(f"value_{slot}") for slot, _ in program.inputs}
    for instruction in program.instructions:
        if isinstance(instruction.operation.target, str):
            raise Refused("it uses a tensor that is neither a parameter nor a buffer")
        args, kwargs = instruction.arguments(nodes.__getitem__)
        nodes[instruction.slot] = graph.call_function(instruction.operation.target, args, kwargs)
    graph.output(map_refs(tuple(program.outputs), lambda ref: nodes[ref.slot]))
    return boxed_eager(fx.GraphModule(nn.Module(), graph))


class Step:
    """The programs of one kind of layer, each found when first asked for. They raise `Refused`."""

    def __init__(self, capture: Capture, trained: int, fixed: int, returned: int) -> None:
        graph = capture.graph
        inputs = graph.primals[-(1 + trained + fixed) :]
        outputs = [ref.slot for ref in graph.outputs[-(1 + returned) :]]
        gradients = [ref and ref.slot for ref in graph.gradients[-len(inputs) :]]
        self.capture, self.graph = capture, graph
        self.x, self.state, self.y, self.h_y = inputs[0], inputs[1:], outputs[0], graph.tangents[0]
        self.edges = LayerEdges(capture, self.state)
        self._refusals: dict[str, str | None] = {}
        self._h_x, self.parameter_gradients = gradients[0], gradients[1 : 1 + trained]
        self.updates = {
            trained + position: output
            for position, output in enumerate(outputs[1:])
            if not self._is_copy(output, self.state[trained + position])
        }

    def _is_copy(self, value: int, of: int) -> bool:
        while value != of and (edge := self.graph.definition.get(value)) and edge.label in ("clone", "detach"):
            value = edge.needs[0]
        return value == of

    @property
    def h_x(self) -> int:
        if self._h_x is None:
            raise Refused("its output has no derivative by its input")
        return self._h_x

    @property
    def gradients(self) -> list[int]:
        return [value for value in self.parameter_gradients if value is not None]

    def like(self, value: int) -> Tensor:
        """A fake tensor of the value's shape, type and layout."""
        fake: Tensor = self.capture.fake(value)
        return fake

    @cached_property
    def strides_x(self) -> tuple[int, ...]:
        return dense_strides(self.like(self.x))

    @cached_property
    def strides_h_x(self) -> tuple[int, ...]:
        return dense_strides(self.like(self.h_x))

    # -- ways ----------------------------------------------------------------------------------------------------------

    @cached_property
    def forward(self) -> Way:
        return self._way(self.edges.again, [self.x], [self.y, *self.updates.values()])

    @cached_property
    def reverse(self) -> Way:
        return self._way(self.edges.solving, [self.y, self.h_y], [self.x, self.h_x, *self.gradients])

    @cached_property
    def vjp(self) -> Way:
        return self._way(self.edges.again, [self.x, self.h_y], [self.h_x, *self.gradients])

    @cached_property
    def back(self) -> Way:
        return self._way(self.edges.solving, [self.y, self.h_y], [self.x, self.h_x])

    @cached_property
    def keeping(self) -> Way:
        """Forward, and the residuals of the spine."""
        spine = self.reading
        wanted = [self.y, *self.updates.values(), *spine.residuals]
        return self._way([*self.edges.again, *spine.encoders], [self.x], wanted)

    @cached_property
    def spine(self) -> Way:
        return self._way(self.reading.edges, [self.h_y, *self.reading.residuals], [self.h_x])

    @cached_property
    def sweep(self) -> Way:
        wanted = [self.y, self.h_y, *self.gradients]
        return self._way(self.edges.sweeping, [self.x, self.h_x], wanted)

    @cached_property
    def reading(self) -> Spine:
        """The spine's residuals. Raises `Refused` if the layer has no spine apart from its forward pass."""
        found = self.edges.spine(self.h_y, self.h_x)
        if found is None:
            raise Refused(self._random() or "its backward pass hands on no cotangent by itself")
        return found

    @property
    def residual_bytes(self) -> int:
        return self.reading.graph.storage_bytes(self.reading.residuals)

    @property
    def output_bytes(self) -> int:
        return self.graph.storage_bytes([self.y])

    def refusal(self, way: str) -> str | None:
        """Why the layer does not have this way; None if it has."""
        if way not in self._refusals:
            try:
                getattr(self, way)
                self._refusals[way] = None
            except Refused as reason:
                self._refusals[way] = str(reason)
        return self._refusals[way]

    def _way(self, edges: Sequence[Edge], given: Sequence[int], wanted: Sequence[int]) -> Way:
        solution = solve(edges, {*given, *self.state}, wanted)
        if solution.missing:
            raise Refused(self._obstacle(solution))
        builder = Builder(self.graph)
        for value in (*given, *self.state):
            builder.input(value)
        for edge in solution.program(wanted):
            builder.emit(edge)
        program = builder.finish([Ref(builder.environment[value]) for value in wanted], order=given)
        return Way(runnable(program), tuple(self.state.index(value) for _, value in program.inputs[len(given) :]))

    def _obstacle(self, solution: Solution) -> str:
        """The operation at which solving came to an end."""
        if drawn := self._random():
            return drawn
        reached = {*solution.known, *solution.edge}
        cotangents = self.h_x in solution.known
        edges = [edge for edge in self.graph.edges if (edge.stage == "backward") == cotangents]
        for edge in edges[::-1]:
            lacking = [value for value in edge.needs if value not in reached]
            if lacking and reached.intersection(edge.gives):
                return f"no rule solves {edge.label} for {'its cotangent' if cotangents else 'its input'}"
        return f"nothing gives {self.graph.values[solution.missing[0]].name}"

    def _random(self) -> str | None:
        drawn = [edge.label for edge in self.graph.edges if edge.random]
        return f"{drawn[0]} draws random numbers, which cannot be drawn again" if drawn else None


# -- capture -----------------------------------------------------------------------------------------------------------


def capture_step(layer: Layer, x: Tensor) -> Step:
    """The step of a layer for an input like `x`. A layer that overwrites what it is given is traced on copies."""
    trained, fixed = layer.trained, layer.fixed
    names = [*trained, *fixed]
    arguments = [x, *trained.values(), *fixed.values()]
    wanted = [x.is_floating_point(), *(True for _ in trained), *(False for _ in fixed)]
    step = capture_joint(_function(layer, names), arguments, wanted)
    if len(step.graph.tangents) == 1 and len(step.graph.outputs) == 1:
        return Step(step, len(trained), len(fixed), 0)
    copying = capture_joint(_function(layer, names, copied=len(fixed)), arguments, wanted)
    return Step(copying, len(trained), len(fixed), len(fixed))


def _function(layer: Layer, names: Sequence[str], copied: int | None = None) -> Callable[..., Any]:
    def function(x: Tensor, *state: Tensor) -> Any:
        if copied is None:
            return _apart(_call(layer, names, x, state), x)
        given = x.clone()
        copies = [tensor.detach().clone() for tensor in state[len(state) - copied :]]
        y = _apart(_call(layer, names, given, (*state[: len(state) - copied], *copies)), given)
        return (y, *(tensor.detach() for tensor in copies))

    return function


def _call(layer: Layer, names: Sequence[str], x: Tensor, state: Sequence[Tensor]) -> Tensor:
    y = call(layer.module, dict(zip(names, state, strict=True)), x)
    if not isinstance(y, Tensor):
        raise Refused(f"it returns a {type(y).__name__}, not one tensor")
    return y


def _apart(y: Tensor, x: Tensor) -> Tensor:
    """`y` in memory of its own, without gaps."""
    view = y is x or y._base is x or y.stride() != dense_strides(y)
    return y.clone() if view else y
