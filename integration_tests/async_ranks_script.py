"""Trains on two gloo ranks and saves asynchronously: ``async_ranks_script.py FOLDER IO RESUME``.

IO is a name in ``IOS``; those with "shards" train by FSDP and keep two checkpoints and the last one. RESUME is a
checkpoint, ``-``, ``blocked`` or ``fabric``. Each rank writes down the digest of its end, or its error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, ModelCheckpoint
from fulmen.plugins import AsyncCheckpointIO, SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen.strategies import FSDPStrategy

IOS: dict[str, Any] = {
    "torch": TorchCheckpointIO,
    "safetensors": SafetensorsCheckpointIO,
    "asynchronous torch": lambda: AsyncCheckpointIO(TorchCheckpointIO()),
    "asynchronous safetensors": lambda: AsyncCheckpointIO(SafetensorsCheckpointIO()),
    "shards": ShardedCheckpointIO,
    "asynchronous shards": AsyncCheckpointIO,
}


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Blocks(Callback):
    """Puts a file where the folder of the next checkpoints should be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and batch_idx == 2:
            trainer.checkpoint_callback.dirpath = str(self.folder / "file" / "saves")
            (self.folder / "file").touch()


def digest(trainer: Any, model: nn.Module) -> str:
    moments = [v for entry in trainer.optimizers[0].state_dict()["state"].values() for v in entry.values()]
    found = hashlib.sha256()
    for value in (*model.state_dict().values(), *moments):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found.update(whole.numpy().tobytes())
    return found.hexdigest()


def sharding() -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={nn.Linear}, state_dict_type="sharded")


def by_fabric(folder: Path) -> None:
    """Save, go on training, and close: what was saved is there, and the closing of all communication waits for it."""
    fabric = fulmen.Fabric(accelerator="cpu", devices=2, strategy=sharding(), plugins=AsyncCheckpointIO())
    fabric.launch()
    fabric.seed_everything(4, verbose=False)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 500_000))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    before = [parameter.full_tensor().clone() for parameter in net.parameters()]
    for number in range(3):
        fabric.save(folder / "saves" / "a.ckpt", {"model": model, "number": number})
        fabric.backward(model(torch.ones(1, 8)).mean())
        optimizer.step()
        optimizer.zero_grad()
    rest = fabric.load(folder / "saves" / "a.ckpt", {"model": model})
    fabric.save(folder / "saves" / "b.ckpt", {"model": model, "number": 7})
    rank = fabric.global_rank
    fabric.close()
    found: dict[str, Any] = TorchCheckpointIO().load_checkpoint(folder / "saves" / "b.ckpt")
    changed = [not torch.equal(old, new) for old, new in zip(before, found["model"].values(), strict=True)]
    report = {"number": rest["number"], "last": found["number"], "changed": changed}
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def main(folder: Path, kind: str, resume: str) -> None:
    fulmen.seed_everything(4, verbose=False)
    keeps: dict[str, Any] = {"save_top_k": -1}
    if "shards" in kind:
        keeps = {"save_top_k": 2, "monitor": "step", "mode": "max", "save_last": True}
    saves = ModelCheckpoint(folder / "saves", filename="{step}", every_n_train_steps=1, **keeps)
    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=sharding() if "shards" in kind else "ddp",
        max_epochs=2,
        accumulate_grad_batches=2,
        callbacks=[saves, *([Blocks(folder)] if resume == "blocked" else [])],
        plugins=[IOS[kind]()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randint(0, 3, (40,), generator=generator))
    model, report = Model(), {}
    path = None if resume in ("-", "blocked") else resume
    try:
        trainer.fit(model, DataLoader(data, 4, shuffle=True), ckpt_path=path)
        report["digest"] = digest(trainer, model)
        report["writer"] = getattr(getattr(trainer.strategy.checkpoint_io, "_process", None), "pid", None)
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[3] == "fabric":
        by_fabric(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
