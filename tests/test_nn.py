"""The layers of `moonwalk_compile.nn`: what each promises, with and without the compiler."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import nn as torch_nn

from moonwalk_compile import OptionError, moonwalk_compile, nn
from moonwalk_compile.measure import compare_steps, measure_step
from moonwalk_compile.passes.inverse.orthogonal import orthogonal_values
from moonwalk_compile.testing import capture_joint

SHAPES = [(16, 16), (8, 20), (20, 8), (5, 1), (1, 1)]
CONVOLUTIONS = {
    "1x1": (nn.OrthogonalConv2d, (6, 6), {}),
    "1x1, narrowing": (nn.OrthogonalConv2d, (6, 4), {}),
    "patches": (nn.OrthogonalConv2d, (2, 8), {"kernel_size": 2, "stride": 2}),
    "patches, widening": (nn.OrthogonalConv2d, (2, 11), {"kernel_size": 2, "stride": 2}),
    "3x3": (nn.OrthogonalConv2d, (9, 9), {"kernel_size": 3}),
    "3x3, narrowing": (nn.OrthogonalConv2d, (11, 7), {"kernel_size": 3}),
    "2x2": (nn.OrthogonalConv2d, (5, 5), {"kernel_size": 2}),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def train(model: torch_nn.Module, x: Tensor, steps: int = 3) -> list[float]:
    """Losses of a few plain steps, large enough to move the weights."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_isometric(matrix: Tensor) -> None:
    values = torch.linalg.svdvals(matrix.detach().double())
    torch.testing.assert_close(values, torch.ones_like(values), atol=1e-5, rtol=0)


# -- OrthogonalLinear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_stays_orthogonal_while_it_is_trained(shape):
    layer = nn.OrthogonalLinear(*shape)
    assert layer.weight.shape == shape[::-1]
    assert_isometric(layer.weight)
    before = layer.weight.detach()
    losses = train(layer, torch.randn(64, shape[0]))
    assert losses[-1] < losses[0]
    assert_isometric(layer.weight)
    assert shape == (1, 1) or not torch.allclose(layer.weight, before, atol=1e-2)


@pytest.mark.parametrize(("n", "k"), [(256, 256), (256, 64), (256, 4)])
def test_a_new_matrix_looks_like_a_random_one(n, k):
    """No trace is left of the identity, and the system that is solved is well conditioned."""
    layer = nn.OrthogonalLinear(n, k, bias=False)
    assert abs(layer.weight.detach().diagonal().mean()) < 0.15
    raw = torch.nn.functional.pad(layer.matrix.raw.detach(), (0, n - k))
    assert torch.linalg.cond(torch.eye(n) - raw + raw.T) < 3.5


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)], ids=str)
def test_linear_gradients(shape):
    layer = nn.OrthogonalLinear(*shape).double()
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


def test_linear_is_an_ordinary_module():
    layer = nn.OrthogonalLinear(6, 6)
    x = torch.randn(3, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    other = nn.OrthogonalLinear(6, 6)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(8, 8), (8, 5), (5, 8)], ids=str)
def test_the_compiler_proves_the_weight_orthogonal(shape):
    layer = nn.OrthogonalLinear(*shape, bias=False)

    def call(x, raw):
        return torch.func.functional_call(layer, {"matrix.raw": raw}, (x,))

    capture = capture_joint(call, [torch.randn(16, shape[0]), layer.matrix.raw.detach()])
    product = next(edge for edge in capture.graph.edges if edge.label == "mm" and edge.stage == "forward")
    assert set(product.needs) & orthogonal_values(capture)


# -- OrthogonalConv2d ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_singular_values_of_a_convolution(case):
    layer, channels, options = CONVOLUTIONS[case]
    convolution = layer(*channels, **options)
    train(convolution, torch.randn(4, channels[0], 4, 4))
    size = channels[0] * 16
    with torch.no_grad():
        images = torch.eye(size).view(size, channels[0], 4, 4)
        rows = (convolution(images) - convolution(torch.zeros_like(images))).flatten(1)
    assert_isometric(rows)


def test_a_sliding_convolution_reads_its_kernel_and_no_more():
    layer = nn.OrthogonalConv2d(9, 9, 3, bias=False)
    image = torch.zeros(1, 9, 7, 7)
    image[0, :, 3, 3] = torch.randn(9)
    norms = layer(image).detach().norm(dim=1)[0]
    assert (norms[2:5, 2:5] > 1e-3).all()
    norms[2:5, 2:5] = 0
    assert norms.max() < 1e-6
    moved = torch.roll(image, (2, 3), (2, 3))
    torch.testing.assert_close(layer(moved), torch.roll(layer(image), (2, 3), (2, 3)))


@pytest.mark.parametrize("options", [{"kernel_size": 3, "stride": 2}, {"kernel_size": 3}, {"kernel_size": 0}], ids=str)
def test_convolutions_that_cannot_be(options):
    with pytest.raises(OptionError, match="OrthogonalConv2d"):
        nn.OrthogonalConv2d(4, 4, **options)


