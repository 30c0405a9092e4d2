"""What the Trainer adds to the host's time of a step of FSDP2: paired, step by step, in one process.

The model has the layers of ``1b`` and next to no width, and the other ranks do not exist (torch's fake process group),
so what is left is what the host does to launch a step. Each step of the Trainer is followed by one of the raw loop and
one of a second raw loop: the clocks of a machine drift, the pairs don't. The second raw loop says how exact that is.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fulmen
from fulmen.loggers import CSVLogger
from tools.bench import scaling_models as models
from tools.bench import transformer
from tools.bench.gpu_workloads import Repeated
from tools.bench.scaling_rank import optimizer_of, strategy_of

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_UP = 8


def raw_step(asked: argparse.Namespace, workload: models.Workload, batch: Any) -> Callable[[], None]:
    """One step of the loop that a person writes."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    with torch.device("meta"):
        net = models.build(workload, is_tiny=False)
    if asked.compile:
        models.compile_(net)
    models.shard(net, mesh, "data", "tensor", recompute=False)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.normal_(parameter.to_local(), std=0.02)  # type: ignore[attr-defined]  # a DTensor
    optimizer = optimizer_of(asked, net)

    def step() -> None:
        loss = net(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Paired(fulmen.LightningModule):
    """Times the raw loops before each batch of the Trainer, and what lies between as the Trainer's."""

    def __init__(self, asked: argparse.Namespace, workload: models.Workload, raws: list[Callable[[], None]]) -> None:
        super().__init__()
        self.asked, self.workload, self.raws = asked, workload, raws
        self.times: list[list[float]] = []
        self._since: float | None = None

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = models.build(self.workload, is_tiny=False)
        if self.asked.compile:
            models.compile_(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self._since is not None:
            self.times[-1].append(time.thread_time() - self._since)
        taken = []
        for step in self.raws:
            begun = time.thread_time()
            step()
            taken.append(time.thread_time() - begun)
        self.times.append(taken)
        self._since = time.thread_time()
        loss = self.net(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.asked, self)


def agree_with_nobody() -> None:
    """Let rank 0 take its own word for that of the rank that does not exist."""
    import fulmen_fabric.voting as voting
    import fulmen_strategies.collectives as collectives

    kind: Any = collectives.TorchCollectives
    kind.patient_barrier = lambda self, name="": None
    kind.all_gather_object = lambda self, value: [value, value]
    kind.broadcast_object = lambda self, value, source=0: value
    vote: Any = voting.HostVote
    vote.any = lambda self, mine: mine


def main() -> int:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    asked = parser.parse_args()
    asked.compile, asked.accelerator, asked.devices, asked.fp8, asked.recompute = (
        not asked.eager,
        "cpu",
        2,
        False,
        False,
    )
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    transformer.SHAPES["1b"] = replace(
        transformer.SHAPES["1b"], width=32, heads=2, inner=64, vocabulary=512, context=64
    )
    workload = replace(models.WORKLOADS["1b-fsdp"], batch=1, length=16)
    batch = models.batch(workload, torch.device("cpu"), seed=0)
    os.environ.update(
        RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # makes the backend known
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    agree_with_nobody()
    module = Paired(asked, workload, [raw_step(asked, workload, batch) for _ in range(2)])
    with tempfile.TemporaryDirectory() as folder:
        fulmen.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy_of("fulmen", asked, workload),
            precision="bf16-mixed",
            max_epochs=1,
            logger=CSVLogger(Path(folder)),
            log_every_n_steps=5,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, Repeated(batch, asked.steps + WARM_UP))
    dist.destroy_process_group()
    rows = [row for row in module.times[WARM_UP:] if len(row) == 3]
    raw, again, ours = (median(row[which] for row in rows) * 1e3 for which in range(3))
    ratio, noise = (median(row[0] / row[which] for row in rows) for which in (2, 1))
    print(
        f"host time of a step of FSDP2, {len(rows)} pairs: raw {raw:.1f} ms; fulmen {ours:.1f} ms, {ratio:.3f} of the "
        f"speed; a second raw loop {again:.1f} ms, {noise:.3f}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
