"""Lowering through Inductor: same values, arguments freed early, and a predicted peak that equals the measured one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module, aot_module_simplified, default_partition, make_boxed_func
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.choice import LoweredPlan
from moonwalk_compile.passes import inductor
from moonwalk_compile.passes.inductor import Lowered, MemoryEvent, OutputStorage, ProfileUnknown, lower, peak
from moonwalk_compile.passes.planned import Planned
from moonwalk_compile.passes.workspace import measured_workspace
from moonwalk_compile.passes.wrapper_memory import replay
from moonwalk_compile.session import Session


class Mlp(nn.Module):
    def __init__(self, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), self.dropout)


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.norm(self.conv(x)))))


class Attention(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (256, 64)),
    "dropout": (lambda: Mlp(dropout=0.1), (256, 64)),
    "conv": (ConvBlock, (4, 16, 24, 24)),
    "attention": (Attention, (4, 64, 64)),
}


def halves(model: nn.Module, x: Tensor) -> dict[str, tuple[GraphModule, list[Any]]]:
    """Forward and backward graphs as AOTAutograd's default partition makes them (undecomposed), with real arguments."""
    seen: dict[str, tuple[GraphModule, list[Any]]] = {}

    def record(name: str) -> Callable[..., Any]:
        def compiler(gm: GraphModule, _: Any) -> Any:
            def run(*args: Any) -> Any:
                seen[name] = (gm, [a.detach() for a in args])
                return gm(*args)

            return make_boxed_func(run)

        return compiler

    compiled = aot_module(model, record("forward"), record("backward"), partition_fn=default_partition)
    compiled(x).square().sum().backward()
    return seen