# -- MaxMin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, -1])
def test_maxmin_permutes(dim):
    x = torch.randn(2, 4, 6)
    layer = nn.MaxMin(dim)
    jacobian = torch.autograd.functional.jacobian(layer, x).view(48, 48)
    assert torch.equal(jacobian.unique(), torch.tensor([0.0, 1.0]))
    assert torch.equal(jacobian @ jacobian.T, torch.eye(48))
    first, second = layer(x).chunk(2, dim)
    assert (first >= second).all()


def test_maxmin_needs_pairs():
    with pytest.raises(OptionError, match="odd size"):
        nn.MaxMin()(torch.randn(2, 5))


# -- Reversible ----------------------------------------------------------------------------------------------------


def branch(width: int) -> torch_nn.Module:
    return torch_nn.Sequential(
        torch_nn.LayerNorm(width), torch_nn.Linear(width, width), torch_nn.GELU(), torch_nn.Linear(width, width)
    )


class Residual(torch_nn.Module):
    def __init__(self, inner: torch_nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_reversible_is_undone_block_by_block(count):
    stack = nn.Reversible([branch(4).double() for _ in range(count)], dim=-1)
    x = torch.randn(3, 8, dtype=torch.float64)
    streams = list(stack(x).chunk(2, -1))
    for index in reversed(range(count)):
        streams[index % 2] = streams[index % 2] - stack.blocks[index](streams[1 - index % 2])
    torch.testing.assert_close(torch.cat(streams, -1), x)


def test_reversible_takes_whole_residual_blocks():
    inner = [branch(6) for _ in range(4)]
    plain = nn.Reversible(inner, streams="copy")
    whole = nn.Reversible([Residual(block) for block in inner], streams="copy", skips=True)
    x = torch.randn(3, 6)
    torch.testing.assert_close(whole(x), plain(x))
    assert {id(p) for p in whole.parameters()} == {id(p) for block in inner for p in block.parameters()}
    losses = train(plain, x)
    assert losses[-1] < losses[0]


def test_reversible_tells_what_does_not_fit():
    with pytest.raises(OptionError, match="half the width"):
        nn.Reversible([torch_nn.Linear(4, 8)])(torch.randn(2, 8))
    with pytest.raises(OptionError, match="unknown"):
        nn.Reversible([], streams="both")
    with pytest.raises(OptionError, match="odd size"):
        nn.Reversible([])(torch.randn(2, 5))


# -- under the compiler --------------------------------------------------------------------------------------------


class Asinh(torch_nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.asinh()


def stack(layer, activation, count: int = 8) -> torch_nn.Module:
    return torch_nn.Sequential(*(module for _ in range(count) for module in (layer(), activation())))


# Model, input, the strategy that must carry it, and the largest part of plain backpropagation's peak.
COMPILED = {
    "linear and maxmin": lambda: (
        stack(lambda: nn.OrthogonalLinear(16, 16), nn.MaxMin),
        torch.randn(2048, 16),
        "moonwalk",
        0.5,
    ),
    "linear and asinh": lambda: (
        stack(lambda: nn.OrthogonalLinear(16, 16), Asinh),
        torch.randn(2048, 16),
        "invert",
        0.5,
    ),
    "convolution and maxmin": lambda: (
        stack(lambda: nn.OrthogonalConv2d(8, 8), nn.MaxMin),
        torch.randn(4, 8, 16, 16),
        "moonwalk",
        0.5,
    ),
    "3x3 and maxmin": lambda: (
        stack(lambda: nn.OrthogonalConv2d(10, 10, 3), nn.MaxMin),
        torch.randn(4, 10, 16, 16),
        "moonwalk",
        0.7,
    ),
    "reversible": lambda: (
        nn.Reversible([branch(8) for _ in range(8)], dim=-1),
        torch.randn(2048, 16),
        "invert",
        0.5,
    ),
    "reversible, copied streams": lambda: (
        nn.Reversible([Residual(branch(8)) for _ in range(8)], streams="copy", skips=True),
        torch.randn(2048, 8),
        "invert",
        0.5,
    ),
}


def loss(model: torch_nn.Module, x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(2 * model(x)).mean()


FAST = ("linear and maxmin", "reversible")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in COMPILED]
)
def test_the_compiler_solves_for_them(case, fresh_compiler):
    model, x, strategy, share = COMPILED[case]()
    plain = copy.deepcopy(model)
    moonwalk_compile(model, strategies=(strategy, "checkpoint"), lowering="eager", max_slowdown=3)
    assert compare_steps(model, plain, loss, [x]).gradient_error < 1e-4
    solved = [segment for segment in model.plan.segments if segment.strategy == strategy]
    blocks = sum(segment.blocks for segment in model.plan.segments)
    assert sum(segment.blocks for segment in solved) > blocks / 2
    ours, theirs = (measure_step(lambda m=m: loss(m, x).backward()).peak_bytes for m in (model, plain))
    assert ours < share * theirs


def test_the_layers_do_not_import_the_compiler():
    tree = ast.parse(Path(nn.__file__).read_text())
    relative = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == ["errors"]
