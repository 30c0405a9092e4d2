"""A pipeline of two stages on two gloo ranks: trains, saves, goes on from the file; rank 0 writes what came out.

``python pipeline_script.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.strategies import ModelParallelStrategy

LAYERS, SAMPLES, BATCH, MICROBATCHES, EPOCHS = 4, 16, 8, 4, 3


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=generator), torch.randn(SAMPLES, 6, generator=generator))


def layer(index: int) -> nn.Module:
    torch.manual_seed(index)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh())


class Part(nn.Module):
    """Some of the layers, under the names that they have in the whole model."""

    def __init__(self, indices: range) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): layer(index) for index in indices})

    def forward(self, x: Tensor) -> Tensor:
        for one in self.layers.values():
            x = one(x)
        return x


class Pipelined(fulmen.LightningModule):
    """As the guide shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[Any] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh["pipeline_parallel"]
        stage, stages = mesh.get_local_rank(), mesh.size()
        each = LAYERS // stages
        self.part = Part(range(stage * each, (stage + 1) * each))
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        pipeline = PipelineStage(self.part, stage, stages, self.device, group=mesh.get_group())
        self.schedule = Schedule1F1B(pipeline, n_microbatches=MICROBATCHES, loss_fn=F.mse_loss)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.seen.append(x[:, 0].tolist())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses: list[Tensor] = []
        self.schedule.step(*([x] if self.is_first else []), **({"target": y, "losses": losses} if self.is_last else {}))
        self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()
        if self.is_last:
            self.log("loss", torch.stack(losses).mean(), on_step=False, on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.part.parameters(), lr=0.05)


def trainer_for(folder: Path, epochs: int) -> fulmen.Trainer:
    return fulmen.Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(pipeline_parallel_size=2), max_epochs=epochs,
        default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def main(folder: Path) -> None:
    loader = DataLoader(samples(), batch_size=BATCH, shuffle=True)
    told: dict[str, Any] = {}
    torch.manual_seed(11)
    trainer, model = trainer_for(folder, EPOCHS), Pipelined()
    trainer.fit(model, loader)
    trainer.save_checkpoint(folder / "whole.ckpt")
    told["seen"], told["loss"] = model.seen, float(trainer.callback_metrics["loss"])

    torch.manual_seed(11)
    trainer, model = trainer_for(folder, EPOCHS - 1), Pipelined()
    trainer.fit(model, loader)
    trainer.save_checkpoint(folder / "part.ckpt")
    trainer, model = trainer_for(folder, EPOCHS), Pipelined()
    trainer.fit(model, loader, ckpt_path=folder / "part.ckpt")
    trainer.save_checkpoint(folder / "resumed.ckpt")
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