def measured_peak(lowered: Lowered, args: list[Any]) -> int:
    """Most bytes alive, from the allocator's own events; copies of the arguments are held by the list only."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = lowered.call(fresh(args))  # the profiler ignores the end of what began before it
    del out
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


def fresh(args: list[Any]) -> list[Any]:
    """Copies with the same strides, each with a storage of its own."""
    return [a.new_empty(0).set_(a.untyped_storage().clone(), a.storage_offset(), a.size(), a.stride()) for a in args]


def sizes(args: list[Any]) -> list[int]:
    return [a.untyped_storage().nbytes() for a in args]


def traced(function: Callable[..., Any], *args: Tensor) -> GraphModule:
    """A graph of ATen operations with fake values on its placeholders."""
    return make_fx(function, tracing_mode="fake")(*args)


@pytest.mark.parametrize("name", MODELS)
def test_values_strides_and_peak(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    for half, (gm, args) in halves(make(), torch.randn(shape, requires_grad=True)).items():
        lowered = lower(gm, is_backward=half == "backward", workspace=measured_workspace)
        got, want = lowered.call(fresh(args)), gm(*fresh(args))
        assert [None if g is None else g.stride() for g in got] == [None if w is None else w.stride() for w in want]
        if name != "dropout" or half == "backward":
            torch.testing.assert_close(list(got), list(want), rtol=1e-3, atol=1e-4)
        assert peak(lowered.profile, sizes(args)) == measured_peak(lowered, args)


def test_outputs_account_for_what_is_left() -> None:
    gm, args = halves(Mlp(), torch.randn(256, 64, requires_grad=True))["forward"]
    lowered = lower(gm, is_backward=False)
    dropped = {e.argument for e in lowered.profile if e.argument is not None}
    returned = {o.argument for o in lowered.outputs if o.argument is not None}
    assert dropped | returned == set(range(len(args))) and not dropped & returned
    assert sum(e.bytes for e in lowered.profile) == sum(o.bytes for o in lowered.outputs)
    for output, value in zip(lowered.outputs, lowered.call(fresh(args)), strict=True):
        assert output.stride == value.stride()
        assert output.argument is not None or output.output is not None or output.bytes == value.nbytes


def test_an_argument_is_freed_before_the_call_ends() -> None:
    """The first argument is dead when the second matmul starts, and must be gone by then."""
    a, w = torch.randn(64, 64), torch.randn(64, 64)
    lowered = lower(traced(lambda x, y: ((x @ y) @ y,), a, w), is_backward=False)
    order = [e for e in lowered.profile if e.argument == 0 or e.bytes]
    assert order[1] == MemoryEvent(0, 0), "dropped between the first allocation and the second"
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        args = [a.clone(), w.clone()]
        alive = weakref.ref(args[0])
        out = lowered.call(args)
    assert args == [] and alive() is None
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() // a.nbytes for e in sorted(events, key=lambda e: e.start_ns())]
    assert changes[:5] == [1, 1, 1, -1, 1], "two clones, first product, first argument freed, second product"
    assert len(out) == 1


def test_kept_dropout_mask_is_the_one_that_was_applied() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.native_dropout.default(x, 0.5, True)

    lowered = lower(traced(forward, torch.ones(64, 64)), is_backward=False)
    y, mask = lowered.call([torch.ones(64, 64)])
    assert torch.equal(y != 0, mask) and 0.4 < mask.float().mean() < 0.6
    assert not torch.equal(lowered.call([torch.ones(64, 64)])[1], mask)


def test_unused_random_operation_is_not_computed() -> None:
    gm = halves(Attention(), torch.randn(4, 64, 64, requires_grad=True))["backward"][0]
    assert "flash_attention_for_cpu.default" not in lower(gm, is_backward=True).source


def test_constants_are_arguments_of_the_compiled_graph() -> None:
    def scaled(scale: float) -> GraphModule:
        root = nn.Module()
        root.register_buffer("scale", torch.full((8,), scale))
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["val"] = traced(lambda x: x, torch.ones(8)).graph.find_nodes(op="placeholder")[0].meta["val"]
        graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr("scale"))),))
        return GraphModule(root, graph)

    for scale in (2.0, 3.0):
        lowered = lower(scaled(scale), is_backward=False)
        assert torch.equal(lowered.call([torch.ones(8)])[0], torch.full((8,), scale))
        assert lowered.profile == (MemoryEvent(32), MemoryEvent(0, 0))


def test_buffers_are_updated_in_place() -> None:
    x, mean = torch.randn(8, 4), torch.zeros(4)
    gm = traced(lambda x, mean: (x * 2, mean.copy_(x.mean(0)))[:1], x, mean)
    lowered = lower(gm, is_backward=False, static_inputs=[1])
    lowered.call([x, mean])
    torch.testing.assert_close(mean, x.mean(0))


def test_a_piece_without_operations() -> None:
    a, b = torch.ones(4), torch.zeros(4)
    lowered = lower(traced(lambda a, b: (b, None, b), a, b), is_backward=True)
    args = [a, b]
    out = lowered.call(args)
    assert args == [] and out[0] is b and out[1] is None and out[2] is b
    assert lowered.profile == (MemoryEvent(0, 0),)
    assert lowered.outputs[1] == OutputStorage()


def test_views_of_arguments_and_repeated_outputs() -> None:
    x = torch.ones(4, 8)
    lowered = lower(traced(lambda x: (x.t(), y := x + 1, y, y.view(-1)), x), is_backward=False)
    assert [(o.bytes, o.argument, o.output) for o in lowered.outputs] == [
        (0, 0, None),
        (128, None, None),
        (0, None, 1),
        (0, None, 1),
    ]
    assert lowered.profile == (MemoryEvent(128),)


def test_free_strides_do_not_share_a_cache_entry_with_exact_ones() -> None:
    x, w = torch.randn(2, 8, 16, 16), torch.randn(8, 8, 3, 3)
    gm = traced(lambda x, w: (F.conv2d(x, w),), x, w)
    exact, free = lower(gm, is_backward=False), lower(gm, is_backward=False, exact_strides=[])
    assert exact.outputs[0].stride == F.conv2d(x, w).stride()
    assert free.outputs[0].stride == free.call([x, w])[0].stride() != exact.outputs[0].stride


def test_node_order_survives_retracing() -> None:
    """Recomputed matmuls stay where they were emitted and are not merged with the first computation."""

    def recomputing(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = torch.tanh(x @ w)
        second = first @ w
        again = torch.tanh(x @ w)
        return (second, again @ w.t())

    x, w = torch.randn(32, 32), torch.randn(32, 32)
    lowered = lower(traced(recomputing, x, w), is_backward=True)
    assert lowered.source.count("extern_kernels.mm(") == 4


def test_inside_a_surrounding_compilation() -> None:
    """AOTAutograd describes its own graphs; its donated buffers and output strides must not leak into ours."""
    seen: list[Lowered] = []

    def compiler(backward: bool) -> Callable[..., Any]:
        def compile_half(gm: GraphModule, _: Any) -> Any:
            seen.append(lower(gm, is_backward=backward, workspace=measured_workspace))
            return seen[-1].call

        return compile_half

    def backend(gm: GraphModule, inputs: Any) -> Any:
        halves = {"fw_compiler": compiler(False), "bw_compiler": compiler(True)}
        return aot_module_simplified(gm, inputs, partition_fn=default_partition, **halves)

    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(32, 64)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.compile(model, backend=backend)(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-3, atol=1e-4)
    assert len(seen) == 2


@pytest.mark.parametrize(
    "line",
    ["while True: pass", "mystery(arg0_1)", "buf0[0] = arg0_1", "torch.ops.aten.mm.default(arg0_1, 3)", "del buf9"],
)
def test_an_unknown_statement_is_an_error(line: str) -> None:
    source = f"def call(args):\n    arg0_1, = args\n    args.clear()\n    {line}\n    return (arg0_1, )\n"
    with pytest.raises(ProfileUnknown):
        replay(source, [torch.ones(4)], {})


def test_partial_sums_in_parts_of_a_buffer() -> None:
    """As kernels on a GPU leave those of a weight's gradient."""
    lines = (
        "workspace_0 = empty_strided_cpu((64, ), (1, ), torch.float32)",
        "buf0 = workspace_0[(1) * (2) * (16) : (1 + 1) * (2) * (16)].view(2, 16).sum(dim=0).to(torch.bfloat16)",
        "del workspace_0",
        "return (buf0, )",
    )
    source = "\n    ".join(["def call(args):", "arg0_1, = args", "args.clear()", *lines]) + "\n"
    events, outputs = replay(source, [torch.ones(4)], {})
    assert [event.bytes for event in events if event.argument is None] == [256, 64, 32, -64, -256]
    assert outputs[0].bytes == 32


