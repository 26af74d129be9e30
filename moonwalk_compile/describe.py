"""From what the planner decided to the `Plan` that a user reads: names, reasons, totals."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .options import Options
from .passes.analysis import Analysis
from .passes.emit import Segment as Choice
from .passes.graph import Role, Value
from .passes.inverse import INVERTED
from .passes.liveness import Timeline
from .passes.lower import Half
from .passes.opaque import has_pieces
from .passes.plan import Planner
from .passes.planned import Planned
from .report import Plan, Segment
from .units import format_bytes

Halves = tuple[Half, Half]
FRAME = r"^L\['\w+'\](\.__closure__\[\d+\]\.cell_contents)*(\.__self__)?"  # how Dynamo reaches the model from ours
OUTPUTS_TODO = 'train on the outputs that the loss needs (outputs="loss"), where that is not all of them'
NOTABLE = 0.1  # part of plain's peak from which an output and its gradient are worth a word


def describe(
    analysis: Analysis,
    planner: Planner,
    planned: Planned,
    plain: Planned,
    options: Options,
    halves: Halves | None,
) -> Plan:
    """The public plan. With `halves`, peaks are those of the generated code where it could be read."""
    forward, backward = _timelines(planned, halves)
    return Plan(
        peak_bytes=max(forward.peak, backward.peak),
        plain_peak_bytes=plain.peak,
        time_s=planned.seconds,
        plain_time_s=plain.seconds,
        segments=tuple(_segment(planner, choice) for choice in planned.segments),
        budget_bytes=None if options.budget is None else options.budget.resolve(plain.peak),
        device=analysis.device.name,
        lowering=options.lowering,
        profile=options.profile,
        parameter_bytes=_bytes_of(analysis, "parameter"),
        buffer_bytes=_bytes_of(analysis, "buffer"),
        input_bytes=_bytes_of(analysis, "input"),
        notes=_notes(planner, planned, options),
        timeline=(*forward.during, *backward.during),
        plain_timeline=(*plain.forward.during, *plain.backward.during),
        forward_length=len(forward.during),
        plain_forward_length=len(plain.forward.during),
    )


def _timelines(planned: Planned, halves: Halves | None) -> tuple[Timeline, Timeline]:
    forward, backward = planned.forward, planned.backward
    if halves is not None:
        forward, backward = halves[0].timeline or forward, halves[1].timeline or backward
    return forward, backward


def _bytes_of(analysis: Analysis, role: Role) -> int:
    values = (analysis.graph.values[value] for value in analysis.graph.primals)
    return sum({value.storage: value.bytes for value in values if value.role == role}.values())


def _notes(planner: Planner, planned: Planned, options: Options) -> tuple[str, ...]:
    notes = []
    if options.budget is not None and options.budget.bytes is not None and options.budget.granted:
        notes.append("the part of plain's peak cannot be met: the budget is what it came to for other inputs")
    if planner.uncertified(planned.segments):
        notes.append("provisional: inversion is certified on real values at the first step, and may then be withdrawn")
    spare = spare_output(planner)
    if spare is not None:
        notes.append(f"an output and its gradient, {format_bytes(spare.bytes)} each, are held: {OUTPUTS_TODO}")
    if has_pieces(planner.analysis.graph):
        notes.append(
            "where sizes depend on data they count as large as they may get, in plain's figures too; what has them is "
            "computed again in the backward pass, whatever is kept"
        )
    return tuple(notes)


def spare_output(planner: Planner) -> Value | None:
    """The gradient of a large output beside one that looks like a loss."""
    graph = planner.analysis.graph
    gradients = [graph.values[value] for value in graph.tangents]
    largest = max(gradients, key=lambda value: value.bytes, default=None)
    if largest is None or all(value.shape for value in gradients) or 2 * largest.bytes < NOTABLE * planner.plain.peak:
        return None
    return largest


def _segment(planner: Planner, choice: Choice) -> Segment:
    analysis, facts = planner.analysis, planner.facts
    blocks = [analysis.blocks[index] for index in choice.span]
    names = [analysis.graph.values[edge.gives[0]].name for block in blocks for edge in block.forward if edge.gives]
    provisional = bool(planner.uncertified([choice]))
    cost = planner.cost_of(choice)
    own = sum(sum(facts.seconds(index)) for index in choice.span)
    error = planner.error_of(choice) if choice.strategy in INVERTED else 0.0
    return Segment(
        name=_name(analysis, choice),
        strategy=choice.strategy,
        first=names[0] if names else "",
        last=names[-1] if names else "",
        kept_bytes=cost.kept if cost else 0,
        time_s=own + (cost.seconds if cost else 0.0),
        error=None if provisional else error,
        reason=_reason(planner, choice),
        blocks=len(blocks),
        provisional=provisional,
    )


def _name(analysis: Analysis, choice: Choice) -> str:
    """The module paths that the segment spans, else the numbers of its blocks."""
    paths = [path for index in choice.span if (path := module_path(analysis, index))]
    if not paths:
        return f"block {choice.first}" if choice.first == choice.last else f"blocks {choice.first}-{choice.last}"
    return paths[0] if paths[0] == paths[-1] else f"{paths[0]} to {paths[-1]}"


def module_path(analysis: Analysis, index: int) -> str:
    """The longest module path that the operations of a block have in common ("blocks.3")."""
    found: list[list[str]] = []
    for edge in analysis.blocks[index].forward:
        node = analysis.capture.nodes.get(edge.gives[0]) if edge.gives else None
        stack = node.meta.get("nn_module_stack") if node is not None else None
        if stack and edge.expensive:
            path, _ = list(stack.values())[-1]
            found.append(_cleaned(path))
    if not found:
        return ""
    common: Sequence[str] = found[0]
    for path in found[1:]:
        common = [a for a, b in zip(common, path, strict=False) if a == b]
    return ".".join(common)


def _cleaned(path: str) -> list[str]:
    """`L['self']._modules['blocks']._modules['3']` -> blocks, 3."""
    parts = re.split(r"[.\[\]']+", re.sub(FRAME, "", path))
    return [part for part in parts if part not in ("", "_modules", "__dict__")]


def _reason(planner: Planner, choice: Choice) -> str:
    if choice.strategy == "invert":
        sides = any(planner.facts.inversion(index).sides for index in range(choice.first, choice.last + 1))
        return f"inputs are solved from outputs{'; sides of kinks kept' if sides else ''}"
    if choice.strategy == "moonwalk":
        return "cotangents are solved in forward order"
    if choice.strategy == "checkpoint":
        obstacle = _obstacle(planner, choice.first)
        how = f"recomputed from its inputs{f' in {len(choice.inner)} pieces' if choice.inner else ''}"
        return f"{how}; {obstacle}" if obstacle else how
    recomputes = planner.recomputed_labels(choice)[:4]
    return f"kept, but for {', '.join(recomputes)}" if recomputes else "fits"


def _obstacle(planner: Planner, index: int) -> str:
    """Why a block is not inverted, for the strategies that were allowed."""
    reasons = []
    for strategy in INVERTED:
        if strategy not in planner.strategies:
            continue
        missing = planner.missing(strategy, index)
        if missing:
            reasons.append(f"no {strategy}: {_blocker(planner, strategy, index, missing)}")
            continue
        certificate = planner.certificates.get((strategy, index))
        if certificate is not None and planner.single_error(strategy, index) > planner.tolerance:
            reasons.append(
                f"no {strategy}: error {planner.single_error(strategy, index):.0e} above {planner.tolerance:.0e}"
            )
        elif certificate is not None and certificate.growth > 1.5:
            reasons.append(f"no {strategy}: error grows {certificate.growth:.1f}x per block")
    return "; ".join(reasons)


def _blocker(planner: Planner, strategy: str, index: int, missing: Sequence[int]) -> str:
    graph = planner.analysis.graph
    if strategy == "moonwalk" and not planner.analysis.blocks[index].cotangents_out:
        return "a sweep cannot start at the model's inputs"
    value: Value = graph.values[missing[0]]
    if not value.name:
        return "nothing to start from"
    readers = [edge.label for edge in graph.uses.get(missing[0], ()) if edge.stage != "backward"]
    return f"no rule gives {value.name}" + (f" back from {readers[0]}" if readers else "")
