"""The cases of `moonwalk.py`: each returns points (depth, peak, time, error) and what was demanded of them."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from main_job_runs import Variant, describe, returned_loss
from torch import Tensor, nn

from examples import lipschitz, revnet
from moonwalk_compile import moonwalk_compile
from moonwalk_compile.algorithms import ALGORITHMS
from moonwalk_compile.measure import gradient_error, gradients, measure_step, time_interleaved
from moonwalk_compile.step import training_step

PLAIN = "plain"
OURS = "moonwalk_compile"
WITHIN = "moonwalk_compile, at that peak"
MOONWALK_ONLY = {"strategies": ("moonwalk", "checkpoint"), "max_slowdown": 2.0}
INVERT_ONLY = {"strategies": ("invert", "checkpoint", "keep"), "max_slowdown": 2.0}


@dataclass
class Point:
    """One measurement; bytes and seconds of a step, None where it was not taken."""

    case: str
    variant: str
    depth: int
    peak: int | None = None
    gradients: int | None = None
    seconds: float | None = None
    error: float | None = None
    note: str = ""


@dataclass
class Result:
    points: list[Point] = field(default_factory=list)
    verdicts: list[tuple[str, str, bool]] = field(default_factory=list)

    def judge(self, demand: str, found: str, met: bool) -> None:
        self.verdicts.append((demand, found, bool(met)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def maxmin_net(depth: int, full: bool) -> tuple[nn.Module, Sequence[Tensor]]:
    torch.manual_seed(0)
    sizes = {"width": 256, "batch": 8192} if full else {"width": 32, "batch": 256}
    return lipschitz.build(activation="maxmin", layers=depth, **sizes)


def rev_net(depth: int, full: bool, activation: str = "relu") -> tuple[nn.Module, Sequence[Tensor]]:
    """`depth` reversible blocks on digits; branches start small, as deep residual networks are initialised."""
    torch.manual_seed(0)
    sizes = {"channels": 16, "size": 32, "batch": 32} if full else {"channels": 4, "size": 8, "batch": 8}
    model, (x,) = revnet.build(blocks=depth, stages=1, norm="group", activation=activation, **sizes)
    for block in model:
        if isinstance(block, revnet.RevBlock):
            for branch in (block.f, block.g):
                with torch.no_grad():
                    branch[-1].weight.mul_(1 / math.sqrt(2 * depth))
    return model, next(revnet.batches(x))


def gradient_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def measure(
    case: str, name: str, depth: int, variant: Variant, reference: nn.Module | None = None, repeats: int = 3
) -> Point:
    """Peak, the median time of some steps, and the gradients' error against a reference."""
    peak = variant.peak()
    variant.step()
    error = None
    if reference is not None:
        variant.loss(reference, *variant.inputs).backward()
        error = gradient_error(gradients(variant.model), gradients(reference))
        reference.zero_grad(set_to_none=True)
    seconds = time_interleaved({name: variant.step}, repeats=repeats)[name].seconds
    plan = getattr(variant.model, "plan", None)
    note = describe(plan) if plan is not None else ""
    return Point(case, name, depth, peak, gradient_bytes(variant.model), seconds, error, note)


class WithLoss(nn.Module):
    """A net that returns its loss: what the loss allocates is then part of the plan, and of the budget."""

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(self.net, *inputs)


def depth_case(
    case: str, settings: Any, *, build: Callable[..., Any], loss: Callable[..., Tensor], options: dict[str, Any]
) -> Result:
    """How deep a network trains under the peak that plain backpropagation needs for 16 layers.

    At its smallest peak, and last as fast as that peak allows.
    """
    shallow, deep = (16, 320) if settings.full else (4, 16)
    result = Result()
    net, inputs = build(shallow, settings.full)
    rival = Variant(WithLoss(net, loss), returned_loss, inputs)
    plain = measure(case, PLAIN, shallow, rival)
    result.points.append(plain)
    for depth, budget in ((shallow, None), (4 * shallow, None), (deep, None), (deep, plain.peak)):
        net, inputs = build(depth, settings.full)
        base = WithLoss(net, loss)
        model = moonwalk_compile(copy.deepcopy(base), lowering=settings.lowering, budget=budget, **options)
        ours = Variant(model, returned_loss, inputs)
        result.points.append(measure(case, OURS if budget is None else WITHIN, depth, ours, base))
    smallest, last = result.points[-2:]
    timings = time_interleaved({PLAIN: rival.step, OURS: ours.step}, repeats=settings.repeats)
    per_layer = timings[OURS].ratio_to(timings[PLAIN]) * plain.depth / last.depth
    found = f"{deep} layers in {smallest.peak / 2**20:.1f} and {last.peak / 2**20:.1f} of {plain.peak / 2**20:.1f} MiB"
    result.judge(f"{deep} layers under plain's peak of {shallow}", found, max(smallest.peak, last.peak) <= plain.peak)
    result.judge("time per layer <= 1.5 x plain's", f"{per_layer:.2f}", per_layer <= 1.5)
    error = max(smallest.error, last.error)
    result.judge("gradient error <= 1e-4", f"{error:.1e}", error <= 1e-4)
    return result


