"""What derivatives erase, end to end: moonwalk through activations, dropout, gates and pools."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moonwalk_compile import backend, moonwalk_compile
from moonwalk_compile.measure import gradient_error, gradients, measure_step
from moonwalk_compile.passes.analysis import Analysis, analyse
from moonwalk_compile.passes.bits import take_marked
from moonwalk_compile.passes.certify import MOST_GROWTH, Certifier
from moonwalk_compile.passes.cost import DEVICES
from moonwalk_compile.passes.emit import Segment, emit
from moonwalk_compile.passes.graph import refs_in
from moonwalk_compile.passes.interpret import run_edges
from moonwalk_compile.passes.plan import Planner
from moonwalk_compile.passes.rewrite import to_module
from moonwalk_compile.passes.solutions import Facts
from moonwalk_compile.passes.verify import verify
from moonwalk_compile.testing import capture_joint, true_values

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Activation = Callable[[Tensor], Tensor]

# -- a plan that walks wherever it can, whether that pays or not -------------------------------------------------------


def layers(activation: Activation, depth: int = 4) -> Callable[..., Tensor]:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = activation(x @ weight)
        return x

    return function


def images(pool: Activation) -> Callable[..., Tensor]:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for position, weight in enumerate(weights):
            x = F.leaky_relu(F.conv2d(x, weight[:, :, None, None]), 0.7)
            x = pool(x) if position % 2 else x
        return x

    return function


def orthonormal(count: int, width: int) -> list[Tensor]:
    return [torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q for _ in range(count)]


def forced(analysis: Analysis, facts: Facts) -> list[Segment]:
    """One moonwalk segment over all the blocks from the second on that allow it; the others are kept."""
    blocks, walked = analysis.blocks, []
    for block in blocks[1:]:
        possible = not facts.spine(block.index).missing and not facts.sweep(block.index).missing
        if not possible or not block.cotangents_out:
            break
        walked.append(block.index)
    segments = [Segment(b.index, b.index, "keep", frozenset(b.demanded)) for b in blocks if b.index not in walked]
    if walked:
        residuals = {value for index in walked for value in facts.spine(index).residuals}
        drawn = {v for i in walked for e in (*blocks[i].forward, *blocks[i].late) if e.random for v in e.gives[1:]}
        kept = frozenset(blocks[walked[0]].live_in) | residuals | drawn
        segments.insert(1, Segment(walked[0], walked[-1], "moonwalk", kept))
    return segments


def run_step(analysis: Analysis, segments: list[Segment], truth: dict[int, Any]) -> dict[int, Tensor]:
    """The gradients by value, of the programs that are emitted for these segments."""
    graph, schedule = analysis.graph, emit(Facts(analysis), segments)
    verify(analysis, schedule)
    forward, backward = (to_module(analysis, p, nn.Module(), "Half") for p in (schedule.forward, schedule.backward))
    torch.manual_seed(1)
    with torch.no_grad():
        results = forward(*(truth[value] for _, value in schedule.forward.inputs))
        handed = dict(zip(schedule.kept, results[len(graph.outputs) :], strict=True))
        given = {**{value: truth[value] for value in graph.tangents}, **handed}
        found = backward(*(given[value] for _, value in schedule.backward.inputs))
    return {ref.slot: found[i] for i, item in enumerate(graph.gradients) for ref in refs_in(item)}


ELEMENTWISE: dict[str, Activation] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "selu": F.selu,
    "softsign": F.softsign,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, x.new_full([1], 0.25)),
    "hardswish": F.hardswish,
    "sin": torch.sin,
    "swish by hand": lambda x: x * torch.sigmoid(1.5 * x),
    "clamp": lambda x: x.clamp(-1, 1),
    "dropout": lambda x: F.dropout(torch.relu(x), 0.3),
}
POOLS: dict[str, Activation] = {
    "average": lambda x: F.avg_pool2d(x, 2),
    "average, padded": lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 2),
    "maximum, overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2)),
}
WHOLE = ("average", "average, padded", "maximum", "adaptive")  # nothing is erased
STEPS = {
    **{name: (layers(function), (64, 16)) for name, function in ELEMENTWISE.items()},
    **{name: (images(function), (2, 16, 8, 8)) for name, function in POOLS.items()},
}


@pytest.mark.parametrize("name", STEPS)
def test_the_cotangents_of_a_walk_are_right(name: str):
    function, shape = STEPS[name]
    torch.manual_seed(0)
    arguments = [torch.randn(shape, dtype=torch.float64), *orthonormal(4, 16)]
    capture = capture_joint(function, arguments)
    graph, values = capture.graph, true_values(capture, arguments)
    given = {value: values[value] for value in (*graph.primals, *graph.tangents)}
    torch.manual_seed(1)
    truth = run_edges(graph.edges, given)
    analysis = analyse(capture, DEVICES["cpu"])
    facts = Facts(analysis)
    segments = forced(analysis, facts)
    walked = [segment for segment in segments if segment.strategy == "moonwalk"]
    assert [segment.span for segment in walked] == [range(1, 4)]
    assert any(facts.spine(index).fragments for index in range(1, 4)) == (name not in WHOLE)
    for value, found in run_step(analysis, segments, truth).items():
        assert (found - truth[value]).norm() < 1e-8 * truth[value].norm()
    certificates = Certifier(analysis, facts, given).measure(walked)
    assert max(c.growth for c in certificates.values()) < MOST_GROWTH
    assert max(c.local for c in certificates.values()) < 1e-10


def test_sturdy_ways_are_taken_before_fragile_ones():
    """With fragments, tanh's derivative is divided by where it is large; without those of dynamic size, everywhere."""
    arguments = [torch.randn(64, 16, dtype=torch.float64), *orthonormal(4, 16)]
    capture = capture_joint(layers(torch.tanh), arguments)
    for fixed_sizes in (False, True):
        analysis = analyse(capture, DEVICES["cpu"], fixed_sizes=fixed_sizes)
        facts = Facts(analysis)
        assert not facts.sweep(2).missing
        assert bool(facts.spine(2).fragments) != fixed_sizes
        takes = [op for edges in analysis.fragments for edge in edges for op in edge.operations]
        assert any(op.target is take_marked.default for op in takes) != fixed_sizes


