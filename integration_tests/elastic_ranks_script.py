"""Trains on some gloo ranks, in part or to the end, and writes down which samples each rank read.

``python elastic_ranks_script.py FOLDER RANKS KIND STOP RESUME``: STOP batches and a checkpoint, 0 to train to the end;
of KIND "max_steps" the fit ends there, and the checkpoint is saved after it.
RESUME is a checkpoint or ``-``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import fulmen
from fulmen.callbacks import Callback

SIZE, BATCH, EPOCHS = 48, 2, 3


class Indices(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index, torch.full((3,), float(index))


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.read: list[tuple[int, int, list[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.read.append((self.current_epoch, batch_idx, batch[0].tolist()))
        loss = self.layer(batch[1]).square().mean()
        self.log("mean_index", batch[0].float().mean(), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-5, momentum=0.9)


class StopsAfter(Callback):
    def __init__(self, batches: int, path: str) -> None:
        self.left, self.path = batches, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            pl_module.saved_weights = [p.detach().clone() for p in pl_module.parameters()]
            raise KeyboardInterrupt


class Starts(Callback):
    """Notes the state in which training goes on."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = [p.tolist() for p in pl_module.parameters()]
        momenta = [entry["momentum_buffer"] for entry in trainer.optimizers[0].state_dict()["state"].values()]
        self.momenta = [value.tolist() for value in momenta if value is not None]


def main(folder: str, ranks: int, kind: str, stop: int, resume: str) -> None:
    fulmen.seed_everything(4, verbose=False)
    starts = Starts()
    ends = stop > 0 and kind == "max_steps"
    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=EPOCHS,
        max_steps=stop if ends else -1,
        callbacks=[starts, *([StopsAfter(stop, f"{folder}/saved.ckpt")] if stop and not ends else [])],
        use_distributed_sampler=kind != "user's sampler",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Model()
    data = Indices()
    sampler: Any = None
    if kind == "user's sampler":
        sampler = DistributedSampler(data, ranks, trainer.global_rank)
    loader = DataLoader(data, BATCH, shuffle=sampler is None, sampler=sampler)
    report: dict[str, Any] = {}
    try:
        trainer.fit(module, loader, ckpt_path=None if resume == "-" else resume)
        if ends:
            trainer.save_checkpoint(f"{folder}/saved.ckpt")
    except KeyboardInterrupt:
        report["saved"] = [value.tolist() for value in module.saved_weights]
    except ValueError as error:
        report["refused"] = str(error)
    report |= {
        "read": module.read,
        "weights": getattr(starts, "weights", None),
        "momenta": getattr(starts, "momenta", None),
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    Path(folder, f"rank{trainer.global_rank}-of-{ranks}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
