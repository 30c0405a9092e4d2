"""StragglerMonitor on gloo ranks of which one is slow in one part of its steps; work is sleep, which needs no core."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

FOUR = pytest.param(4, marks=pytest.mark.slow)
SCRIPT = '''
import csv, json, random, sys, time, warnings
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, StragglerMonitor
from fulmen.loggers import CSVLogger
from fulmen.strategies import FSDPStrategy, ModelParallelStrategy

torch.set_num_threads(1)
FOLDER, RANKS, CASES = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
LAST = RANKS - 1


class Data(Dataset):
    """``batches(rank)`` of them; each takes ``late(rank, index)`` seconds."""
    def __init__(self, batches, late):
        self.batches, self.late = batches, late
    def __len__(self):
        return self.batches(dist.get_rank())
    def __getitem__(self, index):
        if seconds := self.late(dist.get_rank(), index):
            time.sleep(seconds)
        return torch.ones(2, 4)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, seconds):
        ctx.seconds = seconds
        return value.clone()
    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


class Model(LightningModule):
    """``forward_s(rank, step)`` and so on are seconds of sleep."""
    def __init__(self, forward_s=lambda rank, step: 0.02, transfer_s=0.0, backward_s=0.0, validation_s=0.0, **_):
        super().__init__()
        self.forward_s, self.transfer_s = forward_s, transfer_s
        self.backward_s, self.validation_s = backward_s, validation_s
        # Buffers: DDP sends those of rank 0 in every forward pass, where the others wait for it.
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.transfer_s and self.global_rank == LAST:
            time.sleep(self.transfer_s)
        return batch
    def training_step(self, batch, batch_idx):
        time.sleep(self.forward_s(self.global_rank, self.global_step))
        loss = self.net(batch).mean()
        return SlowBackward.apply(loss, self.backward_s) if self.backward_s and self.global_rank == LAST else loss
    def validation_step(self, batch, batch_idx):
        time.sleep(self.validation_s if self.global_rank == LAST else 0.001)
        self.log("val", self.net(batch).mean(), sync_dist=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SlowHook(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 0:
            time.sleep(0.02)


def sequence():
    return dist.group.WORLD._get_sequence_number_for_group()


def run(strategy="ddp", steps=50, late=lambda rank, index: 0.0, batches=lambda rank: 100000, monitor=None,
        callbacks=(), logger=False, resume=None, save=None, bare=False, val=False, model=None, **options):
    monitor = StragglerMonitor() if monitor is None else monitor
    sizes = {key: options.pop(key) for key in list(options) if key.endswith("_s")}
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy, max_steps=steps, logger=logger, log_every_n_steps=10,
        callbacks=[*([] if bare else [monitor]), *callbacks], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )
    model = Model(**sizes)
    begun = sequence() if dist.is_initialized() else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(
            model, DataLoader(Data(batches, late), batch_size=None),
            DataLoader(Data(lambda rank: 2, lambda rank, index: 0.0), batch_size=None) if val else None,
            ckpt_path=resume,
        )
    if save:
        trainer.save_checkpoint(save)
    placed = trainer.strategy.model
    hooks = sum(len(each._forward_pre_hooks) for each in placed.modules())
    hooks += sum(len(each._post_accumulate_grad_hooks or ()) for each in model.parameters())
    return {
        "found": [each._asdict() for each in monitor.found], "steps": trainer.global_step, "hooks": hooks,
        "said": [str(each.message) for each in caught if "all ranks wait for it" in str(each.message)],
        "collectives": sequence() - begun, "state": monitor.state_dict(),
    }


def of_last(slow, usual=0.0):
    return lambda rank, _: slow if rank == LAST else usual


def noisy():
    draw = random.Random(dist.get_rank() if dist.is_initialized() else 0)
    def seconds(rank, step):
        return 1.0 if (rank, step) == (LAST, 100) else max(draw.gauss(0.02, 0.001), 0.0)
    return seconds


def logs():
    logger = CSVLogger(FOLDER, name=f"logs{RANKS}", version=0)
    found = run(steps=30, monitor=StragglerMonitor(5, log=True), late=of_last(0.02), logger=logger)
    rows = Path(FOLDER, f"logs{RANKS}", "version_0", "metrics.csv")
    found["rows"] = [dict(row) for row in csv.DictReader(rows.open())] if dist.get_rank() == 0 else []
    return found


def resumed():
    first = run(steps=7, save=f"{FOLDER}/{RANKS}.ckpt")
    return {"first": first, "then": run(steps=40, monitor=StragglerMonitor(5), resume=f"{FOLDER}/{RANKS}.ckpt",
                                        late=of_last(0.02))}


def tensor_parallel():
    sizes = {"tensor_parallel_size": RANKS, "data_parallel_size": 1}
    return run(ModelParallelStrategy(lambda model, mesh: model, **sizes), steps=25, monitor=StragglerMonitor(5),
               late=of_last(0.02))


CALLS = {
    "data": lambda: run(late=of_last(0.02)),
    "data of rank 0": lambda: run(late=lambda rank, _: 0.02 if rank == 0 else 0.0),
    "forward": lambda: run(steps=45, forward_s=of_last(0.1725, 0.15)),  # a busy machine wakes sleepers some ms late
    "backward": lambda: run(backward_s=0.02),
    "transfer": lambda: run(transfer_s=0.02),
    "hooks": lambda: run(callbacks=[SlowHook()]),
    "fsdp data": lambda: run(FSDPStrategy(), late=lambda rank, _: 0.02 if rank == 0 else 0.0),
    "fsdp forward": lambda: run(FSDPStrategy(), forward_s=of_last(0.06, 0.03)),
    "tensor parallel": tensor_parallel,
    "equal": lambda: run(steps=300, forward_s=noisy()),
    "compiling": lambda: run(steps=60, forward_s=lambda rank, step: 0.25 if rank == LAST and step < 6 else 0.02),
    "bursts": lambda: run(late=lambda rank, index: 0.08 if rank == LAST and index % 4 == 0 else 0.0),
    "again": lambda: run(steps=90, monitor=StragglerMonitor(5),
                         late=lambda rank, index: 0.03 if rank == LAST and not 25 <= index < 60 else 0.0),
    "uneven": lambda: run(steps=-1, max_epochs=1,
                          batches=lambda rank: 20 if rank == LAST else 60, late=lambda *_: 0.02),
    "uneven and late": lambda: run(steps=-1, max_epochs=1, monitor=StragglerMonitor(5),
                                   batches=lambda rank: 60 if rank == LAST else 40, late=of_last(0.03)),
    "windows": lambda: run(steps=25, monitor=StragglerMonitor(5), accumulate_grad_batches=2, val=True,
                           val_check_interval=4, check_val_every_n_epoch=None, validation_s=0.03,
                           forward_s=lambda rank, _: 0.03 if rank == 0 else 0.015),
    "validation": lambda: run(steps=60, val=True, val_check_interval=3,
                              check_val_every_n_epoch=None, validation_s=0.03),
    "short epochs": lambda: run(steps=40, monitor=StragglerMonitor(5), batches=lambda rank: 3, late=of_last(0.03)),
    "manual": lambda: run(),
    "logs": logs,
    "resumed": resumed,
    "with": lambda: run(steps=23, monitor=StragglerMonitor(5)),
    "without": lambda: run(steps=23, bare=True),
}


def main():
    run(steps=1, bare=True)  # meet
    found = {name: CALLS[name]() for name in CASES}
    with open(f"{FOLDER}/rank{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()


if __name__ == "__main__":
    main()
'''

MAIN = ("data", "forward")
PARTS = ("data of rank 0", "backward", "transfer", "hooks", "fsdp data", "fsdp forward", "tensor parallel")
FOUR_RANKS = ("data of rank 0", "fsdp forward", "equal")
CALM = ("equal", "compiling", "validation", "uneven")
COURSES = ("bursts", "again", "uneven and late", "windows", "short epochs", "logs", "resumed", "with", "without")


@cache
def found(ranks: int, cases: tuple[str, ...]) -> list[dict[str, Any]]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "script.py"
        script.write_text(SCRIPT)
        done = subprocess.run(
            [sys.executable, script, folder, str(ranks), ",".join(cases)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=folder,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def named(case: dict[str, Any]) -> list[tuple[int, str]]:
    return [(each["rank"], each["part"]) for each in case["found"]]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_a_rank_whose_data_are_late_is_named_within_fifty_steps_once_by_rank_zero(ranks: int) -> None:
    first, *others = found(ranks, MAIN)
    case = first["data"]

    assert case["steps"] == 50
    assert named(case) == [(ranks - 1, "data")]
    (slow,) = case["found"]
    assert slow["host"] == socket.gethostname()
    assert slow["since_step"] == 0
    assert slow["part_late_s"] == pytest.approx(0.02, rel=0.5)
    (said,) = case["said"]
    assert f"rank {ranks - 1} on {socket.gethostname()!r} is slow since step 0" in said
    assert "is in 'data'" in said
    assert all(each["data"]["found"] == [] and each["data"]["said"] == [] for each in others)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_a_rank_whose_forward_pass_is_fifteen_percent_slower_is_named_within_fifty_steps(ranks: int) -> None:
    assert named(found(ranks, MAIN)[0]["forward"]) == [(ranks - 1, "forward")]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rank", "part"),
    [
        ("data of rank 0", 0, "data"),  # whose buffers the others wait for in their forward pass
        ("backward", 1, "backward"),
        ("transfer", 1, "transfer"),
        ("hooks", 0, "hooks"),
        ("fsdp data", 0, "data"),
        ("fsdp forward", 1, "forward"),
        ("tensor parallel", 1, "data"),
    ],
)
def test_the_part_of_the_step_in_which_a_rank_is_slow_is_named(case: str, rank: int, part: str) -> None:
    assert named(found(2, PARTS)[0][case]) == [(rank, part)]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("case", CALM)
def test_nobody_is_named_for_noise_a_stall_compiling_slow_validation_or_fewer_data(case: str) -> None:
    assert found(2, CALM)[0][case]["found"] == []


@pytest.mark.processes
@pytest.mark.slow
def test_of_four_ranks_the_slow_one_is_named_and_of_four_equal_ones_none() -> None:
    first, *_ = found(4, FOUR_RANKS)

    assert named(first["data of rank 0"]) == [(0, "data")]
    assert named(first["fsdp forward"]) == [(3, "forward")]
    assert first["equal"]["found"] == []


@pytest.mark.processes
@pytest.mark.slow
def test_a_loader_that_is_late_every_few_batches_is_named() -> None:
    assert named(found(2, COURSES)[0]["bursts"]) == [(1, "data")]


@pytest.mark.processes
@pytest.mark.slow
def test_a_rank_is_named_again_after_it_has_recovered() -> None:
    case = found(2, COURSES)[0]["again"]

    assert named(case) == [(1, "data"), (1, "data")]
    assert len(case["said"]) == 2
    assert case["found"][0]["since_step"] < 25
    assert case["found"][1]["since_step"] in (55, 60)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "rank", "part"),
    [("uneven and late", 1, "data"), ("windows", 0, "forward"), ("short epochs", 1, "data"), ("logs", 1, "data")],
)
def test_uneven_data_accumulation_validation_and_short_epochs_do_not_hide_who_is_slow(
    case: str, rank: int, part: str
) -> None:
    assert named(found(2, COURSES)[0][case]) == [(rank, part)]


@pytest.mark.processes
@pytest.mark.slow
def test_loggers_get_the_slowest_rank_and_its_slowdown_for_each_window() -> None:
    rows = [row for row in found(2, COURSES)[0]["logs"]["rows"] if row["straggler/slowest_rank"]]

    # A window is looked at one step after its end; the last one when training ends.
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 29]
    assert {float(row["straggler/slowest_rank"]) for row in rows} == {1.0}
    assert all(float(row["straggler/slowdown"]) > 0.1 for row in rows)


@pytest.mark.processes
@pytest.mark.slow
def test_a_resumed_run_watches_from_where_it_goes_on_and_keeps_nothing_in_checkpoints() -> None:
    case = found(2, COURSES)[0]["resumed"]

    assert case["first"]["state"] == {}
    assert named(case["then"]) == [(1, "data")]
    assert case["then"]["found"][0]["since_step"] == 7


@pytest.mark.processes
@pytest.mark.slow
def test_watching_adds_no_collective_and_leaves_no_hook_behind() -> None:
    for rank in found(2, COURSES):
        assert rank["with"]["collectives"] == rank["without"]["collectives"]
        assert rank["with"]["hooks"] == 0
