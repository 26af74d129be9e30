"""Lower one straight-line piece of the rewritten joint graph through Inductor, and say what memory it will use.

`lower` re-traces a piece with Inductor's decompositions, runs the passes that `compile_fx_inner` leaves to its
caller, and compiles. The piece keeps our node order and its outputs keep the strides of their fake values. The memory
profile is read from the generated wrapper (`wrapper_memory`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ._torch_compat_inductor import (
    AsyncCompile,
    CompiledFxGraph,
    FakeTensorMode,
    TracingContext,
    V,
    compile_fx_inner,
    disable_current_modes,
    inductor_config,
    inductor_graph,
    joint_graph_passes,
    pick_vec_isa,
    select_decomp_table,
    tracing,
)
from .layout import CONVOLUTIONS, channels_last, lay_out
from .nodes import is_random
from .wrapper_memory import MemoryEvent, OutputStorage, ProfileUnknown, Workspace, no_workspace, peak, replay, separate

__all__ = [
    "Lowered",
    "MemoryEvent",
    "OutputStorage",
    "ProfileUnknown",
    "kernels_in_background",
    "lower",
    "peak",
    "warm_up",
]


@dataclass(frozen=True)
class Lowered:
    """A compiled piece. `call` takes one list, empties it, and drops each argument after its last use."""

    call: Callable[[list[Any]], Sequence[Any]]
    profile: tuple[MemoryEvent, ...]
    outputs: tuple[OutputStorage, ...]
    source: str


def lower(
    gm: GraphModule,
    *,
    is_backward: bool,
    static_inputs: Sequence[int] = (),
    donated: Sequence[int] = (),
    exact_strides: Sequence[int] | None = None,
    channels_last: bool = False,
    workspace: Workspace = no_workspace,
    profiled: bool = True,
) -> Lowered:
    """Compile `gm` (placeholders carry `meta["val"]`, the output is a flat tuple or list) and profile the result.

    `static_inputs`: arguments at the same address in every call (parameters, buffers). `donated`: arguments of a
    backward piece whose memory nobody reads afterwards, so that results may be written over them. `exact_strides`:
    outputs that must have the strides of their fake values (default: all); Inductor picks the others'
    (`outputs[i].stride` tells). With `channels_last`, convolutions get images in that order, forward and backward, and
    the other outputs get the order that follows from there.
    `workspace`: what operations hold within their call. `profiled=False` skips the reading of the wrapper and leaves
    `profile` and `outputs` empty. Raises `ProfileUnknown`; compile errors are Inductor's own.
    """
    constants = _constants(gm)
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    static = [*static_inputs, *range(len(values), len(values) + len(constants))]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with _isolated(mode, donated, channels_last):
        fakes = [separate(value, mode) for value in (*values, *constants.values())]
        traced = _decompose(gm, list(constants), fakes, mode, exact_strides or (), channels_last)
        _keep_strides(traced, None if channels_last else exact_strides)
        traced.meta["donated"] = list(donated)  # for Inductor's cache key, as below
        compiled = compile_fx_inner(traced, fakes, is_backward=is_backward, static_input_idxs=static)
    if not isinstance(compiled, CompiledFxGraph):
        return _pass_through(traced, list(constants.values()), len(values))
    call = _with_constants(compiled, list(constants.values()))
    if not profiled:
        return Lowered(call, (), (), compiled.source_code)
    events, outputs = replay(compiled.source_code, fakes, compiled.constants or {}, workspace)
    mine = tuple(e for e in events if e.argument is None or e.argument < len(values))
    return Lowered(call, mine, outputs, compiled.source_code)


@functools.cache
def warm_up() -> Future[Any]:
    """Start what Inductor does once per process on a CPU: it compiles test programs to learn the vector instructions,
    and preprocesses its header.

    That takes seconds in which this process only waits, so it begins while the step is still being planned.
    """
    return ThreadPoolExecutor(1).submit(_compile_nothing)


def _compile_nothing() -> None:
    pick_vec_isa()
    AsyncCompile().cpp_pybinding(["float*"], 'extern "C" void kernel(float* nothing) {}')


@contextlib.contextmanager
def kernels_in_background() -> Iterator[None]:
    """Inside, C++ kernels compile in the background while further pieces are lowered; at the end all are there."""
    warm_up().exception()  # an error of the search comes again where it matters
    waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []
    thread, wait = threading.get_ident(), AsyncCompile.wait

    def later(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            waiting.append((compiler, scope))
        else:
            wait(compiler, scope)

    try:
        with patch.object(AsyncCompile, "wait", later):
            yield
    finally:
        for compiler, scope in waiting:
            wait(compiler, scope)


@contextlib.contextmanager
def _isolated(mode: FakeTensorMode, donated: Sequence[int], channels_last: bool) -> Iterator[None]:
    """Hide the surrounding compilation, and fix the switches that the calling convention and the replay rely on.

    AOTAutograd's tracing context would tell Inductor which of *its* backward inputs it may overwrite, and collects the
    output strides of *its* graph; both are wrong for a piece. A context of our own, with a shape environment, is what
    Inductor's graph cache asks for. Which arguments may be overwritten is said where Inductor asks.
    """
    switches = {
        "freezing": False,
        "triton.cudagraphs": False,
        "cpp_wrapper": False,
        "fx_wrapper": False,
        "graph_partition": False,  # one function `call`, no partitions behind a runner
        "memory_planning": False,  # pools would hide frees
        "wrap_inductor_compiled_regions": False,
    }
    context = TracingContext(mode)
    overwritable = patch.object(inductor_graph, "get_donated_idxs", lambda: list(donated))
    layouts = _traced_layouts() if channels_last else contextlib.nullcontext()
    with (
        overwritable,
        layouts,
        tracing(context),
        disable_current_modes(),
        inductor_config.patch(switches),
        torch.no_grad(),
    ):
        yield


@contextlib.contextmanager
def _traced_layouts() -> Iterator[None]:
    """Images stay in the order in which they were traced.

    A graph without a forward convolution is not optimized for layouts: `convolution_backward` then gets images in the
    order of its weight's gradient, which they are copied into. A graph with one has every value of four dimensions
    around it stored channels last, also one whose channels are its last dimension.
    """
    chooser = cast("type[Any]", inductor_graph.GraphLowering)
    with (
        patch.object(chooser, "find_nodes_prefer_channels_last", lambda graph: frozenset()),
        inductor_config.patch(force_layout_optimization=True),
    ):
        yield


def _constants(gm: GraphModule) -> dict[str, torch.Tensor]:
    """Tensor attributes the graph reads, by name. As extra arguments, they are not baked into a cached graph."""
    names = dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))
    found = {name: _attribute(gm, name) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _attribute(gm: GraphModule, name: str) -> Any:
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _channels_last(image: torch.Tensor) -> torch.Tensor:
    return lay_out(image, channels_last(image.shape, image.stride()))


def _as_planned(value: Any, node: Any) -> Any:
    return lay_out(value, node.meta["val"].stride()) if isinstance(value, torch.Tensor) else value


class _Lifted(Interpreter):
    """Runs a graph in its own order, with tensor attributes taken from a table, and convolutions' images laid out."""

    def __init__(self, gm: GraphModule, constants: dict[str, torch.Tensor], channels_last: bool) -> None:
        super().__init__(gm)
        self.constants, self.channels_last = constants, channels_last

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.constants[target] if target in self.constants else super().get_attr(target, args, kwargs)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        """Random numbers that must be eager PyTorch's are drawn in the planned layout: they come in memory's order."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self.channels_last and (images := CONVOLUTIONS.get(n.target)):
            return (*map(_channels_last, args[:images]), *args[images:]), kwargs
        if self.channels_last and inductor_config.fallback_random and is_random(n):
            return tuple(_as_planned(value, node) for value, node in zip(args, n.args, strict=True)), kwargs
        return args, kwargs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A view of an argument that arrives in another layout than was planned may have to be a copy."""
        try:
            return super().call_function(target, args, kwargs)
        except (RuntimeError, ValueError):
            if target not in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                raise
            return super().call_function(torch.ops.aten.reshape.default, args, kwargs)


