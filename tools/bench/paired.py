"""The Trainer beside a raw loop of FSDP2, in pairs: turns of a few steps each within one run of one process.

A machine's clocks drift and its neighbours come and go; pairs of turns half a second apart have the same of both. A
second raw loop takes part as well and says how exact the comparison is.

``python -m tools.bench paired`` measures what the host computes for a step, by its processor time: the layers of the 1B
model with next to no width, on a CPU, in a process group whose other rank does not exist (torch's fake one). With GPUs,
real ranks train the real model and the wall clock between device synchronisations counts::

    python -m torch.distributed.run --nproc-per-node 2 -m tools.bench.paired --accelerator cuda
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
from functools import partial
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

WARM_UP = 2
"""Turns that do not count."""


def raw_step(asked: argparse.Namespace, workload: models.Workload, batch: Any) -> Callable[[], None]:
    """One step of the loop that a person writes."""
    mesh = init_device_mesh(asked.accelerator, (asked.devices, 1), mesh_dim_names=("data", "tensor"))
    with torch.device("meta"):
        net = models.build(workload, is_tiny=False)
    if asked.compile:
        models.compile_(net)
    models.shard(net, mesh, "data", "tensor", recompute=False)
    net.to_empty(device=batch[0].device)
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
    """Takes turns: the raw loops before every so many batches of the Trainer, and these are the Trainer's turn."""

    def __init__(
        self,
        asked: argparse.Namespace,
        workload: models.Workload,
        raws: list[Callable[[], None]],
        clock: Callable[[], float],
    ) -> None:
        super().__init__()
        self.asked, self.workload, self.raws, self.clock = asked, workload, raws, clock
        self.turns: list[list[float]] = []
        """Seconds a step of the raw loops and, last, of the Trainer."""
        self._since: float | None = None

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = models.build(self.workload, is_tiny=False)
        if self.asked.compile:
            models.compile_(self.net)

    def _change(self) -> None:
        steps = self.asked.steps
        if self._since is not None:
            self.turns[-1].append((self.clock() - self._since) / steps)
        taken = []
        for step in self.raws:
            begun = self.clock()
            for _ in range(steps):
                step()
            taken.append((self.clock() - begun) / steps)
        self.turns.append(taken)
        self._since = self.clock()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % self.asked.steps == 0:
            self._change()
        loss = self.net(*batch)
        if not self.asked.bare:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.asked, self)


def alone() -> None:
    """Join a group whose other rank does not exist, and take its word for granted."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # makes the backend known
    here = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(here, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    collectives: Any = importlib.import_module("fulmen_strategies.collectives").TorchCollectives
    collectives.patient_barrier = lambda self, name="": None
    collectives.all_gather_object = lambda self, value: [value, value]
    collectives.broadcast_object = lambda self, value, source=0: value
    vote: Any = importlib.import_module("fulmen_fabric.voting").HostVote
    vote.any = lambda self, mine: mine


def narrow(workload: models.Workload) -> models.Workload:
    """The same layers with next to nothing to compute in them."""
    shape = transformer.SHAPES[workload.size]
    transformer.SHAPES[workload.size] = replace(shape, width=32, heads=2, inner=64, vocabulary=512, context=64)
    return replace(workload, batch=1, length=16)


def synchronised(device: torch.device) -> float:
    """The wall clock, when the device has done all that it was given."""
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> int:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--steps", type=int, help="of a turn; by default 1, and 5 on GPUs")
    parser.add_argument("--batch", type=int, help="sequences of a rank on GPUs")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--bare", action="store_true", help="the Trainer logs nothing and shows no bar")
    asked = parser.parse_args()
    on_gpus = asked.accelerator == "cuda"
    asked.steps = asked.steps or (5 if on_gpus else 1)
    asked.compile, asked.fp8, asked.recompute = not asked.eager, False, False
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    workload = models.chosen("1b-fsdp", is_tiny=False, batch=asked.batch)
    device = torch.device("cpu")
    clock = time.thread_time
    if on_gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        dist.init_process_group("nccl", device_id=device)
        clock = partial(synchronised, device)
    else:
        torch.set_num_threads(1)
        workload = narrow(workload)
        alone()
    asked.devices = dist.get_world_size()
    batch = models.batch(workload, device, seed=dist.get_rank())
    module = Paired(asked, workload, [raw_step(asked, workload, batch) for _ in range(2)], clock)
    with tempfile.TemporaryDirectory() as folder:
        fulmen.Trainer(
            accelerator=asked.accelerator,
            devices=asked.devices,
            strategy=strategy_of("fulmen", asked, workload),
            precision="bf16-mixed",
            max_epochs=1,
            logger=False if asked.bare else CSVLogger(Path(folder)),
            enable_progress_bar=not asked.bare,
            log_every_n_steps=5,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, Repeated(batch, asked.steps * (asked.turns + WARM_UP + 1)))
    turns = module.turns[WARM_UP:-1]
    raw, again, ours = (median(turn[which] for turn in turns) * 1e3 for which in range(3))
    speed, noise = (median(turn[0] / turn[which] for turn in turns) for which in (2, 1))
    if dist.get_rank() == 0:
        print(
            f"{len(turns)} pairs of turns of {asked.steps} steps: raw {raw:.1f} ms a step; fulmen {ours:.1f} ms, "
            f"{speed:.3f} of its speed; a second raw loop {again:.1f} ms, {noise:.3f}"
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
