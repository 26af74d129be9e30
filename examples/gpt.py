"""A GPT-style character model on the text of Python's own help topics; it returns its loss when targets are given."""

import random
from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def corpus() -> tuple[Tensor, str]:
    """The text as numbers (int64, one per character), and its alphabet."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text]), alphabet


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int, tokens: int, blocks: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(tokens, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [batch, tokens, vocabulary], or with targets [batch, tokens] the mean cross entropy (nats)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token(tokens) + self.position(positions))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build(
    *,
    blocks: int = 12,
    width: int = 256,
    heads: int = 8,
    batch: int = 8,
    tokens: int = 256,
    dropout: float = 0.0,
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model, and tokens and targets of shape [batch, tokens]."""
    model = Gpt(len(corpus()[1]), tokens, blocks, width, heads, dropout)
    return model, sample(batch, tokens)


def sample(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Random pieces of the text, and the same pieces one character later."""
    text, _ = corpus()
    starts = [random.randrange(len(text) - tokens) for _ in range(batch)]
    pieces = torch.stack([text[start : start + tokens + 1] for start in starts])
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return model(tokens, targets)


def batches(tokens: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh pieces of the text, in the shapes of the given ones."""
    batch, length = tokens.shape
    while True:
        yield sample(batch, length)


def main() -> None:
    from training import run_example

    run_example(build, loss, batches, lr=1e-3)


if __name__ == "__main__":
    main()
