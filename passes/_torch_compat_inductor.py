"""The private parts of torch that lowering through Inductor needs, in one place.

Nothing here has behaviour of its own. When a torch release moves one of these names, this file is the one to change.
"""

# The first profiler of torch, which reports allocations and prints nothing; and whether some profiler records.
from torch._C._autograd import _disable_profiler_legacy as stop_profiler
from torch._C._autograd import _enable_profiler_legacy as start_profiler
from torch._C._autograd import _profiler_enabled as profiler_enabled
from torch._C._profiler import ProfilerConfig as ProfilerConfig
from torch._C._profiler import ProfilerState as ProfilerState
from torch._C._profiler import _ExperimentalConfig as ExperimentalConfig

# Lowering runs inside AOTAutograd, whose tracing context describes AOTAutograd's graph, not our pieces.
from torch._guards import TracingContext as TracingContext
from torch._guards import tracing as tracing

# Inductor's process-wide switches; only ever patched for the duration of one call.
from torch._inductor import config as inductor_config

# Asks which arguments of a backward graph may be overwritten (`get_donated_idxs`), and chooses layouts.
from torch._inductor import graph as inductor_graph

# What generated modules call to wait for their kernels, and the search for this processor's vector instructions.
from torch._inductor.async_compile import AsyncCompile as AsyncCompile

# The entry point below AOTAutograd: one graph in, one compiled function out.
from torch._inductor.compile_fx import compile_fx_inner as compile_fx_inner
from torch._inductor.cpu_vec_isa import pick_vec_isa as pick_vec_isa

# The decompositions Inductor's lowerings expect to have been applied.
from torch._inductor.decomposition import select_decomp_table as select_decomp_table

# Passes that torch.compile runs on the joint graph and compile_fx_inner does not: constant folding, attention patterns,
# padding, random operations.
from torch._inductor.fx_passes.joint_graph import joint_graph_passes as joint_graph_passes

# What compile_fx_inner returns for a graph with at least one operation; carries the generated source.
from torch._inductor.output_code import CompiledFxGraph as CompiledFxGraph

# Real implementations behind `extern_kernels.x(...)` in generated code; replayed on fake tensors to learn output sizes.
from torch._inductor.select_algorithm import extern_kernels as extern_kernels

# Inductor's passes read the fake mode from this thread-local handler.
from torch._inductor.virtualized import V as V

# The allocation-free stand-in for tensors.
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

# Callers may run us under a fake or tracing mode of their own.
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

# Results of operations are nested tuples.
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

__all__ = [
    "AsyncCompile",
    "CompiledFxGraph",
    "ExperimentalConfig",
    "FakeTensorMode",
    "ProfilerConfig",
    "ProfilerState",
    "TracingContext",
    "V",
    "compile_fx_inner",
    "disable_current_modes",
    "extern_kernels",
    "inductor_config",
    "inductor_graph",
    "joint_graph_passes",
    "pick_vec_isa",
    "profiler_enabled",
    "select_decomp_table",
    "start_profiler",
    "stop_profiler",
    "tracing",
    "tree_leaves",
    "tree_map",
]
