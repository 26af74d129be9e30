"""The only importer of torch's private modules; everything here exists from torch 2.11 on."""

import itertools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._C import _dispatch_has_kernel_for_dispatch_key
from torch._dynamo import config as dynamo_config
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd as dynamo_aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters as dynamo_counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTInput
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

UNBOUNDED = 1 << 48  # elements: more than any tensor has
SIZES = 64  # input sizes for which one model is compiled
NOT_ON_FAKE_TENSORS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
# Without this (torch 2.11; 2.13 has it) the engine holds what it passes to a backward pass until that returns.
TANGENTS_ARE_FREED = hasattr(torch.autograd.Function, "boxed_grads_call")
LOGGING = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")
_frames = itertools.count()


def in_own_frame(
    function: Callable[..., Any],
    backend: str | Callable[..., Any],
    fullgraph: bool = False,
    dynamic: bool | None = False,
) -> Callable[..., Any]:
    """`torch.compile(function)`, one plan for each size, in a frame of its own. (With `dynamic=None`: for any size,
    once sizes have been seen to change.)

    Dynamo looks compilations up, and counts them, by code object. Where models shared one, each call would walk through
    the guards of all others, and a process could not compile more than a limited number of models. Of a model, the
    function is `_call_impl`: a forward that is torch.nn's own would be skipped (`model.compile()` takes a Sequential
    apart for that reason, and compiles what it contains one by one).
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    code = call.__code__.replace(co_name=f"moonwalk_{next(_frames)}")
    frame = FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    return torch.compile(frame, backend=backend, fullgraph=fullgraph, dynamic=dynamic)


def capturing() -> AbstractContextManager[None]:
    """Each size of the inputs is compiled, hooks are seen also when they are set or removed later, and what writes to
    logs is left out of the graph instead of breaking it."""
    silent = dynamo_config.ignore_logging_functions | _logging_methods()
    found: AbstractContextManager[None] = dynamo_config.patch(
        recompile_limit=SIZES,
        accumulated_recompile_limit=4 * SIZES,
        ignore_logging_functions=silent,
        skip_nnmodule_hook_guards=False,
    )
    return found


def _logging_methods() -> set[Callable[..., Any]]:
    """Of all loggers: `warning` and its like, and what libraries add to them (`warning_once`)."""
    return {method for name, method in vars(logging.Logger).items() if name.startswith(LOGGING) and callable(method)}


def is_retained() -> bool:
    """Whether the backward pass that is running leaves its graph to another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def is_composite(operator: OpOverload) -> bool:
    """Whether it is defined by other operators, so that what it returns may be a view though its schema is silent."""
    return _dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")


def depends_on_data(value: Any) -> bool:
    """Whether a size or a number in what a node gives, by its metadata, is only known when the step runs."""
    kinds = (Tensor, SymInt, SymFloat, SymBool)
    return any(free_unbacked_symbols(leaf) for leaf in tree_flatten(value)[0] if isinstance(leaf, kinds))


def largest(size: int | SymInt) -> int | None:
    """The most that a size may come to by what is known of it; None if that is not much."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(bound) if bound.is_finite and bound < UNBOUNDED else None


def global_optimizer_hooks() -> bool:
    """Whether anything is called around the steps of all optimizers."""
    return bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)


__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "BackendCompilerFailed",
    "FailOnRecompileLimitHit",
    "TorchDispatchMode",
    "TorchDynamoException",
    "default_partition",
    "aot_function",
    "depends_on_data",
    "detect_fake_mode",
    "NOT_ON_FAKE_TENSORS",
    "SIZES",
    "TANGENTS_ARE_FREED",
    "capturing",
    "disable_current_modes",
    "InputMutationAOTOutput",
    "PlainAOTInput",
    "dynamo_aot_autograd",
    "dynamo_config",
    "dynamo_counters",
    "functorch_config",
    "fx_graph_cse",
    "global_optimizer_hooks",
    "in_own_frame",
    "is_composite",
    "is_retained",
    "largest",
    "lookup_backend",
    "min_cut_rematerialization_partition",
    "tree_flatten",
    "tree_map",
    "unset_fake_temporarily",
]
