"""Trains some epochs under a package with Lightning's names, from a checkpoint or from nothing; prints losses as JSON.

``python checkpoint_continuation_runner.py LIBRARY EPOCHS SAVE_TO [CKPT_PATH]``
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(library_name: str, epochs: int, save_to: str, ckpt_path: str | None) -> None:
    library = importlib.import_module(library_name)
    losses: list[float] = []

    class Net(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x), y)
            losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0 if ckpt_path is None else 99)
    model = Net()
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    trainer = library.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    trainer.save_checkpoint(save_to)
    print(json.dumps({"losses": losses, "step": trainer.global_step, "epoch": trainer.current_epoch}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
