"""Models that most people train: nothing in them can be inverted. Each returns its loss, forward(x, target) -> scalar.

GPT-2 (Radford et al. 2019), ViT (Dosovitskiy et al. 2020), ResNet-50 (He et al. 2015), ConvNeXt (Liu et al. 2022;
without stochastic depth), U-Net (Ronneberger et al. 2015, with BatchNorm), Llama (Touvron et al. 2023), an LSTM
unrolled by hand (Zaremba et al. 2014), each with dropout where its paper has it, and small enough for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:
    from .gpt import Gpt
else:
    from gpt import Gpt

CLASSES = 10
VOCABULARY = 256


class Encoder(nn.Module):
    """A transformer block that sees all tokens, normalised first, with dropout behind attention and both linears."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.dropout(self.out(y))
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm2(x))))))


class ViT(nn.Module):
    def __init__(self, size: int, patch: int, blocks: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Encoder(width, heads, dropout) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = self.dropout(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)[:, 0]), targets)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        return self.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of bottlenecks; `depths` (3, 4, 6, 3) is ResNet-50."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        inputs, blocks = width, []
        for stage, depth in enumerate(depths):
            for position in range(depth):
                blocks.append(Bottleneck(inputs, width << stage, 2 if stage and not position else 1))
                inputs = 4 * (width << stage)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), targets)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Stages of blocks with a strided convolution before each."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 4)]
        for stage, depth in enumerate(depths):
            if stage:
                blocks.append(nn.Conv2d(width << (stage - 1), width << stage, 2, 2))
            blocks += [ConvNeXtBlock(width << stage) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        last = width << (len(depths) - 1)
        self.norm, self.head = nn.LayerNorm(last), nn.Linear(last, CLASSES)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x.mean((2, 3)))), targets)


class Twice(nn.Sequential):
    """Convolution, BatchNorm, ReLU, twice."""

    def __init__(self, inputs: int, width: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, width):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """Down and up again, with skips from each level to its counterpart; dropout at the bottom, as in the paper."""

    def __init__(self, width: int, levels: int, dropout: float) -> None:
        super().__init__()
        widths = [width << level for level in range(levels)]
        self.down = nn.ModuleList(Twice(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(Twice(2 * b, b) for b in widths[-2::-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * b, b, 2, 2) for b in widths[-2::-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x, skips = images, []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([skips.pop(), grow(x)], dim=1))
        return F.cross_entropy(self.head(x), targets)


class RmsNorm(nn.Module):
    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: pairs of channels turned by an angle that grows with the position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, tokens: int, blocks: int, width: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, width * 8 // 3 // 32 * 32 or 32) for _ in range(blocks))
        self.norm, self.head = RmsNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        half = width // heads // 2
        angles = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class LstmCell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.input(x) + self.hidden(h)).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Lstm(nn.Module):
    """Two layers unrolled over all tokens; dropout between layers, never along time."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.cells = nn.ModuleList(LstmCell(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        embedded = self.token(tokens)
        states = [(torch.zeros_like(embedded[:, 0]), torch.zeros_like(embedded[:, 0])) for _ in self.cells]
        tops = []
        for step in range(tokens.shape[1]):
            x = embedded[:, step]
            for layer, cell in enumerate(self.cells):
                states[layer] = cell(self.dropout(x), *states[layer])
                x = states[layer][0]
            tops.append(self.dropout(x))
        return F.cross_entropy(self.head(torch.stack(tops, dim=1)).flatten(0, 1), targets.flatten())


Inputs = tuple[Tensor, Tensor]


def text(batch: int, tokens: int) -> Inputs:
    return torch.randint(VOCABULARY, (batch, tokens)), torch.randint(VOCABULARY, (batch, tokens))


def images(batch: int, size: int, dense: bool = False) -> Inputs:
    """Images, and a class for each of them or (dense) for each of their pixels."""
    return torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch, size, size) if dense else (batch,))


@dataclass(frozen=True)
class Ordinary:
    """How to build a model at full size, for a smoke test, and (`large`) as it is trained on a GPU of 80 GB, and the
    names of the lists of modules that one would checkpoint by hand."""

    full: Callable[[], tuple[nn.Module, Inputs]]
    small: Callable[[], tuple[nn.Module, Inputs]]
    large: Callable[[], tuple[nn.Module, Inputs]]
    blocks: tuple[str, ...] = ("blocks",)


MODELS = {
    "gpt2": Ordinary(
        lambda: (Gpt(VOCABULARY, 128, 12, 256, 8, 0.1), text(8, 128)),
        lambda: (Gpt(VOCABULARY, 16, 2, 32, 2, 0.1), text(2, 16)),
        lambda: (Gpt(VOCABULARY, 1024, 12, 768, 12, 0.1), text(32, 1024)),
    ),
    "vit": Ordinary(
        lambda: (ViT(64, 8, 12, 192, 3, 0.1), images(16, 64)),
        lambda: (ViT(16, 8, 2, 32, 2, 0.1), images(2, 16)),
        lambda: (ViT(224, 16, 12, 768, 12, 0.1), images(128, 224)),
    ),
    "resnet50": Ordinary(
        lambda: (ResNet(32, (3, 4, 6, 3)), images(32, 96)),
        lambda: (ResNet(8, (1, 2)), images(2, 32)),
        lambda: (ResNet(64, (3, 4, 6, 3)), images(128, 224)),
    ),
    "convnext": Ordinary(
        lambda: (ConvNeXt(48, (3, 3, 9, 3)), images(16, 96)),
        lambda: (ConvNeXt(16, (1, 2)), images(2, 32)),
        lambda: (ConvNeXt(96, (3, 3, 9, 3)), images(128, 224)),
    ),
    "unet": Ordinary(
        lambda: (UNet(16, 4, 0.5), images(8, 128, dense=True)),
        lambda: (UNet(8, 3, 0.5), images(2, 32, dense=True)),
        lambda: (UNet(64, 5, 0.5), images(8, 512, dense=True)),
        ("down", "up"),
    ),
    "llama": Ordinary(
        lambda: (Llama(128, 8, 256, 8), text(8, 128)),
        lambda: (Llama(16, 2, 32, 2), text(2, 16)),
        lambda: (Llama(2048, 8, 2048, 16), text(4, 2048)),
    ),
    "lstm": Ordinary(
        lambda: (Lstm(256, 0.5), text(64, 64)),
        lambda: (Lstm(32, 0.5), text(4, 8)),
        lambda: (Lstm(1024, 0.5), text(1024, 64)),
        ("cells",),
    ),
}


def build(name: str = "gpt2", scale: str = "full") -> tuple[nn.Module, Inputs]:
    """A model of `MODELS` and its inputs; `scale` is "full", "small" or "large"."""
    return getattr(MODELS[name], scale)()


def loss(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Its loss; on a GPU in mixed precision, as models are trained there."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return model(x, targets)
