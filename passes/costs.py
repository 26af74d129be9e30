"""What a segment costs: bytes kept, peaks of its forward and backward pass, and the time it adds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .analysis import Analysis
from .bits import PACKING
from .blocks import Block
from .cost import base_name, operation_seconds
from .emit import BackwardEmitter, ForwardEmitter, Segment, Unreachable, kept_whole
from .fusion import program_seconds
from .graph import Edge, Ref
from .program import Program
from .reuse import simulated
from .solutions import Facts, waiting_seconds


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds of a segment taken alone.

    `own` are the bytes kept apart from those shared with the border before it (`border_in`); `covers_out` says that
    everything alive at its far border is kept too. `forward_peak` and `backward_peak` include what it keeps;
    `fragments` are the bytes that wait within the backward pass, between the spine and the sweep.
    """

    own: int
    border_in: int
    covers_in: bool
    covers_out: bool
    forward_peak: int
    backward_peak: int
    seconds: float
    fragments: int = 0

    @property
    def kept(self) -> int:
        return self.own + self.border_in


def backward_program(facts: Facts, segment: Segment) -> Program:
    """The segment's backward pass alone: from its output cotangents to its input cotangents and gradients."""
    blocks = facts.analysis.blocks
    first, last = blocks[segment.first], blocks[segment.last]
    given = {*last.cotangents_in, *(last.live_out if segment.strategy == "invert" else ())}
    outputs = set(facts.analysis.graph.output_values)
    emitter = BackwardEmitter(facts, segment.kept, given | outputs, segment.span, whole=kept_whole([segment]))
    emitter.run(segment)
    passing = facts.passing(segment.span)
    gradients = [value for index in segment.span for value in facts.gradients(index)]
    leaving = [value for value in (*first.cotangents_out, *gradients) if value not in passing]
    emitter.ensure(leaving, segment.first)
    slots = dict.fromkeys(emitter.builder.environment[value] for value in leaving)
    first_inputs = [value for value in last.cotangents_in if value in emitter.given and value not in passing]
    return emitter.builder.finish([Ref(slot) for slot in slots], first_inputs)


def forward_program(facts: Facts, segment: Segment, handed: Iterable[int]) -> Program:
    """The segment's forward pass alone, with what it hands to the backward pass."""
    analysis = facts.analysis
    handed = list(handed)
    emitter = ForwardEmitter(analysis, handed)
    blocks = [analysis.blocks[index] for index in segment.span]
    passing = facts.passing(segment.span)
    inputs = [value for value in blocks[0].live_in if value not in passing]
    for value in inputs:
        emitter.builder.input(value)
    emitter.run((edge for block in blocks for edge in block.forward), analysis.block_of)
    leaving = [v for v in (*blocks[-1].live_out, *handed) if v in emitter.builder.environment]
    return emitter.builder.finish([Ref(emitter.builder.environment[v]) for v in leaving], inputs)


def segment_cost(facts: Facts, segment: Segment) -> Cost | None:
    """Simulate the segment alone; None when its backward pass cannot be emitted.

    What only passes through is left out (see `with_passing`): segments that differ in that alone cost the same.
    """
    analysis, passing = facts.analysis, facts.passing(segment.span)
    try:
        backward = backward_program(facts, segment)
    except Unreachable:
        return None
    cotangents = set(analysis.blocks[segment.last].cotangents_in)
    border = set(analysis.blocks[segment.last].live_out) if segment.strategy == "invert" else set()
    handed = [value for _, value in backward.inputs if value not in cotangents and value not in border - segment.kept]
    forward = forward_program(facts, segment, handed)
    charges = analysis.charges
    live_in = storages(analysis, {*analysis.blocks[segment.first].live_in} - passing)
    live_out = storages(analysis, {*analysis.blocks[segment.last].live_out} - passing)
    kept = {charges[value] for value in handed if charges[value][1]}
    return Cost(
        own=sum(size for storage, size in kept if storage not in live_in),
        border_in=sum(size for storage, size in kept if storage in live_in),
        covers_in=live_in <= {storage for storage, _ in kept},
        covers_out=bool(live_out) and live_out <= {storage for storage, _ in kept},
        forward_peak=simulated(facts, forward).peak,
        backward_peak=simulated(facts, backward).peak,
        seconds=program_seconds(backward, analysis.graph, analysis.device)
        + waiting_seconds(analysis, handed)
        + _handed_on_seconds(facts, segment, backward)
        + _packing_seconds(facts, forward)
        - sum(facts.seconds(index)[1] for index in segment.span),
        fragments=_fragment_bytes(facts, segment),
    )


