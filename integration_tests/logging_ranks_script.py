"""One process of a run on several: logs what each rank knows, and writes what it saw to ``OUT/rank{r}.json``.

``python logging_ranks_script.py OUT NODES PER_NODE``. With one node the Trainer starts the other ranks; with several
each process is started as the first of its node.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from fulmen import Callback, LightningDataModule, LightningModule, Trainer
from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CSVLogger

OUT, NODES, PER_NODE = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "per_node"
SEEN: dict[str, Any] = {"prepared": [], "uploads": 0}


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.prepare_data_per_node = PER_NODE
        self.state = "untouched"

    def prepare_data(self) -> None:
        SEEN["prepared"].append("datamodule")
        self.state = "prepared here"

    def setup(self, stage: str) -> None:
        SEEN["state in setup"] = self.state

    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(24.0).reshape(12, 2), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.prepare_data_per_node = not PER_NODE

    def prepare_data(self) -> None:
        SEEN["prepared"].append("module")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rank = self.global_rank
        self.log("synced", float(10 * rank + batch_idx), on_step=True, on_epoch=True, sync_dist=True)
        self.log("weighted", float(rank), on_step=False, on_epoch=True, sync_dist=True, batch_size=1 + 2 * rank)
        self.log("largest", float(rank), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.log("mine", float(rank), on_step=False, on_epoch=True)
        self.log("stepwise", float(rank))
        if rank == 0:
            self.log("zero", 5.0, on_epoch=True, rank_zero_only=True, sync_dist=True)
        self.log(f"only_{rank}", float(rank), on_step=False, on_epoch=True, sync_dist=True)
        return self.layer(batch).square().mean()

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 1:
            self.log("late", 7.0, sync_dist=True)

    def on_train_start(self) -> None:
        rank = float(self.global_rank)
        gathered = self.all_gather({"a": torch.tensor([rank, 1.0]), "b": [rank, "text"]})
        SEEN["gathered"] = {"a": gathered["a"].tolist(), "b": [gathered["b"][0].tolist(), gathered["b"][1]]}
        weight = torch.tensor(2.0 + rank, requires_grad=True)
        (self.all_gather(weight, sync_grads=True) * torch.arange(1.0, 3.0)).sum().backward()
        SEEN["gradient"] = weight.grad.item()  # type: ignore[union-attr]  # known to be there
        self.print("printed once")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Uploads(CSVLogger):
    def after_save_checkpoint(self, checkpoint_callback: object) -> None:
        SEEN["uploads"] += 1


class Reads(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        SEEN["log_dir"] = trainer.log_dir if trainer.global_rank == 0 else None  # asked on one rank alone
        SEEN["log_dir_everywhere"] = trainer.log_dir


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trainer = Trainer(
        accelerator="cpu",
        devices=2 if NODES == 1 else 1,
        num_nodes=NODES,
        strategy="ddp",
        max_epochs=1,
        logger=Uploads(str(OUT), version=None),
        default_root_dir=OUT,
        callbacks=[ModelCheckpoint(OUT / "kept", save_top_k=-1), Reads()],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), datamodule=Data())

SEEN["metrics"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
SEEN["warnings"] = [str(w.message) for w in caught if "sync_dist" in str(w.message)]
SEEN["kinds"] = sorted({w.category.__name__ for w in caught if "sync_dist" in str(w.message)})
(OUT / f"rank{trainer.global_rank}.json").write_text(json.dumps(SEEN))
