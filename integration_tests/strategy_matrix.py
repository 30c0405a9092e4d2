"""Trains one model by every strategy in every precision, with the Trainer and with Fabric; rank 0 writes the weights.

``python strategy_matrix.py FOLDER RANKS``. With one rank it is what the others are compared with.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.strategies import ModelParallelStrategy

SAMPLES, WINDOW, EPOCHS = 16, 2, 6
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(SAMPLES, 6, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)
    )


class Body(nn.Module):
    """Two layers for plans, and others for none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(torch.relu(self.first(x)))))


def tensor_parallel(module: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(
        module, mesh["tensor_parallel"], {"first": ColwiseParallel(), "second": RowwiseParallel()}
    )


def both(module: nn.Module, mesh: Any) -> nn.Module:
    tensor_parallel(module, mesh)
    for layer in (module.first, module.second):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


class Model(fulmen.LightningModule):
    """Places itself as it is told to; as every user's model it may be built once only."""

    def __init__(self, parallelize: Any = None, *, whole: bool = False) -> None:
        super().__init__()
        self.parallelize, self.whole_is_sharded = parallelize, whole
        self.body: Any = None
        self.norms: list[float] = []

    def configure_model(self) -> None:
        if self.body is not None:
            return
        torch.manual_seed(0)
        self.body = Body()
        if self.parallelize is not None:
            self.parallelize(self.body, self.device_mesh)
        if self.whole_is_sharded:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.body(batch[0]).float(), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("seen", float(len(batch[0])), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(0.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def strategies(ranks: int) -> dict[str, tuple[Any, Any, int]]:
    """Name to (a maker of the strategy, how the model places itself, number of parts of the data)."""
    if ranks == 1:
        return {"one": (lambda **_: "auto", None, 1)}
    sizes = {"data_parallel_size": ranks // 2, "tensor_parallel_size": 2}
    found: dict[str, tuple[Any, Any, int]] = {
        "ddp": (lambda **_: "ddp", None, ranks),
        "tp": (lambda **own: ModelParallelStrategy(**own), tensor_parallel, 1),
        "fsdp2 x tp": (lambda **own: ModelParallelStrategy(**own, **sizes), both, ranks // 2),
    }
    return found


def quiet(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "accelerator": "cpu", "max_epochs": EPOCHS, "default_root_dir": folder, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, **options,
    }  # fmt: skip


def whole(trainer: fulmen.Trainer) -> dict[str, torch.Tensor]:
    backend, placed = trainer.strategy.backend, trainer.strategy.model
    if hasattr(backend, "module_state"):
        return dict(backend.module_state(placed, full=True))
    return {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}


def by_trainer(folder: Path, ranks: int, name: str, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    make, parallelize, parts = strategies(ranks)[name]
    trainer = fulmen.Trainer(
        devices=ranks, strategy=make(), precision=precision, accumulate_grad_batches=WINDOW, gradient_clip_val=0.4,
        **quiet(folder),
    )  # fmt: skip
    model = Model(parallelize)
    trainer.fit(model, DataLoader(samples(), batch_size=SAMPLES // WINDOW // parts))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return whole(trainer), metrics


def by_fabric(folder: Path, ranks: int, name: str, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    make, parallelize, parts = strategies(ranks)[name]
    strategy = make() if parallelize is None else make(parallelize_fn=parallelize)
    fabric = fulmen.Fabric(accelerator="cpu", devices=ranks, strategy=strategy, precision=precision)
    fabric.launch()
    torch.manual_seed(0)
    with fabric.init_module():
        body = Body()
    optimizer = torch.optim.SGD(body.parameters(), lr=0.2, momentum=0.9)
    model, optimizer = fabric.setup(body, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(samples(), batch_size=SAMPLES // WINDOW // parts))
    norms = []
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            last = index == WINDOW - 1
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(F.cross_entropy(model(x).float(), y) / WINDOW)
        norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.4)))
        optimizer.step()
        optimizer.zero_grad()
    state = {f"body.{key}": value.detach().clone() for key, value in model.state_dict().items()}
    if hasattr(fabric.strategy, "module_state"):
        state = {f"body.{key}": value for key, value in fabric.strategy.module_state(model.placed, full=True).items()}
    return state, {"norms": norms}


def main(folder: Path, ranks: int) -> None:
    told: dict[str, Any] = {}
    rank = 0
    for name in strategies(ranks):
        for precision in PRECISIONS:
            for kind, run in (("trainer", by_trainer), ("fabric", by_fabric)):
                state, numbers = run(folder, ranks, name, precision)
                if torch.distributed.is_initialized():
                    rank = torch.distributed.get_rank()
                if rank == 0:
                    torch.save(state, folder / f"{ranks} {name} {precision} {kind}.pt")
                    told[f"{name} {precision} {kind}"] = numbers
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
