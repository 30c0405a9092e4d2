"""One rank of a fit that may be ended early; run by ``test_preemption.py``, as srun or fulmen's own launcher runs it.

``python preemption_script.py '{"root": ..., ...}'``: see ``OPTIONS`` for what the argument holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

OPTIONS: dict[str, Any] = {
    "root": None,  # default_root_dir
    "ranks": 2,
    "seed": 3,
    "asked": [],  # ranks that get a signal ...
    "at": 0,  # ... at the end of this step, by their own count
    "signal": "SIGUSR1",
    "pause_s": [0.0],  # rank by rank: how long a batch takes, so that ranks are apart
    "workers": 0,
    "on_exception": False,
    "max_time": None,
    "ckpt_path": None,
}


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Asks(Callback):
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, "started")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        pauses = self.options["pause_s"]
        time.sleep(pauses[trainer.global_rank % len(pauses)])
        if trainer.global_step == self.options["at"] and trainer.global_rank in self.options["asked"]:
            os.kill(os.getpid(), signal.Signals[self.options["signal"]])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.write(trainer, type(exception).__name__)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, "end")

    def write(self, trainer: Any, event: str) -> None:
        path = Path(self.options["root"]) / f"rank{trainer.global_rank}"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"{event} {trainer.global_step}\n")


class Ledger:
    """A logger that writes down how its runs ended."""

    name, version = "ledger", 0

    def __init__(self, root: str) -> None:
        self.path = Path(root) / "finalized"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{status}\n")


def digest(trainer: fulmen.Trainer) -> str:
    """Of weights and optimizer."""
    found = hashlib.sha256()
    states = trainer.optimizers[0].state_dict()["state"].values()
    for value in [*trainer.lightning_module.state_dict().values(), *(v for entry in states for v in entry.values())]:
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    options = {**OPTIONS, **json.loads(sys.argv[1])}
    warnings.simplefilter("ignore")
    torch.manual_seed(options["seed"])
    saver = OnExceptionCheckpoint(options["root"]) if options["on_exception"] else None
    if options["max_time"]:
        saver = ModelCheckpoint(options["root"], save_last=True)
    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=options["ranks"],
        max_epochs=4 if not options["max_time"] else 1000,
        max_time=options["max_time"],
        log_every_n_steps=3,
        logger=Ledger(options["root"]),
        callbacks=[Asks(options), *([saver] if saver else [])],
        enable_checkpointing=saver is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options["root"],
    )
    data = TensorDataset(torch.randn(80, 4, generator=torch.Generator().manual_seed(1)))
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=options["workers"])
    trainer.fit(Model(), loader, ckpt_path=options["ckpt_path"])
    if trainer.is_global_zero:
        (Path(options["root"]) / "digest").write_text(digest(trainer))


if __name__ == "__main__":
    main()
