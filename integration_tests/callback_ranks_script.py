"""Callbacks that save, stop and write predictions, on two gloo processes; each rank reports what it saw as JSON.

``python callback_ranks_script.py FOLDER`` runs everything; ``... FOLDER alone`` lets rank 1 fail by itself.
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
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, SubsetRandomSampler

import fulmen
from fulmen.callbacks import BasePredictionWriter, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

# Each rank has its own opinion: what rank 0 and rank 1 log in each validation.
VALUES = ([0.5, 0.4, 0.3, 0.2], [0.5, 0.6, 0.2, 0.9])


class Model(fulmen.LightningModule):
    def __init__(self, values: Any = VALUES, fail_at: int = -1, only_rank: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.values, self.fail_at, self.only_rank = values, fail_at, only_rank
        self.validations = self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.steps == self.fail_at and self.only_rank in (None, self.global_rank):
            raise LookupError("on purpose")
        self.steps += 1
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self.values[self.global_rank][self.validations], batch_size=1)
        if self.global_rank == 0:
            self.log("only_zero", self.values[0][self.validations], batch_size=1, rank_zero_only=True)

    def on_validation_epoch_end(self) -> None:
        self.validations += 1

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch * 10

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epoch: list[Any] = []

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int,
        dataloader_idx: int,
    ) -> None:  # fmt: skip
        self.batches.append([batch_indices, prediction.tolist(), dataloader_idx])

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch = batch_indices


def trainer(folder: Path, *callbacks: Any, **options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
        **{"max_epochs": 4, "enable_checkpointing": bool(callbacks), **options},
    )


def loader(rows: int) -> Any:
    return DataLoader(torch.ones(rows, 1))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def predictions(folder: Path) -> dict[str, Any]:
    values = torch.arange(7)
    few = torch.arange(1)
    loaders: dict[str, Any] = {
        "plain": DataLoader(values, batch_size=2),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "drop_last": DataLoader(values, batch_size=2, drop_last=True),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "shuffle": DataLoader(values, batch_size=2, shuffle=True),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "sampler": DataLoader(values, batch_size=2, sampler=SubsetRandomSampler([6, 1, 4])),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "batch_sampler": DataLoader(
            values,  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
            batch_sampler=BatchSampler(SequentialSampler(values), 3, drop_last=False),
        ),
        "fewer samples than ranks": DataLoader(few, batch_size=2),  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        "several": [DataLoader(values, batch_size=2), DataLoader(few)],  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
    }
    found: dict[str, Any] = {}
    for name, made in loaders.items():
        writer = Writer()
        run = trainer(folder, writer, enable_checkpointing=False)
        returned = run.predict(Model(), made)
        assert returned is not None
        lists = returned if name == "several" else [returned]
        found[name] = {
            "batches": writer.batches,
            "epoch": writer.epoch,
            "returned": [[batch.tolist() for batch in each] for each in lists],
        }
    return found


def everything(folder: Path) -> None:
    run = trainer(folder, enable_checkpointing=False, max_epochs=1)
    run.fit(Model(), loader(2), loader(2))  # starts the other process
    rank = run.global_rank
    result: dict[str, Any] = {"predictions": predictions(folder)}

    own_root = folder / f"rank{rank}"
    keep = ModelCheckpoint(monitor="value", filename="{epoch}", save_last=True)
    trainer(own_root, keep).fit(Model(), loader(4), loader(2))
    result["kept"] = {
        "folder": os.path.relpath(str(keep.dirpath), folder),
        "best": os.path.relpath(keep.best_model_path, folder),
        "ranked": [os.path.relpath(path, folder) for path in keep.best_k_models],
        "last": os.path.relpath(keep.last_model_path, folder),
        "files": sorted(os.listdir(folder / "rank0" / "checkpoints")),
    }
    again = trainer(own_root, ModelCheckpoint(save_last=True), max_epochs=4)
    model = Model()
    again.fit(model, loader(4), loader(2), ckpt_path="last")
    result["resumed"] = {"from": os.path.relpath(str(again.ckpt_path), folder), "steps": model.steps}

    watching = [
        ModelCheckpoint(folder / "zero", "{epoch}", monitor="only_zero", mode="max"),
        EarlyStopping("only_zero", mode="max", patience=2),
    ]
    watched = trainer(folder, *watching)
    watched.fit(Model(), loader(4), loader(2))
    result["only_zero"] = {"files": sorted(os.listdir(folder / "zero")), "step": watched.global_step}

    stop = EarlyStopping("value", patience=1)
    stopped = trainer(folder, stop, enable_checkpointing=False)
    stopped.fit(Model(([0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.9, 0.9])), loader(4), loader(2))
    result["stopped"] = {
        "epoch": stop.stopped_epoch,
        "step": stopped.global_step,
        "reason": stop.stopping_reason.name,
        "message": stop.stopping_reason_message,
    }

    saver, on_exception = ModelCheckpoint(folder / "x", save_on_exception=True), OnExceptionCheckpoint(folder)
    failed = trainer(folder, saver, on_exception)
    try:
        failed.fit(Model(fail_at=1), loader(6))
    except LookupError as error:
        result["failed"] = getattr(error, "__notes__", [])
    result["saved"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*step=1.ckpt"))
    result["on_exception"] = torch.load(on_exception.ckpt_path, weights_only=True)["global_step"]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


def alone(folder: Path) -> None:
    callbacks = [ModelCheckpoint(folder / "x", save_on_exception=True), OnExceptionCheckpoint(folder)]
    trainer(folder, *callbacks).fit(Model(fail_at=1, only_rank=1), loader(6))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    (alone if sys.argv[2:] == ["alone"] else everything)(Path(sys.argv[1]))
