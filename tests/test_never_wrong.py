"""A compiled step gives what eager PyTorch gives: outputs, gradients, buffers; bit by bit where nothing is inverted."""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

from moonwalk_compile import BudgetError, CaptureError, moonwalk_compile
from moonwalk_compile.measure import compare_steps, gradient_error, gradients
from moonwalk_compile.passes import sizes

PLANS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "keep": {"strategies": ("keep",)},
    "checkpoint": {"strategies": ("checkpoint",)},
    "budget": {"strategies": ("keep", "checkpoint"), "budget": "60%"},
    "smallest": {"strategies": ("keep", "checkpoint"), "budget": 1},
    "moonwalk": {"strategies": ("moonwalk", "checkpoint"), "max_slowdown": 2},
    "invert": {"strategies": ("invert", "checkpoint")},
}


DEVICE = os.environ.get("MOONWALK_TEST_DEVICE", "cpu")

pytestmark = pytest.mark.usefixtures("fresh_compiler", "on_device")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models and their inputs are made on the device that is tested (`make test-gpu`)."""
    if DEVICE == "cpu":
        yield
        return
    torch.set_default_device(DEVICE)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    torch.set_default_device(None)


def compiled(model: nn.Module, lowering: str = "eager", **options: Any) -> nn.Module:
    return moonwalk_compile(copy.deepcopy(model), lowering=lowering, **options)


def loss_of(outputs: Any) -> Tensor:
    """A loss whose cotangents are different for every element of every output."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            weight = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
            total = total + (leaf * weight).sum().double()
    return total


