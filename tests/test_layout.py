"""Images inside the step are stored as Inductor computes them; nobody outside of it sees that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moonwalk_compile import moonwalk_compile
from moonwalk_compile.measure import gradient_error, gradients
from moonwalk_compile.passes._torch_compat_inductor import extern_kernels
from moonwalk_compile.passes.lower import Half, Lowerer
from moonwalk_compile.peers import same_random_numbers

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SIZE = (4, 8, 16, 16)


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What forward halves give in a layout of their own choice."""
    found: list[Tensor] = []
    half = Lowerer.half

    def recording(self: Lowerer, program: Any, is_backward: bool, *rest: Any) -> Half:
        done = half(self, program, is_backward, *rest)
        if not is_backward:
            given = [(fake, self.analysis.fakes[value]) for value, fake in done.given.items()]
            found.extend(fake for fake, planned in given if fake.stride() != planned.stride())
        return done

    monkeypatch.setattr(Lowerer, "half", recording)
    yield found


class Images(nn.Module):
    """Gives images, one of them a second time as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()) for _ in range(3)
        )
        self.head = nn.Linear(8 * 16 * 16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        rows = x.view(x.shape[0], -1)
        return x, self.head(rows), rows.view(x.shape[0] * 8, -1).tanh()


def test_outputs_and_gradients_are_laid_out_as_in_eager_pytorch(handed_over: list[Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Images(), torch.randn(SIZE)
    ours = moonwalk_compile(copy.deepcopy(model), budget="75%")
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    found, true = ours(inputs[0]), model(inputs[1])
    assert [y.stride() for y in found] == [y.stride() for y in true]
    for outputs in (found, true):
        sum((y.sin() * (1 + i)).sum() for i, y in enumerate(outputs)).backward()
    assert handed_over
    assert inputs[0].grad.stride() == inputs[1].grad.stride()
    assert (inputs[0].grad - inputs[1].grad).norm() < 1e-5 * inputs[1].grad.norm()
    assert gradient_error(gradients(ours), gradients(model)) < 1e-5
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        assert mine.grad.stride() == theirs.grad.stride()


@torch.library.custom_op("moonwalk_tests::as_stored", mutates_args=())
def as_stored(x: Tensor) -> Tensor:
    """Depends on the order in memory, which its author took for granted."""
    return torch.as_strided(x, (x.numel(),), (1,)).clone() * 2


@as_stored.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.numel())


as_stored.register_autograd(lambda ctx, g: (2 * g).view(SIZE))


class Stored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return as_stored(x).view(SIZE).cumsum(0) + x


def test_an_operation_that_looks_at_memory_gets_what_it_gets_in_eager_pytorch(handed_over: list[Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Stored(), torch.randn(SIZE)
    ours = moonwalk_compile(copy.deepcopy(model), budget="90%")
    found, true = ours(x), model(x)
    assert (found - true).norm() < 1e-5 * true.norm()
    for y in (found, true):
        y.square().sum().backward()
    assert gradient_error(gradients(ours), gradients(model)) < 1e-5
    assert not handed_over


class Blocks(nn.Module):
    """As in ConvNeXt, what a convolution gives goes on with the channels as the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "convolution": nn.Conv2d(8, 8, 3, padding=1, groups=8),
                    "norm": nn.LayerNorm(8),
                    "linear": nn.Linear(8, 8),
                    "dropout": nn.Dropout(0.3),
                }
            )
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer["norm"](layer["dropout"](layer["convolution"](x)).permute(0, 2, 3, 1))
            x = x + layer["linear"](y).permute(0, 3, 1, 2)
        return x


@pytest.mark.parametrize("budget", [pytest.param("100%", marks=pytest.mark.slow), "60%"])
def test_convolutions_get_images_channels_last_in_both_directions(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(SIZE)
    ours = moonwalk_compile(model, budget=budget)
    with same_random_numbers("inductor"):
        ours(x).sum().backward()
    images: list[Tensor] = []
    given: list[Tensor] = []
    forward, backward = extern_kernels.convolution, torch.ops.aten.convolution_backward.default

    def convolution(image: Tensor, *args: Any, **named: Any) -> Tensor:
        given.append(image)
        return forward(image, *args, **named)

    def convolution_backward(*args: Any) -> Any:
        images.extend(args[:2])
        return backward(*args)

    monkeypatch.setattr(extern_kernels, "convolution", convolution)
    monkeypatch.setattr(torch.ops.aten.convolution_backward, "default", convolution_backward)
    ours(x).sum().backward()
    assert len(given) >= 4 and len(images) == 8
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in (*given, *images))


@pytest.mark.parametrize("budget", ["100%", "60%"])
def test_random_numbers_do_not_depend_on_the_layout(budget: str) -> None:
    """They are drawn in the order of memory, where eager PyTorch's are asked for."""
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(SIZE)
    with same_random_numbers("inductor"):
        ours = moonwalk_compile(copy.deepcopy(model), budget=budget)
        for each in (ours, model, ours, model):
            torch.manual_seed(1)
            each.zero_grad()
            each(x).square().sum().backward()
    assert gradient_error(gradients(ours), gradients(model)) < 1e-5