def constant_case(case: str, settings: Any) -> Result:
    """The peak of a RevNet, its gradients apart, from 16 to 1,000 blocks; without kinks, whose sides would be kept."""
    result = Result()
    for depth in (16, 64, 250, 1000) if settings.full else (4, 8, 16):
        base, inputs = rev_net(depth, settings.full, activation="gelu")
        model = moonwalk_compile(base, lowering=settings.lowering, **INVERT_ONLY)
        result.points.append(measure(case, OURS, depth, Variant(model, revnet.loss, inputs), repeats=1))
    apart = [point.peak - point.gradients for point in result.points]
    found = ", ".join(f"{size / 2**20:.1f}" for size in apart) + " MiB"
    result.judge("peak above gradients constant within 10%", found, max(apart) <= 1.1 * min(apart))
    return result


NOTES = {
    "projected_forward": "an unbiased estimate, from one random direction",
    "moonwalk_pure_forward": "{} products for the input's gradient",
}


def algorithms_case(case: str, settings: Any, *, depth: int, faster: float) -> Result:
    """Every algorithm on one RevNet in double precision; naive forward mode by a part of its products, scaled up."""
    result, chunk = Result(), 16
    base, (x, _) = rev_net(depth, False)
    base, batch = base[:depth].double(), (x.double(), torch.zeros_like(x.double()))  # without the classifier
    elements = sum(p.numel() for p in base.parameters())
    reference = ALGORITHMS["backprop"](base, F.mse_loss, batch)[1]
    for name in [name for name in ALGORITHMS if name != "forward_mode"]:
        run = partial(ALGORITHMS[name], base, F.mse_loss, batch)
        _, found = run()
        repeats = 1 if name == "moonwalk_pure_forward" else settings.repeats
        seconds = time_interleaved({name: run}, repeats=repeats)[name].seconds
        peak = measure_step(run).peak_bytes
        error = gradient_error(found, reference)
        note = NOTES.get(name, "").format(x.numel())
        result.points.append(Point(case, name, depth, peak, gradient_bytes(base), seconds, error, note))
    mixed = next(point.seconds for point in result.points if point.variant == "moonwalk_mixed")
    jvp = _seconds_of_jvps(base, batch, chunk) / chunk
    note = f"{elements} products, {chunk} of them timed"
    result.points.append(Point(case, "forward_mode", depth, seconds=jvp * elements, note=note))
    ratio = jvp * elements / mixed
    result.judge(f"mixed faster than naive forward mode by > {faster:g}", f"{ratio:.0f}", ratio > faster)
    return result