@dataclass
class Seen:
    """All that a step leaves behind."""

    outputs: list[Tensor]
    parameters: dict[str, Tensor | None]
    inputs: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def step(model: nn.Module, arguments: tuple[Any, ...], seed: int = 5, **keywords: Any) -> Seen:
    """One training step on copies of the arguments; what requires a gradient among them gets one."""
    copies = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = model(*copies, **keywords)
    loss = loss_of(outputs)
    if loss.requires_grad:
        loss.backward()
    leaves = [leaf.detach().clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    inputs = {str(i): a.grad for i, a in enumerate(copies) if isinstance(a, Tensor) and a.is_leaf}
    return Seen(leaves, gradients(model), inputs, {k: b.detach().clone() for k, b in model.named_buffers()})


def exact(model: nn.Module) -> bool:
    return model.plan is None or all(segment.strategy in ("keep", "checkpoint") for segment in model.plan.segments)


def assert_same(ours: Seen, theirs: Seen, bitwise: bool, tolerance: float = 1e-3) -> None:
    for mine, reference in zip(ours.outputs, theirs.outputs, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (reference.dtype, reference.shape, reference.stride())
        assert mine.equal(reference) if bitwise else torch.allclose(mine, reference, rtol=1e-4, atol=1e-5)
    for name in ("parameters", "inputs"):
        mine, reference = getattr(ours, name), getattr(theirs, name)
        assert {k for k, g in mine.items() if g is None} == {k for k, g in reference.items() if g is None}
        if bitwise:
            unequal = [k for k, g in mine.items() if g is not None and not g.equal(reference[k])]
            assert not unequal, f"{name} {unequal}: error {gradient_error(mine, reference):.1e}"
        else:
            assert gradient_error(mine, reference) < tolerance
    assert ours.buffers.keys() == theirs.buffers.keys()
    for name, buffer in ours.buffers.items():
        assert buffer.equal(theirs.buffers[name]) if bitwise else torch.allclose(buffer, theirs.buffers[name]), name


def check(
    model: nn.Module,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    steps: int = 2,
    lowering: str = "eager",
    bitwise: bool = True,
    **keywords: Any,
) -> nn.Module:
    """Several steps of the compiled model beside the same steps of the model.

    A budget that a tiny model cannot meet becomes the smallest that it can.
    """
    ours = compiled(model, lowering, **options)
    try:
        ours_seen = step(ours, arguments, 0, **keywords)
    except BudgetError as error:
        ours = compiled(model, lowering, **{**options, "budget": error.smallest_peak_bytes})
        ours_seen = step(ours, arguments, 0, **keywords)
    for seed in range(steps):
        ours_seen = step(ours, arguments, seed, **keywords) if seed else ours_seen
        expected = step(model, arguments, seed, **keywords)
        assert_same(ours_seen, expected, bitwise and lowering == "eager" and exact(ours))
    return ours


# -- the models --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Attention(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2, dropout: float = 0.0, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.dropout, self.causal = heads, dropout, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:-1], self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


class ScaledByBuffer(nn.Module):
    """The buffer that the backward pass needs is overwritten after its use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("scale", torch.full((6,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        k = self.scale * 1
        y = torch.sin(self.first(x) * k)
        self.scale.mul_(1.5)
        return torch.sin(self.second(y) * self.scale)


class RunningMean(nn.Module):
    """Reads and overwrites its buffer several times, also through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        before = self.mean.clone()
        self.mean.lerp_(y.detach().mean(0), 0.5)
        self.mean[:2] += 1
        self.steps += 1
        return torch.tanh(y - self.mean) * (before + 2) / self.steps


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


class Partly(nn.Module):
    """One module is never used, one twice, one does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(torch.sin(self.frozen(torch.sigmoid(self.used(x))))))


class Structured(nn.Module):
    """Dicts and tuples, an output that is an input, one that is a view, one without a gradient, a number, None."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(1, 5)

    def forward(self, x: Tensor, y: Tensor, index: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.a(x)) + y
        out = self.b(hidden)
        return {
            "out": out,
            "pair": (hidden, out.view(-1)),
            "input": x,
            "view of input": y[:, :2],
            "picked": self.c(torch.cos(index.float())).gather(1, index),
            "class": out.argmax(1),
            "detached": out.detach() * 2,
            "none": None,
            "number": 3,
        }


class Cell(nn.Module):
    """An LSTM cell unrolled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(5 + 4, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, c = x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4)
        states = []
        for t in range(x.shape[1]):
            i, f, g, o = self.gates(torch.cat((x[:, t], h), 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, 1), c


class Noise(nn.Module):
    """Draws in the middle, by several generators' worth of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        y = y + torch.randn_like(y) * y
        y = y * torch.bernoulli(torch.full_like(y, 0.5))
        y = F.rrelu(self.b(y), training=True)
        return torch.sin(y) * torch.rand(6, device=x.device)


class Functional(nn.Module):
    """In-place operations, slices that are written to, where, max, sort, an activation that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = F.relu(y, inplace=True)
        z = torch.zeros_like(y)
        z[:, ::2] = y[:, ::2] * 2
        z[:, 1::2] = self.b(y)[:, 1::2].exp_()
        values, order = z.sort(1)
        return torch.where(z > 0.5, z, values.cumsum(1)) * order + y.max(1, keepdim=True).values


class Routed(nn.Module):
    """Chooses by one-hot codes, which check their input and give nothing back."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(6, 2), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x)
        chosen = F.one_hot(gates.argmax(1), 2) * gates.softmax(1)
        return chosen[:, :1] * torch.tanh(self.a(x)) + chosen[:, 1:] * self.b(x)


class TwoSigns(nn.Module):
    """Of one value, two backward passes read the sign, each in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x))
        return self.b(x.sign() * x + x.abs())


def transformer(dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, "gelu", batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=4, stride=2, bias=False),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()),
        *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)),
        nn.Linear(6, 6),
    )


def parametrized() -> nn.Module:
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(6, 6)),
        nn.LeakyReLU(0.5),
        parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(6, 6), "weight", "householder"),
    )


def orthogonal_chain() -> nn.Module:
    layers = ((parametrizations.orthogonal(nn.Linear(8, 8)), nn.LeakyReLU(0.5)) for _ in range(4))
    return nn.Sequential(*itertools.chain.from_iterable(layers), nn.Linear(8, 2))


class Couplings(nn.Module):
    """Additive couplings with dropout inside: what `invert` is for, mask and all."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(4, dropout) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for block in self.blocks:
            a, b = b, a + block(b)
        return torch.cat((a, b), -1)


class ComplexCouplings(nn.Module):
    """Affine couplings of complex numbers; their gradients read one view of a stream in several blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(4, 4, dtype=torch.complex64) / 2) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.view_as_complex(x).chunk(2, -1)
        for weight in self.weights:
            shift = b @ weight.T
            factor = torch.exp(torch.complex(torch.tanh(shift.real), F.gelu(shift.imag)))
            a, b = b, a * factor + shift
        return torch.view_as_real(torch.cat((a, b), -1))


def floats(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def lazily(build: Callable[[], nn.Module], *shape: int) -> nn.Module:
    """A model whose lazy parameters have got their shapes (and whose buffers are as new)."""
    model = build().eval()
    model(floats(*shape))
    return model.train()


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "dropout": lambda: (nn.Sequential(*(Block(6, 0.4) for _ in range(3))), (floats(5, 6),)),
    "input gradient": lambda: (nn.Sequential(*(Block(6) for _ in range(3))), (floats(5, 6, grad=True),)),
    "attention": lambda: (nn.Sequential(Attention(), Attention(causal=False)), (floats(2, 5, 8, grad=True),)),
    "attention with dropout": lambda: (nn.Sequential(Attention(dropout=0.3), Block(8)), (floats(2, 5, 8),)),
    "transformer": lambda: (transformer(0.1), (floats(2, 5, 8),)),
    "batch norm": lambda: (normalised(), (floats(7, 6),)),
    "convolutions": lambda: (lazily(convolutions, 2, 4, 6, 6), (floats(2, 4, 6, 6),)),
    "tied": lambda: (Tied(), (torch.arange(12).view(3, 4) % 11,)),
    "unused, reused, frozen": lambda: (Partly(), (floats(4, 6),)),
    "buffer overwritten": lambda: (ScaledByBuffer(), (floats(4, 6),)),
    "running mean": lambda: (RunningMean(), (floats(4, 6),)),
    "structured": lambda: (
        Structured(),
        (floats(4, 6, grad=True), floats(4, 6, grad=True), torch.tensor([[0], [3], [1], [2]])),
    ),
    "noise": lambda: (Noise(), (floats(4, 6),)),
    "in-place": lambda: (Functional(), (floats(4, 6, grad=True),)),
    "unrolled cell": lambda: (Cell(), (floats(3, 4, 5),)),
    "float64": lambda: (nn.Sequential(Block(6), Block(6)).double(), (floats(4, 6, dtype=torch.float64),)),
    "bfloat16": lambda: (nn.Sequential(Block(6), Block(6)).bfloat16(), (floats(4, 6, dtype=torch.bfloat16),)),
    "parametrized": lambda: (parametrized(), (floats(4, 6),)),
    "orthogonal chain": lambda: (orthogonal_chain(), (floats(16, 8),)),
    "couplings": lambda: (Couplings(), (floats(16, 8),)),
    "couplings with dropout": lambda: (Couplings(0.3), (floats(16, 8),)),
    "complex couplings": lambda: (ComplexCouplings(), (floats(16, 8, 2),)),
    "one-hot": lambda: (Routed(), (floats(32, 6),)),
    "two signs": lambda: (TwoSigns(), (floats(64, 16),)),
}


OFTEN_WRONG = ("batch norm", "buffer overwritten", "running mean", "orthogonal chain", "couplings with dropout")


def pairs() -> Iterator[Any]:
    """Every case under every plan; the less telling pairs are slow tests."""
    for case, plan in itertools.product(CASES, PLANS):
        fast = case in OFTEN_WRONG or plan in ("defaults", "checkpoint")
        yield pytest.param(case, plan, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("case", "plan"), list(pairs()))
def test_step(case: str, plan: str):
    model, arguments = CASES[case]()
    steps = 3 if case in ("batch norm", "convolutions") else 2
    bitwise = DEVICE == "cpu" or case != "convolutions"  # uncompiled, cuDNN would normalise the images
    check(model, arguments, PLANS[plan], steps=steps, bitwise=bitwise)


KEEP_AND_CHECKPOINT = {"strategies": ("keep", "checkpoint")}


def some(*fast: str, slow: Iterable[str]) -> list[Any]:
    return [*fast, *(pytest.param(plan, marks=pytest.mark.slow) for plan in slow)]


def within_reach(plan: str) -> dict[str, Any]:
    return {**PLANS[plan], "budget": "100%"} if "budget" in PLANS[plan] else PLANS[plan]


class Summed(nn.Module):
    """An output that is read twice more: three cotangents meet, and AOTAutograd adds them in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.a(x))
        out = self.b(hidden) + torch.sin(hidden)
        return hidden, out, out.view(-1), out.cos()


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x)