def _handed_on_seconds(facts: Facts, segment: Segment, backward: Program) -> float:
    """What a moonwalk segment computes again for the block behind it, if that belongs to the same chain."""
    if segment.strategy != "moonwalk":
        return 0.0
    there = {instruction.value for instruction in backward.instructions}
    solution = facts.sweep(segment.last)
    edges = solution.program(facts.analysis.blocks[segment.last].live_out)
    return sum(edge.seconds for edge in edges if not there.issuperset(edge.gives))


def _packing_seconds(facts: Facts, forward: Program) -> float:
    """What the forward pass of a segment takes to pack what is kept as bits, which no block does by itself."""
    return sum(
        operation_seconds(instruction.operation, facts.analysis.device)
        for instruction in forward.instructions
        if instruction.operation.target in PACKING
    )


def _fragment_bytes(facts: Facts, segment: Segment) -> int:
    if segment.strategy != "moonwalk":
        return 0
    values = facts.analysis.graph.values
    return sum(values[value].bytes for index in segment.span for value in facts.spine(index).fragments)


def with_passing(facts: Facts, segment: Segment, cost: Cost) -> Cost:
    """The cost where it stands: what passes through is alive meanwhile, and is not kept by this segment."""
    passing = facts.passing(segment.span)
    if not passing:
        return cost
    values, charges = facts.analysis.graph.values, facts.analysis.charges
    forward = sum(size for _, size in {charges[v] for v in passing if values[v].stage != "backward"})
    backward = sum(size for _, size in {charges[v] for v in passing if values[v].stage == "backward"})
    return replace(
        cost,
        covers_in=cost.covers_in and not forward,
        covers_out=cost.covers_out and not forward,
        forward_peak=cost.forward_peak + forward,
        backward_peak=cost.backward_peak + backward,
    )


def storages(analysis: Analysis, values: Iterable[int]) -> set[int]:
    return {analysis.charges[value][0] for value in values if analysis.charges[value][1]}


WHERE = {"select", "slice", "select_backward", "slice_backward"}  # their constants say where, which costs nothing


def signature(facts: Facts, block: Block) -> tuple[object, tuple[int, ...]]:
    """What makes two blocks the same to the planner, and the block's values in the order of that description."""
    analysis, passing = facts.analysis, facts.passing([block.index])
    order: dict[int, int] = {}
    values = analysis.graph.values

    def local(value: int) -> tuple[object, ...]:
        known = value in order
        position = order.setdefault(value, len(order))
        if known:
            return (position,)
        item = values[value]
        return (position, item.shape, item.dtype, item.role, value in analysis.graph.static)

    def edge_key(edge: Edge) -> object:
        constants = tuple(
            (str(op.target), op.new) if base_name(op.target) in WHERE else op.text for op in edge.operations
        )
        return (constants, tuple(map(local, edge.needs)), tuple(map(local, edge.gives)), edge.random)

    parts = (
        block.forward,
        block.late,
        block.backward,
        analysis.inverse[block.index],
        analysis.vijp[block.index],
        analysis.shortcuts[block.index],
        analysis.fragments[block.index],
    )
    description = tuple(tuple(edge_key(edge) for edge in part) for part in parts)
    for value in list(order):
        if value in analysis.packs:
            local(analysis.packs[value].kept)
    for pack in analysis.signs[block.index]:
        local(pack.kept)
    borders = (
        block.live_in,
        block.live_out,
        block.demanded,
        block.cotangents_in,
        block.cotangents_out,
        block.gradients,
        facts.gradients(block.index),
    )
    crossing = tuple(tuple(local(v) for v in border if v not in passing) for border in borders)
    return (description, crossing), tuple(order)