def _seconds_of_jvps(model: nn.Module, batch: tuple[Tensor, Tensor], count: int) -> float:
    """The first `count` jvps of naive forward mode, all at once, which is how it is fastest."""
    names = {name: p.detach() for name, p in model.named_parameters()}
    first = next(iter(names))

    def loss(weight: Tensor) -> Tensor:
        output = torch.func.functional_call(model, {**names, first: weight}, (batch[0],))
        return F.mse_loss(output, batch[1])

    basis = torch.eye(names[first].numel(), dtype=names[first].dtype)
    while len(basis) < count:
        basis = torch.cat([basis, basis])
    directions = basis[:count].reshape(count, *names[first].shape)

    def run() -> None:
        torch.func.vmap(lambda v: torch.func.jvp(loss, (names[first],), (v,))[1])(directions)

    run()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Encoder(nn.Module):
    """A strided convolutional encoder with normalisation and LeakyReLU(0.2), as in a GAN's discriminator."""

    def __init__(self, norm: str, channels: Sequence[int] = (3, 16, 32, 64, 128), size: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, wider in pairwise(channels):
            size //= 2
            make = {
                "batch": lambda c=wider: nn.BatchNorm2d(c),
                "layer": lambda c=wider, s=size: nn.LayerNorm([c, s, s]),
            }
            layers += [nn.Conv2d(width, wider, 4, stride=2, padding=1), make[norm](), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def encoder_case(case: str, settings: Any, *, norm: str) -> Result:
    """Ill-conditioned layers: the plan has to keep the gradients right."""
    torch.manual_seed(0)
    base, inputs = Encoder(norm), (torch.randn(32 if settings.full else 4, 3, 64, 64),)
    result = Result([measure(case, PLAIN, 4, Variant(copy.deepcopy(base), mean_square, inputs))])
    for name, options in ((OURS, {}), ("moonwalk and checkpoint", MOONWALK_ONLY)):
        model = moonwalk_compile(copy.deepcopy(base), lowering=settings.lowering, **options)
        point = measure(case, name, 4, Variant(model, mean_square, inputs), copy.deepcopy(base))
        result.points.append(point)
        result.judge(f"{name}: gradient error <= 1e-4", f"{point.error:.1e}, {point.note}", point.error <= 1e-4)
    return result


def step_case(case: str, settings: Any) -> Result:
    """64 layers and SGD as one program: gradients are used and freed where they are produced."""
    result = Result()
    depth, sizes = (64, {"width": 512, "batch": 512}) if settings.full else (8, {"width": 32, "batch": 32})
    torch.manual_seed(0)
    base, (x,) = lipschitz.build(activation="abs", layers=depth, **sizes)
    target = torch.zeros_like(x)
    options = {"lowering": settings.lowering, "max_slowdown": 2.0}
    for name, rate in (("gradients kept", None), ("SGD in the sweep", 1e-3)):
        model = copy.deepcopy(base)
        optimizer = None if rate is None else torch.optim.SGD(model.parameters(), lr=rate)
        step = training_step(model, F.mse_loss, optimizer, example_inputs=(x, target), **options)
        step(x, target)
        model.zero_grad(set_to_none=True)
        peak = measure_step(partial(step, x, target)).peak_bytes
        result.points.append(Point(case, name, depth, peak, gradient_bytes(model)))
    kept, freed = (point.peak for point in result.points)
    found = f"{kept / 2**20:.1f} and {freed / 2**20:.1f} MiB; gradients {gradient_bytes(base) / 2**20:.1f}"
    result.judge("the whole peak below a quarter of the gradients' bytes", found, 4 * freed <= gradient_bytes(base))
    return result


class Arsinh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)


def drift_case(case: str, settings: Any) -> Result:
    """Adam at a rate that ruins the weights' conditioning: the largest gradient error of any step."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(20):
        linear = nn.Linear(32, 32)
        nn.init.orthogonal_(linear.weight)
        layers += [linear, Arsinh()]
    plain = nn.Sequential(*layers)
    model = moonwalk_compile(copy.deepcopy(plain), strategies=("invert", "keep"), lowering="eager", max_slowdown=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = torch.randn(256, 32), torch.randn(256, 32)
    result, errors, demoted = Result(), [], 0
    for _ in range(60 if settings.full else 10):
        plain.load_state_dict(model.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for each in (model, plain):
                each.zero_grad()
                F.mse_loss(each(x), y).backward()
        demoted += len(caught)
        errors.append(gradient_error(gradients(model), gradients(plain)))
        optimizer.step()
    result.points.append(Point(case, OURS, 20, error=max(errors), note=f"planned again {demoted} times"))
    result.judge("demoted before the error passes 1e-3", f"{max(errors):.1e}", max(errors) <= 1e-3)
    return result


CASES: dict[str, Callable[[str, Any], Result]] = {
    "depth-maxmin": partial(depth_case, build=maxmin_net, loss=mean_square, options=MOONWALK_ONLY),
    "depth-revnet": partial(depth_case, build=rev_net, loss=revnet.loss, options=INVERT_ONLY),
    "constant-revnet": constant_case,
    "algorithms-6": partial(algorithms_case, depth=6, faster=27),
    "algorithms-60": partial(algorithms_case, depth=60, faster=110),
    "encoder-batchnorm": partial(encoder_case, norm="batch"),
    "encoder-layernorm": partial(encoder_case, norm="layer"),
    "training-step": step_case,
    "drift": drift_case,
}

# With a thousand blocks, glibc would keep what they free: many times the memory that the step's tensors hold.
ENVIRONMENT = {"constant-revnet": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
