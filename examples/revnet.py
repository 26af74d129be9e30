"""A reversible residual network (RevNet, Gomez et al. 2017) that classifies handwritten digits.

The channels are split into two halves; each block adds to one half a residual function of the other, and then the other
way round. Between stages an image of half the size takes four times the channels, so that nothing is lost there.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def make_norm(name: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if name == "batch" else nn.GroupNorm(min(4, channels), channels)


ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


def residual_function(channels: int, norm: str, activation: str = "relu") -> nn.Module:
    """Norm, activation, convolution, twice."""
    layers: list[nn.Module] = []
    for _ in range(2):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [make_norm(norm, channels), ACTIVATIONS[activation](), convolution]
    return nn.Sequential(*layers)


class RevBlock(nn.Module):
    """y1 = x1 + F(x2); y2 = x2 + G(y1)."""

    def __init__(self, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.f = residual_function(channels // 2, norm, activation)
        self.g = residual_function(channels // 2, norm, activation)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat([y1, y2], dim=1)


def build(
    *,
    blocks: int = 6,
    stages: int = 2,
    channels: int = 16,
    size: int = 32,
    batch: int = 32,
    norm: str = "batch",
    activation: str = "relu",
) -> tuple[nn.Module, tuple[Tensor]]:
    """`stages` x `blocks` reversible blocks and a classifier; an input of shape [batch, channels, size, size].

    `norm` is "batch" or "group", `activation` "relu" or "gelu". `size` must be a multiple of 2 ** (stages - 1),
    `channels` an even number.
    """
    layers: list[nn.Module] = []
    width = channels
    for stage in range(stages):
        if stage:
            layers.append(nn.PixelUnshuffle(2))
            width *= 4
        layers += [RevBlock(width, norm, activation) for _ in range(blocks)]
    classifier = [nn.Flatten(), nn.Linear(channels * size * size, CLASSES)]
    return nn.Sequential(*layers, *classifier), (torch.randn(batch, channels, size, size),)


def loss(model: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(model(x), label)


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 8, 8] with values from 0 to 1, and which digit each one is [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    return torch.as_tensor(data.images).float() / 16, torch.as_tensor(data.target).long()


def batches(x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Digits drawn at random, enlarged to the size of `x` and repeated over its channels; and their labels."""
    images, labels = digits()
    images = (images - images.mean()) / images.std()
    while True:
        drawn = torch.randint(len(images), (x.shape[0],))
        large = F.interpolate(images[drawn].unsqueeze(1), size=x.shape[2:], mode="bilinear")
        yield large.expand(-1, x.shape[1], -1, -1).contiguous(), labels[drawn]


def main() -> None:
    from training import run_example

    run_example(build, loss, batches, lr=1e-3)


if __name__ == "__main__":
    main()
