"""A row after every step on two GPUs, where waiting for a device is an error: ``SCRIPT STRATEGY FOLDER``.

Rank 0 writes the rows that its logger got and the losses of both ranks, read after the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fulmen
from fulmen.callbacks import LearningRateMonitor

STEPS = 14


class Rows(fulmen.loggers.CSVLogger):
    """Keeps what it is given, too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.rows.append(dict(metrics))


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # The first steps load kernels, set up communication and agree on what is logged; the last one ends the epoch.
        torch.cuda.set_sync_debug_mode("error" if 3 < batch_idx < STEPS - 1 else "default")
        loss: Tensor = self.layers(batch + self.global_rank).square().mean()
        self.losses.append(loss.detach().clone())
        self.log("own", loss, prog_bar=True)
        self.log("mean", loss, sync_dist=True, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def main(strategy: str, folder: Path) -> None:
    torch.manual_seed(0)
    model, logger = Model(), Rows(folder)
    trainer = fulmen.Trainer(
        accelerator="cuda",
        devices=2,
        strategy=strategy,
        precision="bf16-mixed",
        max_epochs=1,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[LearningRateMonitor("step")],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, [torch.full((8, 64), 0.1 * step) for step in range(STEPS)])
    losses = trainer.strategy.all_gather(torch.stack(model.losses)).tolist()
    if trainer.is_global_zero:
        (folder / "found.json").write_text(json.dumps({"rows": logger.rows, "losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
