"""How long an operation takes: a roofline of floating-point operations and bytes moved, against a device table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from ._torch_compat import disable_current_modes, tree_flatten, tree_map
from .bits import PACKING, UNPACKING, pack_bits, unpack_two
from .graph import Edge, Operation
from .opaque import OPAQUE, piece_of
from .trials import Like


@dataclass(frozen=True)
class Device:
    """Peak rates: floating-point operations and bytes per second, and seconds of overhead per call.

    On a GPU `flops` is of numbers of 16 bits; `wider` are the rates for 32 bits in TF32, for 32 bits, and for 64. A
    `clock` says what an operation was measured to take; what it does not know counts by the rates. `fused` says that
    pointwise operations are fused (see `fusion`), and `as_plain` that images are then laid out as plain `torch.compile`
    does (see `layout`). Elements that are packed into bits and unpacked have rates of their own.
    """

    name: str
    flops: float
    bandwidth: float
    overhead: float
    transcendental: float = 1e11  # elements of exp, erf, tanh per second
    random: float = 5e11  # random numbers drawn per second
    packed: float = math.inf  # elements per second
    unpacked: float = math.inf
    bits: float = 0.0  # seconds of overhead of a call that packs or unpacks, beside that of any call
    page: float = 0.0  # seconds per byte of memory that is new to the process, beside what `bandwidth` has of it
    far: float = 0.0  # with `fused`: seconds per byte that waits for the backward pass, beside what operations take
    wider: tuple[float, float, float] | None = None
    datasheet: bool = True
    fused: bool = False
    as_plain: bool = False
    clock: Callable[[Operation, bool], float | None] | None = field(default=None, compare=False, repr=False)

    @property
    def plain(self) -> Device:
        """As plain `torch.compile` uses it."""
        return replace(self, as_plain=True)


def _card(
    name: str, flops: float, wider: tuple[float, float, float], bandwidth: float, transcendental: float
) -> Device:
    """A GPU by its datasheet."""
    return Device(name, flops, 0.8 * bandwidth, 5e-6, transcendental, wider=wider)


# Of the dense rates of datasheets a training step reaches 40 to 60% in 16 bits and in TF32, and 65 to 85% otherwise.
DEVICES: dict[str, Device] = {
    "h200": _card("h200", 400e12, (200e12, 50e12, 50e12), 4.8e12, 5e12),
    "h100": _card("h100", 400e12, (200e12, 50e12, 50e12), 3.35e12, 5e12),
    "a100": _card("a100", 160e12, (80e12, 15e12, 15e12), 2.0e12, 3e12),
    "l4": _card("l4", 60e12, (30e12, 20e12, 0.4e12), 0.3e12, 1e12),
    "rtx4090": _card("rtx4090", 80e12, (40e12, 60e12, 1e12), 1.0e12, 2e12),
    "cuda": _card("cuda", 160e12, (80e12, 15e12, 15e12), 2.0e12, 3e12),
    "cpu": Device("cpu", 1e11, 1e10, 5e-6, 5e8, 2e8, packed=6e9, unpacked=4e9, bits=5e-5),
}

# Elementwise work that arithmetic, not memory, bounds on a CPU: seconds per element relative to GELU.
SPECIAL = {
    **dict.fromkeys("gelu silu exp erf log softplus elu mish sigmoid _softmax _log_softmax".split(), 1.0),
    **dict.fromkeys("silu_backward sigmoid_backward _softmax_backward_data _log_softmax_backward_data".split(), 1.0),
    **dict.fromkeys("native_layer_norm native_layer_norm_backward native_group_norm native_batch_norm".split(), 1.3),
    **dict.fromkeys("gelu_backward tanh_backward elu_backward".split(), 1.8),
    **dict.fromkeys("tanh sin cos pow".split(), 3.0),
    **dict.fromkeys("where masked_fill sort scatter gather".split(), 4.0),
}
# glibc gives allocations of more bytes back when they are freed: each is new to the process, and faults page by page.
# Of what the others take in a step, about this part is.
FRESH, NEW = 32 << 20, 1 / 3
# A CPU draws one number after another, on one core.
RANDOM = set("bernoulli native_dropout rand rand_like randn randn_like randint uniform normal".split())
# Normalizations that go over rows, which stay in the cache, and what goes over whole images for its statistics.
ROWS = {"native_layer_norm", "native_layer_norm_backward"}
ROWS |= {"_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"}
IMAGES = {"native_group_norm", "native_group_norm_backward", "native_batch_norm", "native_batch_norm_backward"}
IMAGES |= {"_native_batch_norm_legit", "_native_batch_norm_legit_functional"}
IMAGES |= {"sum", "mean", "var", "var_mean", "amax", "amin"}
SOLVERS = {
    "inverse": 2.0,
    "linalg_inv_ex": 2.0,
    "linalg_lu_factor_ex": 0.67,
    "linalg_solve_ex": 1.0,
    "linalg_cholesky_ex": 0.33,
}

# On a GPU these go over memory many times, and wait for it to know how many elements are marked.
PASSES = dict.fromkeys(("take_marked", "put_marked"), 15)

# Operators that make several calls, and how many they stand for.
LOOPS: dict[str, Callable[[Sequence[Any]], int]] = {
    "moonwalk_compile::solve_convolution": lambda args: 8 * args[8],
    "moonwalk_compile::solve_residual": lambda args: (args[2].count("\n") + 3) * args[3],
}


def count_flops(node: fx.Node) -> float:
    """Floating-point operations of a call: torch's own registry, and the attention kernels and solvers it lacks."""
    name = base_name(node.target)
    if name in SOLVERS:
        shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        return 8 * SOLVERS[name] * math.prod(shape) * shape[-1]  # fp64, and far from peak rates
    if name.startswith("_scaled_dot_product") and name.endswith("_cpu"):
        query, key = (node.args[i].meta["val"].shape for i in (0, 1))  # type: ignore[union-attr]
        return 4.0 * math.prod(query) * key[-2]
    if name.startswith("_scaled_dot_product") and name.endswith("_cpu_backward"):
        query, key = (node.args[i].meta["val"].shape for i in (1, 2))  # type: ignore[union-attr]
        return 10.0 * math.prod(query) * key[-2]
    if name == "convolution_backward":
        return _gradients_flops(node)
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args, kwargs = tree_map(
        lambda item: item.meta["val"] if isinstance(item, fx.Node) else item, (node.args, dict(node.kwargs))
    )
    return float(formula(*args, **kwargs, out_val=node.meta["val"]))


