"""ACME's single-board strategy. Note what is absent: any import of fulmen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol, final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer


class HasDevice(Protocol):
    """All that this strategy reads of a run's topology."""

    @property
    def device(self) -> torch.device: ...


@final
class AcmeStrategy:
    """Trains on ACME's board, whose torch device is the CPU."""

    def __init__(self, board: int = 0) -> None:
        self.board = board
        self.root_device = torch.device("cpu")

    def setup_environment(self, topology: HasDevice) -> None:
        if topology.device.type != "cpu":
            raise ValueError(f"strategy 'acme' runs on its board only, but the run's device is {topology.device!r}")
        self.root_device = topology.device

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.root_device)

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        return optimizers

    def backward(self, loss: Tensor, module: nn.Module | None, **kwargs: object) -> None:
        loss.backward()  # a real board's own engine would run here

    def teardown(self) -> None:
        pass
