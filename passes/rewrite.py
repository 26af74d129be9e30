"""Programs as FX graph modules, with the calling convention of AOTAutograd's two halves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .analysis import Analysis
from .emit import Schedule
from .graph import map_refs
from .program import Instruction, Program


def to_module(
    analysis: Analysis, program: Program, root: torch.nn.Module, name: str, fakes: Mapping[int, Any] | None = None
) -> fx.GraphModule:
    """Build the straight-line FX module of a program. Node names are those of the joint graph, made unique by FX.

    `fakes` are the fake tensors of input slots whose layout is not that of the value they stand for.
    """
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    for slot, value in program.inputs:
        node = graph.placeholder(_input_name(analysis, value))
        node.meta["val"] = (fakes or {}).get(slot, analysis.fakes[value])
        nodes[slot] = node
    for instruction in program.instructions:
        nodes[instruction.slot] = _add_instruction(analysis, graph, nodes, instruction)
    graph.output(map_refs(tuple(program.outputs), lambda ref: nodes[ref.slot]))
    module = fx.GraphModule(root, graph, name)
    module.meta["moonwalk"] = name
    return module


def _input_name(analysis: Analysis, value: int) -> str:
    item = analysis.graph.values[value]
    return item.name if item.role != "tangent" or item.name.startswith("tangents") else f"tangents_{item.name}"


def _add_instruction(
    analysis: Analysis, graph: fx.Graph, nodes: Mapping[int, fx.Node], instruction: Instruction
) -> fx.Node:
    operation = instruction.operation
    args, kwargs = instruction.arguments(nodes.__getitem__)
    if isinstance(operation.target, str):
        node = graph.get_attr(operation.target)
    else:
        node = graph.call_function(operation.target, args, kwargs)
    if instruction.value is not None:
        original = analysis.capture.nodes.get(instruction.value)
        node.meta["val"] = analysis.fakes[instruction.value]
        if original is not None:
            node.meta.update({k: v for k, v in original.meta.items() if k in ("stack_trace", "seq_nr", "tensor_meta")})
    node.meta["block"] = instruction.block
    return node


def to_halves(analysis: Analysis, schedule: Schedule, root: torch.nn.Module) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward module (outputs, then what is kept) and the backward module (what is kept, then tangents)."""
    forward = to_module(analysis, schedule.forward, root, "MoonwalkForward")
    gradients = schedule.backward.outputs[: len(analysis.graph.gradients)]
    backward = to_module(analysis, replace(schedule.backward, outputs=gradients), root, "MoonwalkBackward")
    return forward, backward
