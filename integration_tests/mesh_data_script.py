"""What four ranks on a mesh read, draw and log; each writes it down. ``python mesh_data_script.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

import fulmen
from fulmen.callbacks import Callback
from fulmen.strategies import ModelParallelStrategy

SIZE, BATCH, EPOCHS = 24, 2, 2


class Indices(Dataset[Any]):
    """Each sample with a number that the data set draws when it is read."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index, torch.rand(()), torch.full((3,), float(index))


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer: Any = None
        self.total = torchmetrics.SumMetric()
        self.read: list[Any] = []
        self.drawn: list[float] = []

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Linear(3, 1)
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.read.append([self.current_epoch, batch_idx, batch[0].tolist(), batch[1].tolist()])
        self.drawn.append(torch.rand(()).item())
        self.total.update(batch[0].float().sum())
        self.log("object", self.total, on_step=False, on_epoch=True)
        self.log("sum", batch[0].float().sum(), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("mean", batch[0].float().mean(), on_step=False, on_epoch=True, sync_dist=True)
        self.log("step", batch[0].float().sum(), on_step=True, on_epoch=False, sync_dist=True, reduce_fx="sum")
        return self.layer(batch[2]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class StopsAfter(Callback):
    """Saves in the middle of an epoch."""

    def __init__(self, batches: int, path: Path) -> None:
        self.left, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def fit(folder: Path, data: int, *callbacks: Any, workers: int = 0, **options: Any) -> dict[str, Any]:
    trainer = fulmen.Trainer(
        accelerator="cpu", devices=4, strategy=ModelParallelStrategy(data_parallel_size=data), max_epochs=EPOCHS,
        callbacks=list(callbacks), default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    model = Model()
    torch.manual_seed(100 + int(os.environ.get("LOCAL_RANK", "0")))  # the ranks have drawn different things so far
    loader = DataLoader(Indices(), batch_size=BATCH, shuffle=True, num_workers=workers)
    with suppress(KeyboardInterrupt):
        trainer.fit(model, loader, **options)
    return {
        "read": model.read,
        "drawn": model.drawn,
        "kwargs": trainer.distributed_sampler_kwargs,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def by_fabric(data: int) -> list[Any]:
    fabric = fulmen.Fabric(
        accelerator="cpu",
        devices=4,
        strategy=ModelParallelStrategy(lambda module, mesh: module, data_parallel_size=data),
    )
    fabric.launch()
    loader = fabric.setup_dataloaders(DataLoader(Indices(), batch_size=BATCH, shuffle=True))
    return [[batch[0].tolist(), batch[1].tolist()] for batch in loader]


def main(folder: Path) -> None:
    told: dict[str, Any] = {"two parts": fit(folder, 2), "one part": fit(folder, 1)}
    told["fabric"] = by_fabric(2)
    fulmen.seed_everything(3, workers=True, verbose=False)
    told["workers"] = fit(folder, 2, workers=1)
    del os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]
    told["begun"] = fit(folder, 2, StopsAfter(SIZE // (2 * BATCH) + 2, folder / "saved"))
    for data in (1, 2, 4):
        told[f"resumed on {data}"] = fit(folder, data, ckpt_path=folder / "saved")
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
