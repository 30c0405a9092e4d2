"""One training of the `train` drill, in a process that may be killed: ``train_run.py CONFIGURATION FOLDER``.

It goes on from the newest whole checkpoint in the folder, writes ``began-N`` there when batches begin, and when it ends
``done.json`` with the digest of weights and optimizers.
"""

import hashlib
import json
import os
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import fulmen
from fulmen.callbacks import Callback, EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from fulmen_data import SeededDataset

EPOCHS, SAMPLES, BATCH = 3, 46, 4
PAUSE_S = 0.02
"""A batch takes that long at least, so that there is time to be killed in."""

# What is trained differently; what is not named is as in Model and train().
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dropout, no workers": {},
    "2 workers, augmented": {"workers": 2, "augments": True},
    "accumulation 3, saves inside windows": {"accumulate": 3, "saves_each_batch": True},
    "fp16 with scaler, 2 workers, accumulation 3": {"precision": "16-mixed", "workers": 2, "accumulate": 3},
    "bf16, EMA of the weights": {"precision": "bf16-mixed", "ema": True},
    "two optimizers": {"two_optimizers": True},
    "2 gloo ranks, accumulation 3": {"ranks": 2, "accumulate": 3, "saves_each_batch": True},
    "schedules change in mid-epoch": {"schedules": True},
}


class Data(Dataset[Any]):
    """Numbers with classes; some draw noise when they are read."""

    def __init__(self, samples: int, augments: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(samples, 8, generator=generator)
        self.y = torch.randint(0, 3, (samples,), generator=generator)
        self.augments = augments

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(8) * random.random() if self.augments else 0.0
        return self.x[index] + noise, self.y[index]


class Model(fulmen.LightningModule):
    """A small network with dropout, whose loss is logged over the epoch."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))
        self.automatic_optimization = not options.get("two_optimizers")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(PAUSE_S)
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        if self.automatic_optimization:
            return loss
        first, second = self.optimizers()
        self.manual_backward(loss)
        # One steps at every batch, the other gathers gradients over two.
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.options.get("two_optimizers"):
            parts = self.net[:2].parameters(), self.net[2:].parameters()
            return [torch.optim.Adam(parts[0], lr=0.01), torch.optim.SGD(parts[1], lr=0.05, momentum=0.9)]
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if not self.options.get("schedules"):
            return optimizer
        by_step = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 7),
                torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            ],
            [7],
        )
        watching = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return [optimizer], [
            {"scheduler": by_step, "interval": "step"},
            {"scheduler": watching, "monitor": "val_loss", "interval": "epoch"},
        ]


class Began(Callback):
    """Tells the drill that batches begin, and how often that was so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            (self.folder / f"began-{len(list(self.folder.glob('began-*')))}").touch()


class SavesEachBatch(Callback):
    """Saves after every batch, inside accumulation windows too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")


def digest(trainer: Any, model: nn.Module) -> str:
    """Of every tensor and number in weights and optimizers, in order."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(str(value.dtype).encode() + value.detach().float().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(model.state_dict())
    for optimizer in trainer.optimizers:
        add(optimizer.state_dict())
    return found.hexdigest()


def train(name: str, folder: Path) -> None:
    options = CONFIGURATIONS[name]
    fulmen.seed_everything(5, verbose=False)
    callbacks: list[Any] = [Began(folder)]
    if options.get("ema"):
        callbacks.append(EMAWeightAveraging(decay=0.9))
    if options.get("schedules"):
        callbacks.append(GradientAccumulationScheduler({0: 2, 1: 1, 2: 3}))
    if options.get("saves_each_batch"):
        callbacks.append(SavesEachBatch(folder))
    callbacks.append(
        ModelCheckpoint(dirpath=folder, filename="kept", every_n_train_steps=2, save_last=True, save_top_k=1)
        if not options.get("saves_each_batch")
        else ModelCheckpoint(dirpath=folder, save_top_k=0)
    )
    ranks = options.get("ranks", 1)
    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision=options.get("precision"),
        max_epochs=EPOCHS,
        accumulate_grad_batches=options.get("accumulate", 1),
        val_check_interval=5 if options.get("schedules") else None,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(folder),
    )
    model = Model(options)
    data: Any = Data(SAMPLES, bool(options.get("augments")))
    if options.get("augments"):
        data = SeededDataset(data)
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=options.get("workers", 0))
    trainer.fit(model, loader, DataLoader(Data(9, False), 5), ckpt_path="last")
    if trainer.is_global_zero:
        result = {"digest": digest(trainer, model), "steps": trainer.global_step}
        (folder / "done.tmp").write_text(json.dumps(result))
        os.replace(folder / "done.tmp", folder / "done.json")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]))
