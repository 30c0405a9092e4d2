"""SpikeRewind on gloo ranks of which one reads a poisoned batch: all go back alike, under DDP and under FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

FOUR = pytest.param(4, marks=pytest.mark.slow)
SCRIPT = '''
import copy, math, sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, ModelCheckpoint, SpikeRewind, TooManyRewindsError
from fulmen.strategies import FSDPStrategy, ModelParallelStrategy

torch.set_num_threads(1)
warnings.simplefilter("ignore")
FOLDER, RANKS = sys.argv[1], int(sys.argv[2])
BATCH, BATCHES = 4, 24
CULPRIT, POISONED = RANKS - 1, 8


def data():
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(BATCHES * BATCH * RANKS, 6, generator=generator)
    targets = inputs.sum(1, keepdim=True) * 0.1 + 1 + 0.1 * torch.randn(len(inputs), 1, generator=generator)
    # Rank r reads every RANKS-th sample, from r on: one batch of one rank is poisoned.
    targets.view(BATCHES, BATCH, RANKS)[POISONED, :, CULPRIT] = math.nan
    return TensorDataset(inputs, targets)


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.8), "interval": "step"}]


class Sampler(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(range(dist.get_rank(), BATCHES * BATCH * RANKS, RANKS))
    def __len__(self):
        return BATCHES * BATCH


def begun():
    return dist.group.WORLD._get_sequence_number_for_group()


class Counts(Callback):
    """Collectives begun before each batch."""
    def __init__(self):
        self.seen = []
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(begun())


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def own(state):
    return [local(value).detach().clone() for value in state if isinstance(value, torch.Tensor)]


def of_optimizer(optimizer):
    return [value for each in optimizer.state_dict()["state"].values() for value in each.values()]


def strategy(name):
    return FSDPStrategy() if name == "fsdp" else name


def run(name, folder=None, resume=None, **options):
    rewind = SpikeRewind(**{"window": 4, "factor": 10.0, "every_n_steps": 6, "check_every_n_steps": 2, **options})
    counts = Counts()
    keep = [] if folder is None else [
        ModelCheckpoint(dirpath=f"{FOLDER}/{folder}", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    ]
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy(name), max_epochs=1, callbacks=[rewind, counts, *keep],
        enable_checkpointing=bool(keep), enable_progress_bar=False, enable_model_summary=False, logger=False,
        use_distributed_sampler=False,
    )
    model, error = Model(), ""
    loader = DataLoader(data(), BATCH, sampler=Sampler())
    try:
        trainer.fit(model, loader, ckpt_path=resume)
    except TooManyRewindsError as found:
        error = str(found)
    return {
        "weights": own(model.parameters()), "moments": own(of_optimizer(trainer.optimizers[0])),
        "rate": trainer.optimizers[0].param_groups[0]["lr"], "step": trainer.global_step,
        "rewinds": [str(each) for each in rewind.rewinds], "counts": counts.seen, "error": error,
    }


def by_hand(name):
    """A raw loop that copies after step 6 and goes back there after step 12."""
    model = network()
    if name == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
        placed = model
    else:
        placed = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.8)
    kept = None
    for step, (inputs, targets) in enumerate(DataLoader(data(), BATCH, sampler=Sampler())):
        if step == 12:
            for part, state in zip((model, optimizer, schedule), kept):
                part.load_state_dict(state)
        if step == 6:
            kept = [
                {name: value.detach().clone() for name, value in model.state_dict().items()},
                copy.deepcopy(optimizer.state_dict()), copy.deepcopy(schedule.state_dict()),
            ]
        optimizer.zero_grad()
        nn.functional.mse_loss(placed(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    return {
        "weights": own(model.parameters()), "moments": own(of_optimizer(optimizer)),
        "rate": optimizer.param_groups[0]["lr"],
    }


def main():
    found = {}
    for name in ("ddp", "fsdp"):
        found[name] = run(name)
        found[f"{name} on the device"] = run(name, keep_on="device")
        found[f"{name} by hand"] = by_hand(name)
        if RANKS > 2:
            continue
        found[f"{name} saved"] = run(name, folder=name)
        found[f"{name} resumed"] = run(name, f"{name} again", resume=f"{FOLDER}/{name}/step=10.ckpt")
        found[f"{name} too often"] = run(name, max_rewinds=0)
        found[f"{name} seldom"] = run(name, every_n_steps=1000, check_every_n_steps=400)
    try:
        sizes = {"pipeline_parallel_size": RANKS, "tensor_parallel_size": 1, "data_parallel_size": 1}
        run(ModelParallelStrategy(lambda model, mesh: model, **sizes))
    except ValueError as error:
        found["pipeline"] = str(error)
    torch.save(found, f"{FOLDER}/rank{dist.get_rank()}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
'''


@cache
def found(ranks: int) -> list[dict[str, Any]]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "script.py"
        script.write_text(SCRIPT)
        done = subprocess.run(
            [sys.executable, script, folder, str(ranks)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=folder,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    tensors = all(
        len(ours[kind]) == len(theirs[kind]) and all(map(torch.equal, ours[kind], theirs[kind]))
        for kind in ("weights", "moments")
    )
    return tensors and ours["rate"] == theirs["rate"]


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [2, FOUR])
@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_all_ranks_go_back_together_as_a_raw_loop_on_them_does_by_hand(name: str, ranks: int) -> None:
    for rank in found(ranks):
        for ours in (rank[name], rank[f"{name} on the device"]):
            assert same(ours, rank[f"{name} by hand"])
            (event,) = ours["rewinds"]
            assert f"step=9, rank={ranks - 1}, value=nan, threshold=None, noticed_at=12, back_to=6" in event
            assert ours["step"] == 24
    if name == "ddp":
        first, *others = found(ranks)
        assert all(same(first[name], other[name]) for other in others), "replicas are equal"


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_that_are_killed_after_a_return_and_resumed_end_like_those_that_were_not(name: str) -> None:
    # Two: of more, DDP adds the gradients of its first step, after a resume too, in another order than later ones.
    for rank in found(2):
        whole = rank[f"{name} saved"]
        (event,) = whole["rewinds"]
        assert "step=9, rank=1" in event
        assert "noticed_at=10, back_to=5" in event, "a save looks before it writes, and both runs begin anew there"
        resumed = rank[f"{name} resumed"]
        assert same(resumed, whole)
        assert resumed["rewinds"] == whole["rewinds"]


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_return_too_many_ends_all_ranks_with_the_same_error(name: str) -> None:
    first, *others = [rank[f"{name} too often"]["error"] for rank in found(2)]
    assert "on rank 1 the loss was not finite (nan) in step 9" in first
    assert "max_rewinds=0, after spikes at steps none" in first
    assert all(other == first for other in others)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_checks_and_copies_begin_no_collective(name: str) -> None:
    for rank in found(2):
        often, seldom = rank[f"{name} on the device"]["counts"], rank[f"{name} seldom"]["counts"]
        # Before the return after step 12, which the ranks talk about; the first steps also agree on buckets.
        assert [count - often[3] for count in often[3:12]] == [count - seldom[3] for count in seldom[3:12]]
        assert often[13] - often[11] > seldom[13] - seldom[11], "the count would see one"


@pytest.mark.processes
def test_a_pipeline_is_refused_by_name() -> None:
    for rank in found(2):
        assert "SpikeRewind cannot go back with the pipeline" in rank["pipeline"]
        assert "leave pipeline_parallel_size at 1" in rank["pipeline"]
