"""A small training on several ranks, one of which fails: ``python failure_run.py FAULT CULPRIT RANKS FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen_strategies import DDPStrategy

FAULT, CULPRIT, RANKS, FOLDER = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
AT_BATCH = 5
STALL_LIMIT_S = 8


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def fail() -> None:
    """Now, if this is the rank that is to fail."""
    if rank() != CULPRIT:
        return
    (FOLDER / "failed-at").write_text(str(time.time()))
    if FAULT == "sys.exit(3)":
        sys.exit(3)
    if FAULT == "os._exit(7)":
        os._exit(7)
    if FAULT == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "SIGSEGV":
        os.kill(os.getpid(), signal.SIGSEGV)
    if FAULT in ("hang in Python", "hang in a callback"):
        while True:
            time.sleep(0.1)
    raise LookupError(f"sample 7 is missing on rank {rank()}")


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 32 * RANKS

    def __getitem__(self, index: int) -> Tensor:
        if FAULT == "raise in a loader's worker" and 20 <= index < 24:
            fail()
        return torch.full((3,), float(index))


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        is_due = batch_idx == AT_BATCH
        if is_due and FAULT in ("raise in training_step", "sys.exit(3)", "os._exit(7)", "SIGKILL", "SIGSEGV"):
            fail()
        if is_due and FAULT == "hang in Python":
            fail()
        loss: Tensor = self.layer(batch).square().mean()
        if is_due and FAULT == "raise in a backward hook":
            loss.register_hook(lambda _: fail())  # type: ignore[no-untyped-call]
        if FAULT == "hang in a callback":  # the others wait where ranks agree on what is reduced, at every row
            self.log("loss", loss, sync_dist=True)
        if FAULT == "one collective skipped":
            if is_due and rank() == CULPRIT:
                (FOLDER / "failed-at").write_text(str(time.time()))
            else:
                dist.all_reduce(torch.ones(7))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if FAULT == "raise in validation_step" and self.global_step:
            fail()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if FAULT == "raise while saving":
            fail()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Watcher(fulmen.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if FAULT in ("raise in a callback", "hang in a callback") and batch_idx == AT_BATCH:
            fail()


def main() -> None:
    warnings.simplefilter("ignore")
    (FOLDER / f"pid-{rank()}").write_text(str(os.getpid()))
    workers = 1 if FAULT == "raise in a loader's worker" else 0
    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=DDPStrategy(timeout=timedelta(seconds=STALL_LIMIT_S)),
        max_epochs=2,
        default_root_dir=FOLDER,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1 if FAULT == "hang in a callback" else 50,
        use_distributed_sampler=True,
        callbacks=[Watcher(), ModelCheckpoint(FOLDER / "saved")],
    )
    data = Numbers()
    trainer.fit(Model(), DataLoader(data, batch_size=4, num_workers=workers), DataLoader(data, batch_size=16))


if __name__ == "__main__":
    main()