def _gradients_flops(node: fx.Node) -> float:
    """Each gradient takes what the convolution takes. (torch's registry does not divide the weight's by the groups.)"""
    result, image, weight = (node.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
    wanted: Any = node.args[10]
    windows = math.prod((image if node.args[7] else result).shape[2:]) * image.shape[0]
    return 2.0 * weight.numel() * windows * sum(wanted[:2])


def base_name(target: Any) -> str:
    """`aten.gelu_backward.default` -> `gelu_backward`."""
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(target, "__name__", str(target))


def qualified_name(target: Any) -> str:
    """The base name of an ATen operation; others carry their namespace, so that none passes for a namesake."""
    name, namespace = base_name(target), getattr(target, "namespace", "aten")
    return name if namespace in ("aten", "prims") else f"{namespace}::{name}"


def is_fused(operation: Operation) -> bool:
    """Whether an operation joins a loop with others, where these are fused."""
    name = base_name(operation.target)
    if name in RANDOM:
        return False
    return name in ROWS or name in IMAGES or torch.Tag.pointwise in getattr(operation.target, "tags", ())


def fused_arithmetic(operation: Operation, device: Device) -> float:
    """The seconds for which arithmetic, not memory, holds up a loop."""
    name = base_name(operation.target)
    factor = 0.0 if name in IMAGES else SPECIAL.get(name, 0.0)
    return sum(operation.new) / 4 * factor / device.transcendental


def operation_seconds(operation: Operation, device: Device) -> float:
    if not operation.new:
        return 0.0
    if operation.target is OPAQUE:  # as captured, whatever is done with the graph around it
        inner = (instruction.operation for instruction in piece_of(operation.args).program.instructions)
        return operations_seconds(inner, replace(device, fused=False))
    if device.fused and is_fused(operation):  # of what it reads and writes, about half stays within a loop
        passes = 2 if base_name(operation.target) in IMAGES else 1
        return max(passes * operation.moved / 2 / device.bandwidth, fused_arithmetic(operation, device))
    if device.clock is not None and (measured := device.clock(operation, device.as_plain)) is not None:
        return measured
    name = base_name(operation.target)
    rounds = _rounds(operation)
    arithmetic = operation.flops / product_rate(operation, device) + _row_seconds(operation, device)
    memory = rounds * operation.moved / device.bandwidth * (PASSES.get(name, 1) if device.wider else 1)
    elements = sum(operation.new) / 4
    special = elements * SPECIAL.get(name, 0.0) / device.transcendental
    drawn = elements / device.random if name in RANDOM else 0.0
    pages = sum(size for size in operation.new if size > FRESH) * device.page
    return rounds * device.overhead + max(arithmetic, memory, special, drawn, _bit_seconds(operation, device)) + pages


def product_rate(operation: Operation, device: Device) -> float:
    """Floating-point operations per second, by the type of the first operand."""
    if device.wider is None or operation.call is None or not operation.flops:
        return device.flops
    in_tf32, single, double = device.wider
    match next((item.dtype for item in tree_flatten(operation.call[1:])[0] if isinstance(item, Like)), None):
        case torch.float64:
            return double
        case torch.float32:
            return max(in_tf32, single) if _uses_tf32(operation) else single
    return device.flops


def _uses_tf32(operation: Operation) -> bool:
    """By the switches of this process; those of cuDNN and of cuBLAS differ by default."""
    if "convolution" in base_name(operation.target):
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _row_seconds(operation: Operation, device: Device) -> float:
    """A GPU eliminates one row after another, half a call's overhead each."""
    if device.wider is None or base_name(operation.target) not in SOLVERS or operation.call is None:
        return 0.0
    matrix = next(item for item in tree_flatten(operation.call[1:])[0] if isinstance(item, Like))
    return matrix.size[-1] * device.overhead / 2


def _bit_seconds(operation: Operation, device: Device) -> float:
    """For elements that go into bits, or come from them."""
    if operation.target in PACKING:
        return device.bits + 8 * sum(operation.new) / device.packed
    if operation.target in UNPACKING:
        bits = 1 if operation.target is unpack_two.default else 2  # of two, one is looked at and rarely read
        return device.bits + 8 * (operation.moved - sum(operation.new)) / bits / device.unpacked
    return 0.0


def _rounds(operation: Operation) -> int:
    """How many calls a call stands for."""
    calls = LOOPS.get(qualified_name(operation.target))
    return calls(operation.args) if calls is not None else 1


def operations_seconds(operations: Iterable[Operation], device: Device) -> float:
    return sum(operation_seconds(operation, device) for operation in operations)


def edge_seconds(edge: Edge, device: Device) -> float:
    return operations_seconds(edge.operations, device)


def _seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    function()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


@cache
def calibrate_cpu() -> Device:
    """Measure this machine in about a quarter of a second: products, copies, GELU, random numbers, bits, calls."""
    with disable_current_modes(), torch.random.fork_rng(devices=[]):
        return _calibrate()


def _calibrate() -> Device:
    matrix = torch.randn(768, 768)
    large: Tensor = torch.randn(10 << 20)  # of more bytes than FRESH
    medium = torch.randn(1 << 18)
    small = torch.randn(8)
    product = _seconds(lambda: matrix @ matrix)
    out = torch.empty_like(large)
    reused = _seconds(lambda: torch.add(large, 1.0, out=out))
    fresh = _seconds(lambda: large + 1.0)
    curved = large[: 1 << 22]
    special = _seconds(lambda: torch.ops.aten.gelu.out(curved, out=out[: 1 << 22]))
    drawn = _seconds(lambda: torch.native_dropout(medium, 0.5, True))
    call = _seconds(lambda: [small + 1.0 for _ in range(100)]) / 100
    mask = medium > 0
    bits = pack_bits(mask)
    packed = _seconds(lambda: pack_bits(mask))
    unpacked = _seconds(lambda: unpack_two(bits, [mask.numel()], 1.0, 0.0, torch.bool))
    few = _seconds(lambda: unpack_two(pack_bits(mask[:8]), [8], 1.0, 0.0, torch.bool)) / 2
    bandwidth = 8 * large.numel() / ((1 - NEW) * reused + NEW * fresh)
    return Device(
        "cpu",
        flops=2 * 768**3 / product,
        bandwidth=bandwidth,
        overhead=call,
        transcendental=curved.numel() / special,
        random=1.25 * medium.numel() / drawn,  # the mask is counted with the numbers
        packed=mask.numel() / max(packed - few, packed / 2),
        unpacked=mask.numel() / max(unpacked - few, unpacked / 2),
        bits=few,
        # Fused loops and convolutions mostly find what they read in the cache, as when they were timed. What waits goes
        # to memory meanwhile and comes back. Loops are charged for that already, so it counts as one way.
        far=1 / bandwidth,
        page=max(0.0, (1 - NEW) * (fresh - reused) / (4 * large.numel())),
        datasheet=False,
    )


def find_device(name: str) -> Device:
    """The device table for `name`; this CPU is measured, the others come from their datasheets."""
    return calibrate_cpu() if name == "cpu" else DEVICES[name]
