"""What ``fulmen run`` and torchrun start in ``test_fulmen_run.py``: ``run_script.py TASK FOLDER``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, ModelCheckpoint

VARIABLES = ("LT_", "MASTER_", "FULMEN_TRAINER_", "OMP_", "TORCH_DISABLE", "TORCHELASTIC_RESTART_COUNT")


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Lives(Callback):
    """Writes down each life's steps, and ends the process of rank 1 in the middle of each but the last."""

    def __init__(self, folder: Path, lives: int, kill: str) -> None:
        self.folder, self.lives, self.kill = folder, lives, kill
        self.life = 1 + len(list(folder.glob(f"life-*-{os.environ['RANK']}")))
        self.steps: list[int] = []
        (folder / f"life-{self.life}-{os.environ['RANK']}").write_text(str(os.getpid()))

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.life < self.lives and trainer.global_step == 3 * self.life and trainer.global_rank == 1:
            if self.kill == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise LookupError(f"sample 7 is missing in life {self.life}")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def train(folder: Path, lives: int, kill: str, **options: Any) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(96, 4, generator=torch.Generator().manual_seed(2)))
    watch = Lives(folder, lives, kill)
    saver = ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_last=True)
    trainer = fulmen.Trainer(
        max_epochs=3 if lives < 5 else 6,
        callbacks=[watch, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    model = Model()
    trainer.fit(model, DataLoader(data, batch_size=6, shuffle=True), ckpt_path="last")
    result = {
        "life": watch.life, "steps": watch.steps, "world_size": trainer.world_size, "epoch": trainer.current_epoch,
        "weight": model.layer.weight.tolist(),
    }  # fmt: skip
    (folder / f"trained-{trainer.global_rank}.json").write_text(json.dumps(result))


def fabric(folder: Path) -> None:
    fabric = fulmen.Fabric()
    fabric.launch()
    total = fabric.all_reduce(torch.tensor(float(fabric.global_rank + 1)), reduce_op="sum")
    result = {
        "rank": fabric.global_rank, "world_size": fabric.world_size, "total": float(total), "argv": sys.argv[1:],
        "strategy": type(fabric.strategy).__name__, "precision": fabric.precision.precision, "name": __name__,
        "device": str(fabric.device), "parent": os.getppid(), "file": __file__,
        "local_rank": fabric.local_rank, "node_rank": fabric.node_rank,
        "env": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
    }  # fmt: skip
    (folder / f"fabric-{fabric.global_rank}.json").write_text(json.dumps(result))


def shards(folder: Path) -> None:
    """Trains a sharded model for a few steps and saves it: a folder, of which each rank writes its part."""
    fabric = fulmen.Fabric()
    fabric.launch()
    torch.manual_seed(1)
    model = fabric.setup_module(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)))
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
    fabric.save(folder / "shards", {"model": model, "optimizer": optimizer, "step": 2})


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "fabric":
        fabric(folder)
    elif task == "shards":
        shards(folder)
    elif task == "exit":
        sys.exit(7 if os.environ["RANK"] == "1" else 0)
    elif task == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"hangs-{os.environ['RANK']}").write_text(str(os.getpid()))
        while os.environ["RANK"] == "0":
            time.sleep(1)
        while not (folder / "hangs-0").exists():
            time.sleep(0.05)
        (folder / "failed-at").write_text(str(time.time()))
        raise LookupError("sample 7 is missing")
    elif task == "wait":
        fulmen.Fabric().launch()
        (folder / f"waits-{os.environ['RANK']}").write_text(str(os.getpid()))
        time.sleep(600)
    else:
        train(folder, int(sys.argv[3]), task)


if __name__ == "__main__":
    main()
