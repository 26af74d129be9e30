"""The only importer of torch's private modules; everything here exists from torch 2.11 on."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _dispatch_has_kernel_for_dispatch_key
from torch._dynamo import config as dynamo_config
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd as dynamo_aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._dynamo.external_utils import wrap_inline
from torch._dynamo.utils import counters as dynamo_counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Module
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map


def compiled_call(model: Module, backend: str | Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
    """What `torch.compile(model)` calls: through a frame that is not torch.nn's own, whose forward Dynamo skips.

    (`model.compile()` takes a Sequential apart for that reason, and compiles what it contains one by one.)
    """
    return torch.compile(wrap_inline(model._call_impl), backend=backend, fullgraph=fullgraph, dynamic=False)


def is_composite(operator: OpOverload) -> bool:
    """Whether it is defined by other operators, so that what it returns may be a view though its schema is silent."""
    return _dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")


def global_optimizer_hooks() -> bool:
    """Whether anything is called around the steps of all optimizers."""
    return bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)


__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "BackendCompilerFailed",
    "TorchDynamoException",
    "default_partition",
    "aot_function",
    "detect_fake_mode",
    "compiled_call",
    "disable_current_modes",
    "PlainAOTInput",
    "dynamo_aot_autograd",
    "dynamo_config",
    "dynamo_counters",
    "functorch_config",
    "fx_graph_cse",
    "global_optimizer_hooks",
    "is_composite",
    "lookup_backend",
    "make_fx",
    "min_cut_rematerialization_partition",
    "tree_flatten",
    "tree_map",
    "unset_fake_temporarily",
]
