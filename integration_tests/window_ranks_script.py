"""Saves inside accumulation windows of sharded strategies, and what resumes: ``window_ranks_script.py FOLDER RANKS``.

Two ranks save and go on; one rank then tries what they saved. Rank 0 writes what it found to ``FOLDER/RANKS.pt``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback
from fulmen.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from fulmen_protocols import CheckpointError

BATCHES, WINDOW = 6, 3
OPEN = (1, 2, 4)
"""After which batches a window is open."""


class Block(nn.Module):
    """A unit with parameters that FSDP cannot divide evenly, and one that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.unused = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.block: Any = None

    def configure_model(self) -> None:
        if self.block is None:
            torch.manual_seed(0)
            self.block, self.drop, self.head = Block(), nn.Dropout(0.2), nn.Linear(6, 3)
            if isinstance(self.trainer.strategy.backend, ModelParallelStrategy):
                mesh = self.device_mesh["tensor_parallel"]  # type: ignore[index]
                # Each rank normalizes its rows: sums of the norm's gradients over ranks stay pending.
                plan = {
                    "norm": SequenceParallel(sequence_dim=0),
                    "up": ColwiseParallel(input_layouts=Shard(0)),
                    "down": RowwiseParallel(),
                }
                parallelize_module(self.block, mesh, plan)
                rows = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))
                parallelize_module(self.block, mesh, rows)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.head(self.drop(self.block(batch[0]))).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Manual(Model):
    """Two optimizers, one of which gathers gradients over the window."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        often, rarely = self.optimizers()
        often.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        often.step()
        if batch_idx % WINDOW == WINDOW - 1:
            rarely.step()
            rarely.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.head.parameters(), lr=0.05),
            torch.optim.SGD(self.block.parameters(), lr=0.1, momentum=0.9),
        ]


class Saves(Callback):
    """After each of some batches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.count += 1
        if self.count in OPEN:
            trainer.save_checkpoint(self.folder / f"batch-{self.count}")


def fit(ranks: int, strategy: Any, model: Model, callbacks: list[Any], **options: Any) -> Any:
    make = torch.Generator().manual_seed(1)
    size = 2 * BATCHES * ranks
    data = TensorDataset(torch.randn(size, 6, generator=make), torch.randint(0, 3, (size,), generator=make))
    resume = options.pop("ckpt_path", None)
    if not isinstance(model, Manual):
        options["accumulate_grad_batches"] = WINDOW
    trainer = fulmen.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_epochs=1, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    torch.manual_seed(3 if resume is None else 99)
    trainer.fit(model, DataLoader(data, batch_size=2), ckpt_path=resume)
    return trainer


def outcome(trainer: Any) -> Any:
    backend, placed = trainer.strategy.backend, trainer.strategy.model
    if not hasattr(backend, "module_state"):
        weights = {name: value.detach().clone() for name, value in trainer.lightning_module.state_dict().items()}
        return weights, [optimizer.state_dict() for optimizer in trainer.optimizers]
    states = [dict(backend.optimizer_state(placed, each, full=True)) for each in trainer.optimizers]
    return dict(backend.module_state(placed, full=True)), states


def blocks(**options: Any) -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={Block}, **options)


CASES: dict[str, tuple[Any, type[Model], dict[str, Any]]] = {
    "once, one file": (blocks, Model, {}),
    "once, folder": (lambda: blocks(state_dict_type="sharded"), Model, {}),
    "each, one file": (lambda: blocks(reduce_accumulated="each"), Model, {}),
    "each, folder": (lambda: blocks(reduce_accumulated="each", state_dict_type="sharded"), Model, {}),
    "half": (blocks, Model, {"precision": "bf16-mixed"}),
    "manual": (blocks, Manual, {}),
    "tensor parallel": (lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), Model, {}),
    "tensor parallel, file": (
        lambda: ModelParallelStrategy(
            data_parallel_size=1, tensor_parallel_size=2, save_distributed_checkpoint=False
        ),
        Model, {},
    ),
}  # fmt: skip


def on_two(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (strategy, kind, options) in CASES.items():
        place = folder / name
        expected = outcome(fit(2, strategy(), kind(), [Saves(place)], **options))
        resumed = {
            batch: outcome(fit(2, strategy(), kind(), [], ckpt_path=place / f"batch-{batch}", **options))
            for batch in OPEN
        }
        found[name] = {"expected": expected, "resumed": resumed}
    # What ranks have added up, any strategy takes: its own last sum is that of the window.
    found["each, by DDP"] = outcome(
        fit(2, DDPStrategy(find_unused_parameters=True), Model(), [], ckpt_path=folder / "each, one file" / "batch-2")
    )
    return found


def on_one(folder: Path) -> dict[str, Any]:
    def error(strategy: Any, name: str) -> str:
        try:
            fit(1, strategy, Model(), [], ckpt_path=folder / name / "batch-2")
        except CheckpointError as refused:
            return str(refused)
        return "went on"

    return {
        "fewer ranks": error(blocks(), "once, one file"),
        "fewer ranks, added up": error(blocks(reduce_accumulated="each"), "each, folder"),
        "no mesh": error("auto", "tensor parallel"),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    found = on_two(folder) if ranks == 2 else on_one(folder)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(found, folder / f"{ranks}.pt")
