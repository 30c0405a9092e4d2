"""What a type checker knows of a loop of one's own: read by mypy and pyright (``tools.check_types``), never run."""

from __future__ import annotations

from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from fulmen_fabric import Fabric, FabricDataLoader, FabricModule, RunState


def train(fabric: Fabric, rate: float, *, epochs: int = 1) -> float:
    module = nn.Linear(2, 1)
    optimizer = Adam(module.parameters(), lr=rate)
    assert_type(fabric.setup(module), FabricModule)
    assert_type(fabric.setup(module, optimizer), tuple[FabricModule, Adam])
    assert_type(fabric.setup(module, optimizer, SGD(module.parameters())), tuple[FabricModule, Adam, SGD])
    assert_type(fabric.setup(module, optimizer, scheduler=StepLR(optimizer, 1)), tuple[FabricModule, Adam, StepLR])
    assert_type(fabric.setup_module(module), FabricModule)
    assert_type(fabric.setup_optimizers(optimizer), Adam)
    assert_type(fabric.setup_optimizers(optimizer, SGD(module.parameters())), tuple[Adam, SGD])

    model, wrapped = fabric.setup(module, optimizer)
    data: DataLoader[Tensor] = DataLoader([torch.ones(2)])  # type: ignore[arg-type]  # torch wants its own Dataset
    loader = fabric.setup_dataloaders(data)
    assert_type(loader, FabricDataLoader)
    assert_type(fabric.setup_dataloaders(data, data), list[FabricDataLoader])
    evaluate(model, loader)
    for _ in range(epochs):
        for batch in loader:
            loss: Tensor = model(batch).sum()
            fabric.backward(loss)
            assert_type(fabric.clip_gradients(model, wrapped, max_norm=1.0), Tensor)
            assert_type(fabric.clip_gradients(model, wrapped, clip_val=1.0), None)
            wrapped.step()
    assert_type(fabric.all_reduce(1.0), Tensor)
    assert_type(fabric.all_gather(torch.ones(1)), Tensor)
    assert_type(fabric.broadcast({"a": 1}), dict[str, int])
    assert_type(fabric.to_device(module), nn.Linear)
    assert_type(fabric.run_state, RunState)
    return 0.0


def evaluate(model: nn.Module, loader: DataLoader[Any]) -> None:
    """Of a user who knows modules and loaders only."""


def main() -> None:
    fabric = Fabric(accelerator="cpu")
    fabric.launch()
    assert_type(fabric.launch(train, 0.1, epochs=2), float)
    step = fabric.capture(train)
    assert_type(step(fabric, 0.1), float)
