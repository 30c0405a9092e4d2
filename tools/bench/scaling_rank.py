"""One rank of the scaling measurement: started by torchrun, it trains by every contestant in turn and reports.

Contestants share the processes, and so the model's compiled code, the devices and the moment; what one leaves is freed
before the next. ``plan`` instead predicts the memory on a CPU, ``eager`` measures what was predicted, and ``save`` and
``resume`` compare losses over rank counts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tools.bench import scaling_models as models
from tools.bench.gpu_workloads import Repeated

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.bench.scaling_models import Workload


class Clock:
    """Times the measured steps and those around two saves, between device synchronisations; reads the memory's peak."""

    def __init__(self, workload: Workload, device: torch.device, *, saves: bool) -> None:
        self.device = device
        self.first, self.last = workload.warm_up, workload.warm_up + workload.measured
        self.after = max(workload.measured // 2, 2) if saves else 0
        """Steps timed from a save on: the one at whose end it is made first."""
        self.settle: Callable[[], object] = lambda: None
        """Returns when the save before it has been written."""
        self.marks: list[float] = []
        self.peak = 0

    @property
    def second(self) -> int:
        """The batch at whose end the second save is made; the first is made at that of ``last``."""
        return self.last + self.after

    @property
    def steps(self) -> int:
        """Batches of the whole run."""
        return self.second + self.after

    def batch(self, index: int) -> None:
        """Call before batch ``index``, and with ``steps`` after the last one."""
        if index not in (self.first, self.last, self.second, self.steps):
            return
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self.device)
        if index == self.first and is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        if index == self.last:
            self.peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else 0
        self.marks.append(time.perf_counter())
        if self.after and index == self.second:
            self.settle()
            self.marks.append(time.perf_counter())

    def figures(self, measured: int) -> dict[str, float]:
        """Seconds per step, bytes at the peak, and what saves cost beyond their steps."""
        begin, end, *saves = self.marks
        seconds = (end - begin) / measured
        found = {"step_s": seconds, "peak_bytes": float(self.peak)}
        if self.after:
            one, settled, two = saves
            found["stall_s"] = one - end - self.after * seconds
            found["next_stall_s"] = two - settled - self.after * seconds
        return found


def optimizer_of(asked: argparse.Namespace, net: nn.Module) -> torch.optim.Optimizer:
    """The same for everybody."""
    return torch.optim.AdamW(net.parameters(), lr=models.LEARNING_RATE, fused=asked.accelerator == "cuda")


