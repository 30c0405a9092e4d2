"""Runs on meshes that are stopped inside accumulation windows, and go on: ``window_mesh_script.py FOLDER RANKS STAGE``.

Stage ``begin`` trains each case once to its end, and once until it is stopped inside a window: by an exception, the
last one by a kill. Stage ``resume``, in new processes, goes on from each checkpoint of the latter. Rank 0 writes what
the models and optimizers have become to ``FOLDER/STAGE-RANKS.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback
from fulmen.strategies import FSDPStrategy, ModelParallelStrategy

BATCHES, WINDOW, SIZE = 6, 3, 4
SAVED = (1, 2, 4)
"""After which batches a run saves: a window is open then."""
CLOSED, STOPPED = 3, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(fulmen.LightningModule):
    """Two blocks; the strategy decides where."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = None

    def configure_model(self) -> None:
        if self.blocks is None:
            torch.manual_seed(0)
            self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(6, 3)
            if isinstance(self.trainer.strategy.backend, ModelParallelStrategy):
                self.place_on(self.device_mesh)

    def place_on(self, mesh: Any) -> None:
        for block in self.blocks:
            parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.head, mesh=mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = F.dropout(batch[0], 0.2, training=True)
        return F.cross_entropy(self.head(self.blocks(x)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Pipelined(fulmen.LightningModule):
    """One block for each stage, on data-parallel ranks if there are some; the optimizer steps once in a window."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_model(self) -> None:
        mesh = self.device_mesh["pipeline_parallel"]
        stage, stages = mesh.get_local_rank(), mesh.size()
        torch.manual_seed(stage)
        self.part = nn.ModuleDict({str(stage): Block()})
        if self.device_mesh["data_parallel"].size() > 1:
            fully_shard(self.part[str(stage)], mesh=self.device_mesh["data_parallel"])
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        pipeline = PipelineStage(self.part[str(stage)], stage, stages, self.device, group=mesh.get_group())
        self.schedule = Schedule1F1B(pipeline, n_microbatches=2, loss_fn=F.mse_loss, scale_grads=False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = F.dropout(batch[0], 0.2, training=True)
        losses: list[Tensor] = []
        self.schedule.step(*([x] if self.is_first else []), **({"target": x, "losses": losses} if self.is_last else {}))
        if (batch_idx + 1) % WINDOW == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.part.parameters(), lr=0.05)


class StopsInside(Callback):
    """Saves after some batches, and ends the run inside the second window."""

    def __init__(self, folder: Path, by_kill: bool) -> None:
        self.folder, self.by_kill, self.count = folder, by_kill, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.count += 1
        if self.count in (*SAVED, CLOSED):
            trainer.save_checkpoint(self.folder / f"batch-{self.count}")
        if self.count == STOPPED:
            if not self.by_kill:
                raise KeyboardInterrupt
            if trainer.global_rank == trainer.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # until the launcher ends this rank


def hybrid(**options: Any) -> FSDPStrategy:
    return FSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2), auto_wrap_policy={Block}, **options)


def mesh(**sizes: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(**sizes)


CASES: dict[int, dict[str, tuple[Any, type[fulmen.LightningModule]]]] = {
    2: {
        "pipeline": (lambda: mesh(pipeline_parallel_size=2), Pipelined),
    },
    4: {
        "hybrid, folder": (lambda: hybrid(state_dict_type="sharded"), Model),
        "hybrid, one file": (hybrid, Model),
        "hybrid, each, folder": (lambda: hybrid(reduce_accumulated="each", state_dict_type="sharded"), Model),
        "hybrid, each, one file": (lambda: hybrid(reduce_accumulated="each"), Model),
        "2d, one file": (
            lambda: mesh(data_parallel_size=2, tensor_parallel_size=2, save_distributed_checkpoint=False), Model,
        ),
        "pipeline of shards": (lambda: mesh(pipeline_parallel_size=2, data_parallel_size=2), Pipelined),
        "2d, folder": (lambda: mesh(data_parallel_size=2, tensor_parallel_size=2), Model),
    },
}  # fmt: skip


def fit(ranks: int, strategy: Any, model: Any, callbacks: list[Any], resume: Path | None = None) -> Any:
    size = SIZE * BATCHES * ranks // (2 if isinstance(strategy, ModelParallelStrategy) else 1)
    make = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(size, 6, generator=make), torch.randint(0, 3, (size,), generator=make))
    trainer = fulmen.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy, max_epochs=1, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=WINDOW if isinstance(model, Model) else 1,
    )  # fmt: skip
    torch.manual_seed(3 if resume is None else 99)
    with suppress(KeyboardInterrupt):
        trainer.fit(model, DataLoader(data, batch_size=SIZE, shuffle=True), ckpt_path=resume)
    return trainer


def outcome(trainer: Any) -> Any:
    backend, placed = trainer.strategy.backend, trainer.strategy.model
    states = [dict(backend.optimizer_state(placed, each, full=True)) for each in trainer.optimizers]
    return dict(backend.module_state(placed, full=True)), states, trainer.global_step


def begin(folder: Path, ranks: int) -> None:
    found: dict[str, Any] = {}
    for name, (strategy, kind) in CASES[ranks].items():
        found[name] = outcome(fit(ranks, strategy(), kind(), []))
    write(folder, "begin", ranks, found)
    last = list(CASES[ranks])[-1]
    for name, (strategy, kind) in CASES[ranks].items():
        fit(ranks, strategy(), kind(), [StopsInside(folder / name, by_kill=name == last)])


def resume(folder: Path, ranks: int) -> None:
    found: dict[str, Any] = {}
    for name, (strategy, kind) in CASES[ranks].items():
        found[name] = {
            batch: outcome(fit(ranks, strategy(), kind(), [], folder / name / f"batch-{batch}")) for batch in SAVED
        }
    write(folder, "resume", ranks, found)


def write(folder: Path, stage: str, ranks: int, found: Any) -> None:
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / f"{stage}-{ranks}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    {"begin": begin, "resume": resume}[sys.argv[3]](Path(sys.argv[1]), int(sys.argv[2]))
