"""One rank of a fit, started by a real srun, mpirun or jsrun: ``cluster_script.py FOLDER DEVICES``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder: Path, devices: int) -> None:
    warnings.simplefilter("ignore")
    trainer = fulmen.Trainer(
        accelerator="cpu", devices=devices, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    torch.manual_seed(trainer.global_rank)
    model = Model()
    data = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)))
    trainer.fit(model, DataLoader(data, batch_size=4))
    environment = trainer.assembly.environment
    result = {
        "environment": type(environment).__name__, "place": [trainer.global_rank, trainer.local_rank,
        trainer.node_rank, trainer.world_size], "port": environment.main_port, "address": environment.main_address,
        "weight": model.layer.weight.tolist(), "steps": trainer.global_step,
    }  # fmt: skip
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