def test_what_code_checks_and_aligns_costs_no_memory() -> None:
    """As torch 2.14 writes it: checks of several arguments in one call, and a copy of what is not aligned."""
    source = """
def call(args):
    primals_1, primals_2 = args
    args.clear()
    assert_size_stride_grouped((primals_1, primals_2), ((4, ), (4, )), ((1, ), (1, )), 'input')
    primals_1 = copy_if_misaligned(primals_1)
    assert_tensor_metadata(primals_1, (4, ), (1, ), torch.float32, 'input')
    del primals_2
    return (primals_1, )
"""
    events, outputs = replay(source, [torch.ones(4), torch.ones(4)], {})
    assert [(event.bytes, event.argument) for event in events] == [(0, 1)]
    assert [output.argument for output in outputs] == [0]


def test_where_generated_code_is_not_understood_the_step_runs_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> Any:
        raise ProfileUnknown("statement not understood: new")

    monkeypatch.setattr(inductor, "replay", unknown)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(32, 64)
    ours = moonwalk_compile(copy.deepcopy(model), budget="110%")
    with pytest.warns(UserWarning, match="Inductor generated is not known .statement not understood: new.: this step"):
        ours(x).square().sum().backward()
    model(x).square().sum().backward()
    pairs = zip(ours.parameters(), model.parameters(), strict=True)
    assert all(mine.grad.equal(theirs.grad) for mine, theirs in pairs)
    assert ours.plan.peak_bytes <= ours.plan.budget_bytes


def test_peak_counts_arguments_until_they_are_dropped() -> None:
    events = (MemoryEvent(10), MemoryEvent(0, 0), MemoryEvent(20), MemoryEvent(-10))
    assert peak(events, [100]) == 110
    assert peak(events, [0]) == 30
    assert peak(events, [15]) == 30


@pytest.mark.parametrize("donated", [(), (0,)])
def test_a_result_is_written_over_a_donated_argument_only(donated: tuple[int, ...]) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(64, 64)
    graph.output((graph.call_function(torch.ops.aten.sin.default, (x,)),))
    done = lower(GraphModule(nn.Module(), graph), is_backward=True, donated=donated)
    value = torch.randn(64, 64)
    before, address = value.clone(), value.data_ptr()
    (result,) = done.call([value])
    assert torch.allclose(result, before.sin())
    assert (result.data_ptr() == address) == (done.outputs[0].argument == 0) == (donated == (0,))
    assert donated or torch.equal(value, before)


class Chained(nn.Module):
    """Its peak is in a chain of wide operations, of whose results fusion leaves hardly one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.head = nn.Linear(64, 256)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (self.head(x) * 2).sin().exp().sin().exp().sin().mean()


def test_what_fusion_will_save_is_used_by_the_first_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[tuple[int, int]] = []
    original = Session._lowered

    def lowering(session: Session, planned: Planned, limit: float, smallest: bool) -> LoweredPlan:
        found = original(session, planned, limit, smallest)
        lowered.append((planned.peak, found.peak))
        return found

    monkeypatch.setattr(Session, "_lowered", lowering)
    torch._dynamo.reset()
    ours = moonwalk_compile(Chained(), budget="80%")
    ours(torch.randn(512, 64)).backward()
    ((simulated, generated),) = lowered
    assert generated <= ours.plan.budget_bytes < simulated
