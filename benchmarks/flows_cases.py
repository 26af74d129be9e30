"""Normalizing flows as their libraries come, 32 steps each: what `benchmarks/flows.py` measures.

Every case is a module that returns the loss of a batch, -log p(x) on average. The libraries are imported when a case is
built, so that one that is missing costs only its own cases.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 32


@dataclass(frozen=True)
class Sizes:
    """Steps of the flow, batch, features (or channels), hidden features (or channels), side of an image."""

    steps: int
    batch: int
    features: int
    hidden: int
    side: int


@dataclass(frozen=True)
class Case:
    """`build(sizes)` is the model; `shape(sizes)` that of its batch. `module` must be importable."""

    library: str
    module: str
    build: Callable[[Sizes], nn.Module]
    image: bool
    full: Sizes
    small: Sizes

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.module) is None

    def made(self, scale: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model, its data-dependent initialisation done, and a batch. Seeded."""
        sizes = self.full if scale == "full" else self.small
        torch.manual_seed(0)
        model = self.build(sizes)
        side = (sizes.side, sizes.side) if self.image else ()
        batch = torch.randn(sizes.batch, sizes.features, *side, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(batch)
            stirred(model)
        return model, (batch,)


def stirred(model: nn.Module) -> None:
    """Last layers that start at zero would make every step the identity; trained ones are not."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point() and not parameter.abs().max() > 1e-2:
            fan = parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 / fan**0.5))


class NegativeLogLikelihood(nn.Module):
    """The mean of -log_prob of an nflows flow."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return -self.flow.log_prob(x).mean()


class ForwardKL(nn.Module):
    """The loss of a normflows model."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.forward_kld(x)


class Gaussian(nn.Module):
    """The loss of a FrEIA network, which returns the latent value and the log determinant."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        z, log_determinant = self.flow(x)
        return (0.5 * z.square().flatten(1).sum(1) - log_determinant).mean()


# -- nflows --------------------------------------------------------------------------------------------------------


def nflows_realnvp(sizes: Sizes) -> nn.Module:
    module: Any = importlib.import_module("nflows.flows.realnvp")
    return NegativeLogLikelihood(
        module.SimpleRealNVP(sizes.features, sizes.hidden, num_layers=sizes.steps, num_blocks_per_layer=2)
    )


def _nflows_flow(transforms: list[nn.Module], shape: list[int]) -> nn.Module:
    flows: Any = importlib.import_module("nflows.flows")
    base: Any = importlib.import_module("nflows.transforms.base")
    distributions: Any = importlib.import_module("nflows.distributions.normal")
    return NegativeLogLikelihood(flows.Flow(base.CompositeTransform(transforms), distributions.StandardNormal(shape)))


def nflows_glow(sizes: Sizes) -> nn.Module:
    """Steps of ActNorm, 1x1 convolution and affine coupling."""
    t: Any = importlib.import_module("nflows.transforms")
    nets: Any = importlib.import_module("nflows.nn.nets")
    masks: Any = importlib.import_module("nflows.utils.torchutils")

    def step(index: int) -> list[nn.Module]:
        return [
            t.ActNorm(sizes.features),
            t.OneByOneConvolution(sizes.features),
            t.AffineCouplingTransform(
                masks.create_alternating_binary_mask(sizes.features, even=index % 2 == 0),
                lambda c_in, c_out: nets.ConvResidualNet(c_in, c_out, hidden_channels=sizes.hidden, num_blocks=1),
            ),
        ]

    transforms = [transform for index in range(sizes.steps) for transform in step(index)]
    return _nflows_flow(transforms, [sizes.features, sizes.side, sizes.side])


def nflows_spline(sizes: Sizes) -> nn.Module:
    """Steps of an LU linear layer and a rational-quadratic spline coupling."""
    t: Any = importlib.import_module("nflows.transforms")
    nets: Any = importlib.import_module("nflows.nn.nets")
    masks: Any = importlib.import_module("nflows.utils.torchutils")

    def step(index: int) -> nn.Module:
        coupling = t.PiecewiseRationalQuadraticCouplingTransform(
            masks.create_alternating_binary_mask(sizes.features, even=index % 2 == 0),
            lambda n_in, n_out: nets.ResidualNet(n_in, n_out, hidden_features=sizes.hidden, num_blocks=1),
            num_bins=8,
            tails="linear",
            tail_bound=3.0,
        )
        return t.CompositeTransform([t.LULinear(sizes.features), coupling])

    return _nflows_flow([step(index) for index in range(sizes.steps)], [sizes.features])


# -- normflows -----------------------------------------------------------------------------------------------------


def _normflows(flows: list[nn.Module], shape: Any) -> nn.Module:
    nf: Any = importlib.import_module("normflows")
    return ForwardKL(nf.NormalizingFlow(nf.distributions.DiagGaussian(shape, trainable=False), flows))


def normflows_realnvp(sizes: Sizes) -> nn.Module:
    """Masked affine flows: b z + (1 - b) (z exp(s(b z)) + t(b z))."""
    nf: Any = importlib.import_module("normflows")
    mask = torch.tensor([1.0 if i % 2 == 0 else 0.0 for i in range(sizes.features)])

    def net() -> nn.Module:
        return nf.nets.MLP([sizes.features, sizes.hidden, sizes.hidden, sizes.features], init_zeros=True)

    flows = [
        nf.flows.MaskedAffineFlow(mask if index % 2 == 0 else 1 - mask, net(), net()) for index in range(sizes.steps)
    ]
    return _normflows(flows, sizes.features)


def normflows_glow(sizes: Sizes) -> nn.Module:
    nf: Any = importlib.import_module("normflows")
    blocks = [nf.flows.GlowBlock(sizes.features, sizes.hidden) for _ in range(sizes.steps)]
    return _normflows(blocks, (sizes.features, sizes.side, sizes.side))


def normflows_spline(sizes: Sizes) -> nn.Module:
    nf: Any = importlib.import_module("normflows")

    def step(index: int) -> list[nn.Module]:
        spline = nf.flows.CoupledRationalQuadraticSpline
        return [
            spline(sizes.features, 1, sizes.hidden, reverse_mask=index % 2 == 1),
            nf.flows.LULinearPermute(sizes.features),
        ]

    return _normflows([flow for index in range(sizes.steps) for flow in step(index)], sizes.features)


# -- FrEIA ---------------------------------------------------------------------------------------------------------


def _mlp(hidden: int) -> Callable[[int, int], nn.Module]:
    return lambda n_in, n_out: nn.Sequential(
        nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_out)
    )