def channels_last() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1))
    return layers.to(memory_format=torch.channels_last)


# AOTAutograd itself rounds these otherwise than eager: it adds three cotangents in another order, scales dropout's mask
# at another place (half precision), and gives cotangents the layout of their outputs.
LIKE_AOT: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[Any, ...]]], float]] = {
    "sums of three": (lambda: (Summed(), (floats(4, 6, grad=True),)), 1e-6),
    "autocast": (lambda: (Autocast(transformer(0.1)), (floats(2, 5, 8),)), 5e-2),
    "bfloat16 dropout": (lambda: (Couplings(0.3).bfloat16(), (floats(9, 8, dtype=torch.bfloat16),)), 5e-2),
    "channels last": (lambda: (channels_last(), (floats(2, 4, 5, 5).to(memory_format=torch.channels_last),)), 1e-6),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LIKE_AOT)
def test_rounding_is_that_of_aot_autograd(case: str):
    build, tolerance = LIKE_AOT[case]
    model, arguments = build()
    reference = copy.deepcopy(model)
    call = reference._call_impl  # through a frame of ours: Dynamo skips a forward that belongs to torch.nn
    reference._compiled_call_impl = torch.compile(lambda *a: call(*a), backend="aot_eager", fullgraph=True)
    expected, eager = step(reference, arguments), step(model, arguments)
    for plan in PLANS:
        torch._dynamo.reset()
        ours = compiled(model, **within_reach(plan))
        seen = step(ours, arguments)
        assert_same(seen, expected, exact(ours), 5e-2 if case.startswith("bf") else 1e-3)
        assert gradient_error(seen.parameters, eager.parameters) < tolerance
        for name, gradient in seen.parameters.items():
            assert gradient.stride() == eager.parameters[name].stride()


