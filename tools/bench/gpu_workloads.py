"""Models for the measurements on accelerators, with data that is made on the device: no copy is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = {"mlp": (50, 1000), "resnet": (20, 300), "gpt": (6, 40), "1b": (8, 30), "tiny": (2, 4)}
"""Warm-up and measured steps of each workload."""


class MLP(nn.Module):
    """The launch-bound extreme: a step is a few dozen tiny kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet18(nn.Module):
    """The 18-layer network for 32x32 pictures: 3x3 first convolution, no first pooling."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        before = 64
        for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [Residual(before, after, stride), Residual(after, after, 1)]
            before = after
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


class Block(nn.Module):
    """A pre-norm transformer block (Radford et al. 2019, section 2.3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT2(nn.Module):
    """GPT-2 with 124 million parameters, its vocabulary padded to a multiple of 128."""

    def __init__(
        self, vocabulary: int = 50304, width: int = 768, layers: int = 12, heads: int = 12, context: int = 1024
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.norm(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]]))
        return F.cross_entropy(F.linear(hidden, self.tokens.weight).flatten(0, 1), y.flatten())


class Repeated:
    """One batch, ``count`` times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield self.batch


def model(name: str) -> nn.Module:
    """A fresh model of a workload, on the CPU."""
    return {"mlp": MLP, "resnet": ResNet18, "gpt": GPT2}[name]()


def batch(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """One batch of a workload, on ``device``."""
    make = torch.Generator(device).manual_seed(0)
    if name == "gpt":
        tokens = torch.randint(0, 50257, (16, 1025), device=device, generator=make)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    shape = (64, 3, 32, 32) if name == "resnet" else (32, 32)
    return torch.randn(shape, device=device, generator=make), torch.randint(
        0, 10, shape[:1], device=device, generator=make
    )