def _cnn(hidden: int) -> Callable[[int, int], nn.Module]:
    return lambda c_in, c_out: nn.Sequential(
        nn.Conv2d(c_in, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, c_out, 3, padding=1),
    )


def _freia(sizes: Sizes, block: str, image: bool, **settings: Any) -> nn.Module:
    framework: Any = importlib.import_module("FrEIA.framework")
    modules: Any = importlib.import_module("FrEIA.modules")
    side = (sizes.side, sizes.side) if image else ()
    flow = framework.SequenceINN(sizes.features, *side)
    net = _cnn(sizes.hidden) if image else _mlp(sizes.hidden)
    for _ in range(sizes.steps):
        flow.append(getattr(modules, block), subnet_constructor=net, **settings)
    return Gaussian(flow)


def freia_realnvp(sizes: Sizes) -> nn.Module:
    return _freia(sizes, "RNVPCouplingBlock", image=False)


def freia_glow(sizes: Sizes) -> nn.Module:
    """AllInOneBlock: affine coupling, ActNorm and a fixed 1x1 convolution."""
    return _freia(sizes, "AllInOneBlock", image=True, permute_soft=True)


FLAT, IMAGE, SPLINE = Sizes(32, 2048, 32, 64, 0), Sizes(32, 128, 12, 32, 8), Sizes(32, 1024, 16, 32, 0)
SMALL_FLAT, SMALL_IMAGE = Sizes(4, 64, 8, 16, 0), Sizes(4, 4, 4, 8, 4)

CASES = {
    "nflows RealNVP": Case("nflows", "nflows", nflows_realnvp, False, FLAT, SMALL_FLAT),
    "nflows Glow": Case("nflows", "nflows", nflows_glow, True, IMAGE, SMALL_IMAGE),
    "nflows RQ spline": Case("nflows", "nflows", nflows_spline, False, SPLINE, SMALL_FLAT),
    "normflows RealNVP": Case("normflows", "normflows", normflows_realnvp, False, FLAT, SMALL_FLAT),
    "normflows Glow": Case("normflows", "normflows", normflows_glow, True, IMAGE, SMALL_IMAGE),
    "normflows RQ spline": Case("normflows", "normflows", normflows_spline, False, SPLINE, SMALL_FLAT),
    "FrEIA RealNVP": Case("FrEIA", "FrEIA", freia_realnvp, False, FLAT, SMALL_FLAT),
    "FrEIA Glow": Case("FrEIA", "FrEIA", freia_glow, True, IMAGE, SMALL_IMAGE),
}