class ViewOfBuffer(nn.Module):
    """The backward pass needs no view of the buffer, but recomputation does, in several blocks."""

    def __init__(self, *, overwrite: bool) -> None:
        super().__init__()
        self.layers, self.overwrite = nn.ModuleList(nn.Linear(6, 6) for _ in range(4)), overwrite
        self.register_buffer("scale", torch.linspace(-2, 2, 18).view(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        row, column = self.scale[1], self.scale[:, 2:].t()[0, 0]
        for layer in self.layers:
            x = torch.sin(layer(x) + row) + column
        if self.overwrite:
            self.scale.mul_(3)
        return x


@pytest.mark.parametrize("plan", some("checkpoint", "defaults", slow=("keep", "budget", "moonwalk", "invert")))
def test_views_of_an_overwritten_buffer(plan: str):
    model = ViewOfBuffer(overwrite=True)
    untouched = ViewOfBuffer(overwrite=False)
    untouched.load_state_dict(model.state_dict())
    ours = compiled(model, **within_reach(plan))
    for seed in range(2):
        seen = step(ours, (floats(4, 6),), seed)
        expected = step(untouched, (floats(4, 6),), seed)
        untouched.scale.mul_(3)
        expected.buffers["scale"] = untouched.scale.clone()
        assert_same(seen, expected, bitwise=exact(ours))


def test_a_buffer_that_begins_within_its_memory(monkeypatch: pytest.MonkeyPatch):
    """Its copy is smaller than what it is a part of, also where an allocator takes the same for both."""
    monkeypatch.setattr(sizes, "allocated", lambda size, _: -(-size // 512) * 512)
    model, untouched = ViewOfBuffer(overwrite=True), ViewOfBuffer(overwrite=False)
    for net in (model, untouched):
        net.scale = torch.linspace(-2, 2, 24)[2:20].view(3, 6)
    untouched.load_state_dict(model.state_dict())
    reference = step(untouched, (floats(4, 6),))
    ours = moonwalk_compile(model, lowering="eager", **PLANS["checkpoint"])
    seen = step(ours, (floats(4, 6),))
    assert all(gradient.equal(reference.parameters[name]) for name, gradient in seen.parameters.items())


class OverwrittenInput(nn.Module):
    """The caller's own tensor is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        y = torch.tanh(self.a(x) * (counts * 1))
        counts.add_(1)
        return torch.tanh(self.b(y) * (counts * 1))


@pytest.mark.parametrize("plan", some("checkpoint", slow=("defaults", "keep", "budget", "moonwalk", "invert")))
@pytest.mark.parametrize("layout", ["dense", "strided", "offset"])
def test_an_input_that_the_model_overwrites(plan: str, layout: str):
    def counts() -> Tensor:
        base = floats(3, 12)
        return {"dense": floats(6), "strided": base[1, ::2], "offset": base[1, 3:9]}[layout]

    model = OverwrittenInput()
    ours = compiled(model, **within_reach(plan))
    for _ in range(2):
        mine, theirs = counts(), counts()
        ours.zero_grad()
        model.zero_grad()
        result, expected = ours(floats(4, 6), mine), model(floats(4, 6), theirs)
        loss_of(result).backward()
        loss_of(expected).backward()
        assert result.equal(expected) and mine.equal(theirs)
        if exact(ours):
            assert all(p.grad.equal(q.grad) for p, q in zip(ours.parameters(), model.parameters(), strict=True))
        assert gradient_error(gradients(ours), gradients(model)) < 1e-4


class DecaysFirst(nn.Module):
    """It writes to one input before it reads the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        state.mul_(0.5)
        return self.b(torch.tanh(self.a(x))) * state.sum()


def overwritten(model: nn.Module, way: str) -> list[Tensor]:
    """A call whose second input is a tensor of its own, a part of the first one, or beside it in memory."""
    base = floats(8, 6)
    x = base[:4]
    state = {"alone": floats(6), "shared": x[1], "beside": base[4]}[way]
    model.zero_grad()
    result = model(x, state)
    loss_of(result).backward()
    return [result.detach(), base, state, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("first", ["alone", "shared"])
def test_inputs_that_share_memory(first: str):
    model = DecaysFirst()
    ours = compiled(model)
    warned = []
    for way in (first, *{"alone", "shared"} - {first}, first):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = overwritten(ours, way)
        warned += [str(warning.message) for warning in caught if "share memory" in str(warning.message)]
        assert all(map(torch.equal, found, overwritten(model, way)))
    assert len(warned) == 1 and ours.plan is not None


def test_inputs_side_by_side_in_memory_do_not_share_it():
    model = DecaysFirst()
    ours = compiled(model)
    overwritten(ours, "alone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = overwritten(ours, "beside")
    assert all(map(torch.equal, found, overwritten(model, "beside")))


def test_inputs_that_share_memory_cannot_keep_a_budget():
    ours = compiled(DecaysFirst(), budget="100%")
    overwritten(ours, "alone")
    with pytest.raises(CaptureError, match="pass a clone"):
        overwritten(ours, "shared")


# -- ways to use a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", some("checkpoint", slow=("defaults", "invert")))
def test_other_batch_sizes(plan: str):
    """Every size has its own plan; the sizes come back in another order."""
    model = nn.Sequential(Block(6, 0.2), nn.Linear(6, 3))
    ours = compiled(model, **PLANS[plan])
    peaks = {}
    for size in (*range(1, 13), 33, 5, 1):
        seed = size
        assert_same(step(ours, (floats(size, 6),), seed), step(model, (floats(size, 6),), seed), bitwise=exact(ours))
        peaks.setdefault(size, ours.plan.peak_bytes)
    assert peaks[33] > peaks[12] >= peaks[6] >= peaks[2]
    assert DEVICE != "cpu" or peaks[12] > peaks[6] > peaks[2]  # a GPU's allocator takes the same for some


def test_hooks_that_are_set_and_removed_between_steps():
    model = nn.Sequential(Block(6), Block(6), Block(6))
    ours, x = compiled(model, **PLANS["checkpoint"]), floats(7, 6)
    for change in ("none", "doubled", "moved", "none"):
        hooks = []
        for net in (model, ours):
            if change == "doubled":
                hooks.append(net[1].register_forward_hook(lambda module, inputs, output: 2 * output))
            elif change == "moved":
                hooks.append(net[2].up.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)))
        assert_same(step(ours, (x,)), step(model, (x,)), bitwise=True)
        for hook in hooks:
            hook.remove()


def test_eval_and_no_grad_between_steps():
    model = nn.Sequential(normalised(), Block(6, 0.3), Block(6, 0.3))
    ours, x = compiled(model, **PLANS["checkpoint"]), floats(7, 6)
    assert_same(step(ours, (x,)), step(model, (x,)), bitwise=True)
    with torch.no_grad():
        torch.manual_seed(1)
        mine = ours(x)
        torch.manual_seed(1)
        assert mine.equal(model(x)) and not mine.requires_grad
    ours.eval(), model.eval()
    with torch.inference_mode():
        assert ours(x).equal(model(x))
    assert_same(step(ours, (x,)), step(model, (x,)), bitwise=True)
    ours.train(), model.train()
    assert_same(step(ours, (x,), 9), step(model, (x,), 9), bitwise=True)


def test_gradients_accumulate():
    model = nn.Sequential(Block(6), Block(6))
    ours = compiled(model, **KEEP_AND_CHECKPOINT)
    for network in (ours, model):
        for batch in (3, 4):
            loss_of(network(floats(batch, 6))).backward()
    assert all(p.grad.equal(q.grad) for p, q in zip(ours.parameters(), model.parameters(), strict=True))


def test_two_forwards_before_their_backwards():
    model = nn.Sequential(Block(6, 0.3), Block(6, 0.3))
    ours = compiled(model, **PLANS["checkpoint"])
    for network in (ours, model):
        torch.manual_seed(2)
        first, second = network(floats(3, 6)), network(floats(3, 6) + 1)
        loss_of(first).backward()
        loss_of(second).backward()
    assert all(p.grad.equal(q.grad) for p, q in zip(ours.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("plan", some("checkpoint", "invert", slow=("defaults", "moonwalk")))
def test_backward_twice_with_retain_graph(plan: str):
    model = Couplings(0.2)
    ours = compiled(model, **PLANS[plan])
    for network in (ours, model):
        torch.manual_seed(2)
        loss = loss_of(network(floats(8, 8)))
        loss.backward(retain_graph=True)
        loss.backward()
    assert gradient_error(gradients(ours), gradients(model)) < (1e-9 if exact(ours) else 1e-4)


def test_some_outputs_get_no_gradient():
    model = Cell()
    ours = compiled(model, **PLANS["checkpoint"])
    for network in (ours, model):
        network(floats(3, 4, 5))[1].sum().backward()
    assert gradient_error(gradients(ours), gradients(model)) < 1e-6


@pytest.mark.filterwarnings("ignore:moonwalk. inversion would now cause")  # whether it inverts is a matter of times
def test_training_steps_with_an_optimizer():
    """Parameters change in place between steps: nothing derived from their old values may survive."""
    model = orthogonal_chain()
    for options in (PLANS["checkpoint"], PLANS["moonwalk"]):
        torch._dynamo.reset()
        reference, ours = copy.deepcopy(model), compiled(model, **options)
        for network in (reference, ours):
            optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
            for seed in range(4):
                optimizer.zero_grad()
                network(floats(16, 8) + seed).square().mean().backward()
                optimizer.step()
        ours_now, theirs_now = dict(ours.named_parameters()), dict(reference.named_parameters())
        assert gradient_error(ours_now, theirs_now) < (1e-6 if exact(ours) else 1e-3)


@pytest.mark.parametrize("plan", some("keep", "invert", slow=("checkpoint", "defaults")))
@pytest.mark.parametrize("what", ["output", "weight", "input"])
def test_what_is_kept_may_not_be_overwritten(plan: str, what: str):
    """Overwriting what the backward pass reads raises, as in eager."""
    model = Couplings()
    ours, x = compiled(model, **PLANS[plan]), floats(8, 8)
    result = torch.sin(ours(x)) if what != "output" else ours(x)
    before = step(model, (x,))
    with torch.no_grad():
        {"output": result, "weight": ours.blocks[1].up.weight, "input": x}[what].detach().mul_(2)
    try:
        loss_of(result).backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert what == "output", "eager raises here"
        assert gradient_error(gradients(ours), before.parameters) < 1e-5


def test_double_backward_is_refused():
    ours = compiled(nn.Sequential(Block(6), Block(6)), **PLANS["checkpoint"])
    x = floats(3, 6, grad=True)
    (grad,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("plan", some("checkpoint", slow=("defaults", "keep", "budget", "moonwalk", "invert")))
def test_autocast(plan: str):
    check(Autocast(nn.Sequential(transformer(), nn.Linear(8, 8))), (floats(2, 5, 8),), PLANS[plan])


@pytest.mark.parametrize("plan", some("checkpoint", slow=("defaults", "moonwalk", "invert")))
def test_inputs_that_are_not_contiguous(plan: str):
    model = Functional()
    wide = floats(6, 8)
    check(model, (wide.t()[1:7],), PLANS[plan])
    check(model, (wide[::2, :6].expand(3, 6),), PLANS[plan])
    check(model, (floats(6).expand(4, 6),), PLANS[plan])


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, shift: Tensor | None = None, scale: float = 1.0, twice: bool = False) -> Tensor:
        y = torch.tanh(self.linear(x) * scale)
        y = y if shift is None else y + shift
        return torch.tanh(self.linear(y)) if twice else y


def test_keyword_arguments():
    for keywords in ({}, {"shift": floats(6)}, {"scale": 0.5, "twice": True}, {"shift": floats(6), "twice": True}):
        check(Keywords(), (floats(4, 6),), PLANS["checkpoint"], **keywords)


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(Block(6), Block(6)), nn.Sequential(Block(6), Block(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_a_graph_break():
    with pytest.warns(UserWarning, match="Breaks was captured as 2 graphs, each of which has the whole budget: C"):
        check(Breaks(), (floats(4, 6),), {"fullgraph": False, **PLANS["checkpoint"]})


def test_a_mean_over_all_batches():
    """`momentum=None` reads a counter in Python, inside torch's own code: no graph is possible."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(), nn.Linear(6, 6))
    with pytest.warns(UserWarning, match="Sequential trains plain, no part of it could be captured: Unsupported"):
        check(model, (floats(5, 6),), {"fullgraph": False, **PLANS["checkpoint"]}, steps=3)


def test_nothing_requires_a_gradient():
    model = nn.Sequential(Block(6, 0.3), Block(6)).requires_grad_(False)
    ours, x = compiled(model, budget="60%"), floats(4, 6)
    torch.manual_seed(1)
    mine = ours(x)
    torch.manual_seed(1)
    assert mine.equal(model(x)) and not mine.requires_grad
    assert ours.plan is None


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1), (2, 0, 2), (0, 2, 1)])
def test_gradients_switched_on_and_off(order: tuple[int, ...]):
    """Freezing a part of the model, or all of it, makes another graph."""
    model = nn.Sequential(Block(6), Block(6))
    ours, x = compiled(model, **PLANS["checkpoint"]), floats(4, 6)
    for frozen in order:
        for net in (model, ours):
            for place, block in enumerate(net):
                block.requires_grad_(place >= frozen)
        assert_same(step(ours, (x,)), step(model, (x,)), bitwise=True)


# -- through Inductor --------------------------------------------------------------------------------------------------


def test_inductor_buffers_and_gradients():
    """Checkpointed BatchNorm and an overwritten buffer: statistics move once, gradients are right."""
    model = nn.Sequential(normalised()[:5], ScaledByBuffer(), RunningMean())
    check(model, (floats(7, 6),), PLANS["checkpoint"], steps=3, lowering="inductor")


def test_inductor_draws_one_mask():
    """Inductor draws other numbers than eager; forward and backward must still agree."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6, bias=False))
    ours = compiled(model, "inductor", **PLANS["checkpoint"])
    with torch.no_grad():
        ours[0].weight.copy_(torch.eye(6))
        ours[0].bias.zero_()
        ours[2].weight.copy_(torch.eye(6))
    x = (floats(64, 6).abs() + 1).requires_grad_()
    y = ours(x)
    y.sum().backward()
    assert x.grad.equal((y.detach() / x.detach()).round()) and 0.3 < (y == 0).float().mean() < 0.7


INDUCTOR_CASES = ("transformer", "convolutions", "structured", "orthogonal chain", "couplings")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "plan"), list(itertools.product(INDUCTOR_CASES, PLANS)))
def test_inductor(case: str, plan: str):
    model, arguments = CASES[case]() if case != "transformer" else (transformer(), (floats(2, 5, 8, grad=True),))
    check(model, arguments, PLANS[plan], lowering="inductor")


@pytest.mark.parametrize("slope", [0.5, 0.2, 0.01])
def test_deep_leaky_chains_fall_back_before_their_error_grows(slope: float):
    """The vijp amplifies noise by up to (slope + 1/slope)/2 per layer: far beyond all tolerance at this depth."""
    layers = [nn.Linear(16, 16) for _ in range(64)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU(slope))))
    x, target = floats(64, 16), floats(64, 16)
    ours = compiled(model, strategies=("moonwalk", "checkpoint"), max_slowdown=2)
    for net in (model, ours):
        (net(x) * target).sum().backward()
    assert gradient_error(gradients(ours), gradients(model)) <= 1e-4


class WithConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([b, a + torch.tanh(self.f(b)) * torch.tensor([0.7] * 16, device=x.device)], -1)


def test_a_constant_of_the_captured_graph_is_found_when_certifying() -> None:
    model, x = nn.Sequential(*(WithConstant() for _ in range(8))), torch.randn(256, 32)
    ours = compiled(model, strategies=("invert", "checkpoint"), max_slowdown=3)
    found = compare_steps(ours, model, lambda net, x: net(x).square().mean(), (x,))
    assert found.gradient_error < 1e-5
    assert ours.plan is not None and "invert" in {segment.strategy for segment in ours.plan.segments}
