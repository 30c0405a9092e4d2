"""The tiny model and the plain PyTorch loop that kits compare with."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.optim import Optimizer

__all__ = ["Batch", "TinyNet", "adam", "batches", "equal_bits", "free_port", "plain_training", "sgd", "tiny_net"]

Batch = tuple[Tensor, Tensor]


class TinyNet(nn.Module):
    """Two linear layers, 4 -> 8 -> 2, with an integer buffer that no cast may touch."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2)
        self.register_buffer("seen", torch.tensor(7, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, 4)`` to ``(n, 2)``."""
        hidden: Tensor = torch.tanh(self.first(x))
        out: Tensor = self.second(hidden)
        return out

    def loss_of(self, batch: Batch) -> Tensor:
        """Mean squared error of one batch: a method other than ``forward``, to be bound through a wrapper."""
        return F.mse_loss(self(batch[0]), batch[1])


def tiny_net(seed: int = 0, device: torch.device | str = "cpu") -> TinyNet:
    """A ``TinyNet`` on ``device`` whose values depend on ``seed`` alone; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet().to(device)


def batches(count: int, seed: int = 0, device: torch.device | str = "cpu") -> list[Batch]:
    """``count`` pairs of shapes (6, 4) and (6, 2), float32, a function of ``seed``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [
        (torch.randn(6, 4, generator=generator).to(device), torch.randn(6, 2, generator=generator).to(device))
        for _ in range(count)
    ]


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """SGD with momentum: state that begins at the first step."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Adam: state with a step counter."""
    return torch.optim.Adam(parameters, lr=0.05)


def plain_training(
    module: nn.Module, make_optimizer: Callable[[Iterator[nn.Parameter]], Optimizer], data: Iterable[Batch]
) -> nn.Module:
    """The loop everybody writes by hand; one optimizer step a batch. Returns ``module``, trained in place."""
    optimizer = make_optimizer(module.parameters())
    for x, y in data:
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
    return module


def equal_bits(got: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and bit pattern: NaN equals the same NaN, 0.0 is not -0.0."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    ours, theirs = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (got, expected))
    return torch.equal(ours, theirs)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
