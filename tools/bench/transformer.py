"""A Llama-shaped transformer in the sizes that are measured and planned: "1b" and "7b", and "tiny" for trying out.

Touvron et al. 2023, section 2.2: RMSNorm before each half of a block, SwiGLU, rotary positions, no biases. Head and
embedding are not tied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """How large a transformer is."""

    width: int
    layers: int
    heads: int
    inner: int
    """Width of the feed-forward layers."""
    vocabulary: int = 32_000
    context: int = 2048


SHAPES = {
    "tiny": Shape(64, 2, 4, 176, vocabulary=512, context=64),
    "1b": Shape(2048, 18, 16, 5632),
    "7b": Shape(4096, 32, 32, 11008),
}


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, section 3.2)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.size = width // shape.heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """``x`` has shape (batch, length, width)."""
        batch, length, _ = x.shape
        # Not by the number of heads: with tensor parallelism each rank has some of them.
        q, k, v = (one(x).view(batch, length, -1, self.size).transpose(1, 2) for one in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        return out


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * turn[0] + torch.cat((-second, first), dim=-1) * turn[1]).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(shape.width, shape.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` has shape (batch, length, width)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class TransformerBlock(nn.Module):
    """What is sharded, compiled and recomputed as one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(shape.width, eps=1e-5), nn.RMSNorm(shape.width, eps=1e-5)
        self.attention, self.feed_forward = Attention(shape), FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` has shape (batch, length, width); ``cos`` and ``sin`` (length, width / heads)."""
        x = x + self.attention(self.norm1(x), (cos, sin))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class Transformer(nn.Module):
    """A language model; called with tokens and the tokens to predict it returns the loss.

    Args:
        size: a key of ``SHAPES``, or a shape.
    """

    def __init__(self, size: str | Shape) -> None:
        super().__init__()
        self.shape = shape = SHAPES[size] if isinstance(size, str) else size
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(TransformerBlock(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """Features of tokens (batch, length), shape (batch, length, width)."""
        out: Tensor = self.tokens(x)
        cos, sin = _angles(x.shape[1], self.shape.width // self.shape.heads, x.device)
        for block in self.blocks:
            out = block(out, cos, sin)
        return out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy in nats; ``x`` and ``y`` have shape (batch, length), int64."""
        logits = self.head(self.norm(self.hidden(x)))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def _angles(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def parameter_count(size: str | Shape) -> int:
    """Number of parameters."""
    shape = SHAPES[size] if isinstance(size, str) else size
    block = 4 * shape.width**2 + 3 * shape.width * shape.inner + 2 * shape.width
    return shape.layers * block + 2 * shape.vocabulary * shape.width + shape.width


def flops_per_token(size: str | Shape, length: int) -> int:
    """Floating-point operations of forward and backward for one token of a sequence of ``length``.

    Chowdhery et al. 2022, appendix B: 6 for each parameter but the embedding's, and 12 x layers x width x length for
    attention, of which a causal mask needs half.
    """
    shape = SHAPES[size] if isinstance(size, str) else size
    dense = parameter_count(shape) - shape.vocabulary * shape.width
    return 6 * dense + 6 * shape.layers * shape.width * length