def _decompose(
    gm: GraphModule,
    constants: list[str],
    fakes: list[Any],
    mode: Any,
    exact: Sequence[int],
    channels_last: bool,
) -> GraphModule:
    """Inductor's dialect of `gm`, with one extra placeholder per constant, ready for `compile_fx_inner`.

    The `exact` outputs get the strides of their fake values, whatever the layouts of the arguments lead to.
    """
    arguments = len(fakes) - len(constants)
    returned = {place: node.meta["val"] for place in exact if isinstance(node := _returned(gm)[place], Node)}
    planned = {place: value.stride() for place, value in returned.items() if isinstance(value, torch.Tensor)}

    def run(*args: Any) -> Any:
        table = dict(zip(constants, args[arguments:], strict=True))
        results = list(_Lifted(gm, table, channels_last).run(*args[:arguments]))
        for place, strides in planned.items():
            results[place] = lay_out(results[place], strides)
        return results

    with mode:
        traced = make_fx(run, decomposition_table=select_decomp_table())(*fakes)
    # An unused random operation (attention counts as one) passes for impure, and would be computed for nothing.
    traced.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    with V.set_fake_mode(mode):
        return joint_graph_passes(traced)


def _keep_strides(traced: GraphModule, exact: Sequence[int] | None) -> None:
    """Tell Inductor which outputs must have the strides they were traced with: by default it may choose any."""
    tensors = [i for i, n in enumerate(_returned(traced)) if isinstance(n, Node)]
    kept = tensors if exact is None else [i for i in tensors if i in exact]
    traced.graph.output_node().meta["user_visible_output_idxs"] = kept
    traced.meta["exact_strides"] = kept  # Inductor's cache key covers the module's meta, but not a node's


def _returned(gm: GraphModule) -> list[Any]:
    (values,) = gm.graph.output_node().args
    return list(cast("Sequence[Any]", values))


def _with_constants(compiled: Any, constants: list[torch.Tensor]) -> Callable[[list[Any]], Sequence[Any]]:
    """`compiled` is boxed already; the constants go on the end of the same list: nothing else holds the arguments."""
    if not constants:
        return compiled

    def call(args: list[Any]) -> Sequence[Any]:
        args.extend(constants)
        return compiled(args)

    return call


def _pass_through(gm: GraphModule, constants: list[torch.Tensor], arguments: int) -> Lowered:
    """A piece without operations: its outputs are its arguments (Inductor hands back an unboxed function for these)."""
    order = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    picks = [order[n] if isinstance(n, Node) else None for n in _returned(gm)]

    def call(args: list[Any]) -> Sequence[Any]:
        given = [*args, *constants]
        args.clear()
        return [None if i is None else given[i] for i in picks]

    dropped = (MemoryEvent(0, i) for i in range(arguments) if i not in picks)
    outputs = (OutputStorage(argument=i if i is not None and i < arguments else None) for i in picks)
    return Lowered(call, tuple(dropped), tuple(outputs), "")