def raw(asked: argparse.Namespace, workload: Workload, device: torch.device, clock: Clock) -> None:
    """The loop that a person writes."""
    from torch.distributed.device_mesh import init_device_mesh

    autocast: Any = contextlib.nullcontext()
    if workload.strategy == "ddp":
        net = models.build(workload, is_tiny=asked.tiny, fp8=asked.fp8).to(device)
        if asked.compile:
            models.compile_(net)
        net = nn.parallel.DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
        autocast = torch.autocast(device.type, torch.bfloat16)
    else:
        tensor = models.tensor_parallel_size(workload, asked.devices)
        mesh = init_device_mesh(device.type, (asked.devices // tensor, tensor), mesh_dim_names=("data", "tensor"))
        with torch.device("meta"):
            net = models.build(workload, is_tiny=asked.tiny, fp8=asked.fp8)
        if asked.compile:
            models.compile_(net)
        models.shard(net, mesh, "data", "tensor", recompute=asked.recompute)
        net.to_empty(device=device)
        for parameter in net.parameters():
            nn.init.normal_(parameter.to_local(), std=0.02)  # type: ignore[attr-defined]  # a DTensor
    optimizer = optimizer_of(asked, net)
    given = models.batch(workload, device, seed=int(os.environ["RANK"]))
    for index in range(clock.steps):
        clock.batch(index)
        with autocast:
            loss = net(*given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    clock.batch(clock.steps)


def make_module(library: Any, asked: argparse.Namespace, workload: Workload, clock: Clock, losses: list[Any]) -> Any:
    """A LightningModule of ``library`` for ``workload``."""
    shards_itself = workload.strategy == "2d" or (workload.strategy == "fsdp" and library.__name__ != "fulmen")
    names = ("data_parallel", "tensor_parallel")

    class Module(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            if workload.strategy == "ddp":
                self.net = models.build(workload, is_tiny=asked.tiny, fp8=asked.fp8)
                if asked.compile:
                    models.compile_(self.net)

        def configure_model(self) -> None:
            if workload.strategy == "ddp" or hasattr(self, "net"):
                return
            # A plan has no memory for values anyway; elsewhere the strategy fills what is on meta, layer by layer.
            with contextlib.nullcontext() if asked.action == "plan" else torch.device("meta"):
                net = models.build(workload, is_tiny=asked.tiny, fp8=asked.fp8)
            if asked.compile:
                models.compile_(net)
            if shards_itself:
                models.shard(net, self.device_mesh, *names, recompute=asked.recompute)
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            clock.batch(batch_idx)
            loss = self.net(*batch)
            if asked.action in ("save", "resume"):
                losses.append(loss.detach())
            self.log("loss", loss, prog_bar=True)
            return loss

        def on_train_end(self) -> None:
            clock.batch(clock.steps)

        def configure_optimizers(self) -> Any:
            return optimizer_of(asked, self)

    return Module()


def strategy_of(name: str, asked: argparse.Namespace, workload: Workload) -> Any:
    """The strategy object of library ``name``."""
    strategies: Any = importlib.import_module(f"{name}.strategies")
    if workload.strategy == "ddp":
        return strategies.DDPStrategy()
    if workload.strategy == "fsdp" and name == "fulmen":
        more = {"activation_checkpointing_policy": models.block_classes(workload)} if asked.recompute else {}
        return strategies.FSDPStrategy(
            auto_wrap_policy=models.block_classes(workload), state_dict_type="sharded", **more
        )
    tensor = models.tensor_parallel_size(workload, asked.devices)
    return strategies.ModelParallelStrategy(
        data_parallel_size=asked.devices // tensor, tensor_parallel_size=tensor, save_distributed_checkpoint=True
    )


def precision_of(name: str, workload: Workload) -> str:
    """bf16 throughout; where ``fully_shard`` has its own policy there is nothing to add."""
    is_ours = workload.strategy == "ddp" or (workload.strategy == "fsdp" and name == "fulmen")
    return "bf16-mixed" if is_ours else "32-true"


def trainer(name: str, asked: argparse.Namespace, workload: Workload, device: torch.device, clock: Clock) -> None:
    """A Trainer with this interface, as a user gets it: log, CSV file, progress bar, and a checkpoint."""
    library: Any = importlib.import_module(name)
    callbacks: Any = importlib.import_module(f"{name}.callbacks")
    loggers: Any = importlib.import_module(f"{name}.loggers")
    plugins = None
    if clock.after and name == "fulmen":
        plugins = [importlib.import_module("fulmen.plugins").AsyncCheckpointIO()]
        clock.settle = plugins[0].wait
    given = models.batch(workload, device, seed=int(os.environ["RANK"]))
    folder = asked.scratch
    saving = [
        callbacks.ModelCheckpoint(folder / name, every_n_train_steps=index + 1, save_top_k=-1)
        for index in (clock.last, clock.second)
    ]
    library.Trainer(
        accelerator=device.type,
        devices=asked.devices,
        strategy=strategy_of(name, asked, workload),
        precision=precision_of(name, workload),
        max_epochs=1,
        logger=loggers.CSVLogger(folder / f"{name}-log"),
        log_every_n_steps=5,
        callbacks=saving if clock.after else [],
        enable_checkpointing=bool(clock.after),
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=plugins,
    ).fit(make_module(library, asked, workload, clock, []), Repeated(given, clock.steps))


def measure(asked: argparse.Namespace, workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    """Every contestant in turn, ``--rounds`` times, in the other order every second time; the first turn saves."""
    rows: list[dict[str, Any]] = []
    for turn in range(asked.rounds):
        for contestant in asked.contestants[:: -1 if turn % 2 else 1]:
            name = {"lightning": "lightning.pytorch"}.get(contestant, contestant)
            row: dict[str, Any] = {"contestant": contestant, "round": turn}
            rows.append(row)
            if contestant != "raw" and importlib.util.find_spec(name.partition(".")[0]) is None:
                row["not_run"] = "not installed"
                continue
            may_save = contestant == "fulmen" or (workload.strategy, contestant) == ("ddp", "lightning")
            saves = workload.saves and may_save and turn == 0
            clock = Clock(workload, device, saves=saves)
            try:
                if contestant == "raw":
                    raw(asked, workload, device, clock)
                else:
                    trainer(name, asked, workload, device, clock)
                row |= clock.figures(workload.measured)
            except Exception as error:  # noqa: BLE001  # the others are measured all the same
                row["not_run"] = f"{type(error).__name__}: {error}"[:600]
                traceback.print_exc()
            write(asked, rows)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def eager(asked: argparse.Namespace, workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    """The peak of a few steps by fulmen without compiling, which is what a plan is of."""
    asked.compile = False
    clock = Clock(replace(workload, warm_up=2, measured=2), device, saves=False)
    row: dict[str, Any] = {"contestant": "fulmen"}
    try:
        trainer("fulmen", asked, workload, device, clock)
        row["eager_peak_bytes"] = clock.figures(2)["peak_bytes"]
    except torch.OutOfMemoryError as error:
        row["not_run"] = f"{type(error).__name__}: {error}"[:600]
    return [row]


def losses_around_a_save(asked: argparse.Namespace, workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    """Two epochs of three batches, the same on every rank; ``save`` runs both, ``resume`` only the second."""
    import fulmen

    losses: list[Any] = []
    torch.manual_seed(0)
    clock = Clock(workload, device, saves=False)
    clock.first = clock.last = clock.after = -1
    given = models.batch(workload, device, seed=0)
    resumes = asked.action == "resume"
    begun = time.perf_counter()
    fulmen.Trainer(
        accelerator=device.type,
        devices=asked.devices,
        strategy=strategy_of("fulmen", asked, workload),
        precision=precision_of("fulmen", workload),
        max_epochs=2,
        logger=False,
        callbacks=[] if resumes else [_KeepFirst(asked.checkpoints)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(
        make_module(fulmen, asked, workload, clock, losses),
        Repeated(given, 3),
        ckpt_path=str(asked.checkpoints / "first.ckpt") if resumes else None,
    )
    numbers = [float(loss) for loss in losses]
    return [{"contestant": "fulmen", "losses": numbers[-3:], "seconds": time.perf_counter() - begun}]


class _KeepFirst:
    """Saves after the first epoch only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.folder / "first.ckpt")


def plan(asked: argparse.Namespace, workload: Workload) -> list[dict[str, Any]]:
    """What ``fulmen plan`` says about rank 0 on the devices that will be used."""
    import fulmen

    clock = Clock(workload, torch.device("cpu"), saves=False)
    clock.first = clock.last = clock.after = -1
    begun = time.perf_counter()
    runs = fulmen.Trainer(
        accelerator="cpu",
        devices=asked.devices,
        strategy=strategy_of("fulmen", asked, workload),
        precision=precision_of("fulmen", workload),
        logger=False,
        enable_checkpointing=False,
        max_steps=1,
    )
    shape = f"int64[{workload.batch},{workload.length}]"
    made = runs.plan(
        lambda: make_module(fulmen, asked, workload, clock, []), batch=f"{shape},{shape}", device=asked.accelerator
    )
    return [{"peak_bytes": made.peak, "at_peak": dict(made.at_peak), "seconds": time.perf_counter() - begun}]


def write(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Rank 0 reports what there is so far: a process that is ended later has not run for nothing."""
    if os.environ.get("RANK", "0") == "0":
        asked.report.write_text(json.dumps(rows), encoding="utf-8")


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments that the parent gives."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("action", choices=["measure", "eager", "save", "resume", "plan"])
    add("workload", choices=sorted(models.WORKLOADS))
    add("--devices", type=int, required=True)
    add("--accelerator", choices=["cuda", "cpu"], required=True)
    add("--report", type=Path, required=True)
    add("--checkpoints", type=Path)
    add("--contestants", nargs="+", default=["raw", "fulmen", "lightning"])
    add("--rounds", type=int, default=1)
    add("--batch", type=int)
    for switch in ("tiny", "fp8", "recompute", "compile"):
        add(f"--{switch}", action="store_true")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Do one action and report."""
    asked = parse(words)
    workload = models.chosen(asked.workload, is_tiny=asked.tiny, batch=asked.batch)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")
    if asked.action == "plan":
        asked.compile = False  # a plan is of eager execution
        write(asked, plan(asked, workload))
        return 0
    device = torch.device("cpu")
    if asked.accelerator == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
    )
    try:
        with tempfile.TemporaryDirectory() if os.environ["RANK"] == "0" else contextlib.nullcontext() as made:
            named: list[Any] = [made]
            torch.distributed.broadcast_object_list(named)
            asked.scratch = Path(named[0])
            rows = {"measure": measure, "eager": eager}.get(asked.action, losses_around_a_save)(asked, workload, device)
            if device.type == "cuda":
                for row in rows:
                    row["device"] = torch.cuda.get_device_name(device)
            write(asked, rows)
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