# -- plans as users get them -------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """Returns its loss, so that nothing outside the step holds memory."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*parts)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.orthogonal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


def deep(*activations: Callable[[], nn.Module], depth: int = 10) -> Loss:
    return Loss(*(part for _ in range(depth) for part in (nn.Linear(64, 64), *(make() for make in activations))))


def pooled(pool: nn.Module) -> Loss:
    return Loss(*(p for i in range(10) for p in (nn.Conv2d(8, 8, 1), nn.LeakyReLU(0.6), *([pool] if i == 2 else []))))


NETS: dict[str, tuple[Callable[[], Loss], tuple[int, ...]]] = {
    "relu": (lambda: deep(nn.ReLU), (1024, 64)),
    "leaky relu": (lambda: deep(nn.LeakyReLU), (1024, 64)),
    "relu and dropout": (lambda: deep(nn.ReLU, lambda: nn.Dropout(0.2), depth=12), (2048, 64)),
    "average pool": (lambda: pooled(nn.AvgPool2d(2)), (4, 8, 32, 32)),
    "maximum pool": (lambda: pooled(nn.MaxPool2d(2)), (4, 8, 32, 32)),
}


def one_step(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    model(x).backward()
    return gradients(model)


@pytest.mark.parametrize("name", NETS)
def test_nets_are_walked(name: str, monkeypatch: pytest.MonkeyPatch):
    """By fixed rates: on a machine that does much else, those that are measured may speak against it."""
    monkeypatch.setattr(backend, "find_device", lambda name: replace(DEVICES[name], datasheet=False))
    make, shape = NETS[name]
    model, x = make(), torch.randn(shape)
    ours = moonwalk_compile(copy.deepcopy(model), strategies=("moonwalk", "keep"), lowering="eager", max_slowdown=10)
    assert gradient_error(one_step(ours, x), one_step(model, x)) < 1e-5
    assert "moonwalk" in {segment.strategy for segment in ours.plan.segments}, str(ours.plan)
    ours.zero_grad(set_to_none=True)
    measured = measure_step(lambda: ours(x).backward()).peak_bytes
    assert measured == pytest.approx(ours.plan.peak_bytes, rel=0.1)  # fragments are counted by their expected size
    assert measured < 0.8 * ours.plan.plain_peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_generated_code_has_no_fragments_of_dynamic_size(activation: type[nn.Module]):
    model, x = deep(activation, depth=3), torch.randn(256, 64)
    ours = moonwalk_compile(copy.deepcopy(model), strategies=("moonwalk", "keep"), lowering="inductor", max_slowdown=10)
    assert gradient_error(one_step(ours, x), one_step(model, x)) < 1e-5
    assert {segment.strategy for segment in ours.plan.segments} == {"keep"}


def test_the_time_of_a_chain_is_that_of_its_blocks() -> None:
    """Each block of a sweep computes again what the next one reads."""

    def deep(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = (x @ weight).abs()
        return x

    arguments = [torch.randn(256, 64), *(torch.randn(64, 64) for _ in range(24))]
    analysis = analyse(capture_joint(deep, arguments), DEVICES["cpu"])
    planner = Planner(Facts(analysis, reuse=True), ("moonwalk", "checkpoint"), {}, 1e-4)
    walk = min(planner.maker.chains.walks(len(analysis.blocks) - 1), key=lambda move: move.segment.first)
    front = next(move for move in planner.moves[walk.segment.first - 1] if move.segment.first == 0)
    planned = planner.realise([front, walk])
    modelled = planner.plain.seconds + front.cost.seconds + walk.cost.seconds
    assert modelled == pytest.approx(planned.seconds, rel=0.1)  # the packing of signs in the forward pass is left out
