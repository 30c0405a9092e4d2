"""Trains on two gloo processes with a callback that changes weights or optimizers; each rank writes what it has.

``python weights_ranks_script.py FOLDER CASE DEVICES``: with one device, the same training on whole batches.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 16


def dataset(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def main(folder: str, case: str, devices: int) -> None:
    import fulmen
    from fulmen.callbacks import (
        BackboneFinetuning,
        EMAWeightAveraging,
        GradientAccumulationScheduler,
        ModelPruning,
        StochasticWeightAveraging,
    )

    class Model(fulmen.LightningModule):
        def __init__(self, *, batch_norm: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            norm: nn.Module = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
            self.backbone = nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU())
            self.head = nn.Linear(8, 3)
            self.validated: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.validated.append({name: value.clone() for name, value in self.state_dict().items()})

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    class Records(fulmen.Callback):
        """The parameters after each step."""

        def __init__(self) -> None:
            self.steps: list[Any] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.steps.append([p.detach().clone() for p in pl_module.parameters()])

    # Every epoch is one batch of all samples, or two with half of them on each rank: the same gradient.
    makers: dict[str, tuple[Any, bool, int, int]] = {
        "ema": (lambda: EMAWeightAveraging(decay=0.5), True, 4, 3),
        "swa": (lambda: StochasticWeightAveraging(0.05, 2), True, 4, 3),
        "swa plain": (lambda: StochasticWeightAveraging(0.05, 2), False, SAMPLES, 4),
        "backbone": (lambda: BackboneFinetuning(2), False, SAMPLES, 5),
        "accumulation": (lambda: GradientAccumulationScheduler({1: 2}), False, SAMPLES // 2, 3),
        "pruning": (lambda: ModelPruning("random_unstructured", amount=0.3, resample_parameters=True), False, 4, 3),
    }
    make, batch_norm, batch_size, epochs = makers[case]
    records = Records()
    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=epochs,
        callbacks=[records, make()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = Model(batch_norm=batch_norm)
    torch.manual_seed(7 + int(os.environ.get("LOCAL_RANK", "0")))  # ranks draw differently
    trainer.fit(
        model, DataLoader(dataset(SAMPLES), batch_size=batch_size // devices, shuffle=True), DataLoader(dataset(6), 3)
    )
    trainer.save_checkpoint(Path(folder, "saved.ckpt"))
    kept = {"state": dict(model.state_dict()), "validated": model.validated, "steps": records.steps}
    torch.save(kept, Path(folder, f"rank{trainer.global_rank}.pt"))
    time.sleep(0.1)  # a thread of gloo may still need the GIL; it aborts the process if the interpreter is gone


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
