"""A loop of one's own that is stopped anywhere goes on bit for bit as if it had not been stopped."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fulmen_fabric import Fabric
from fulmen_protocols import CheckpointError, MisconfigurationException


class Noisy(Dataset):
    """Draws from two generators for each sample."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        return torch.full((4,), float(index)) / 10 + torch.randn(4) * 0.1 + random.random() * 0.01


class Stopped(Exception):
    """Stands for the end of the process: nothing after it runs."""


def train(path=None, save=(), stop=None, resume=False, epochs=3, precision="32-true", break_after=None, **loading):
    """A loop with everything that could go wrong; returns weights and the losses of the steps that ran."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.seed_everything(5, verbose=False)
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 1))
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.02))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    options = {"batch_size": 4, "shuffle": True, **loading}
    loader, held_out = fabric.setup_dataloaders(DataLoader(Noisy(), **options), DataLoader(Noisy(), batch_size=11))
    run = fabric.run_state
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "run": run}
    if resume:
        torch.rand(3), random.random()  # a new process has drawn otherwise
        fabric.load(path, state)
    losses = []

    def checkpoint(now):
        if now in save:
            fabric.save(path, state)
        if now == stop:
            raise Stopped

    try:
        while run.epoch < epochs:
            for number, batch in enumerate(loader, loader.batches_done):
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                fabric.backward(loss)
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
                run.step += 1
                checkpoint(run.step)
                if break_after == number:
                    break
            with torch.no_grad():
                losses.extend(model(batch).mean().item() for batch in held_out)
            run.epoch += 1
            checkpoint(f"end {run.epoch}")
    except Stopped:
        pass
    return [parameter.clone() for parameter in model.parameters()], losses


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("at", [1, 4, 6, 8, "end 1", 12, "end 2"])  # six batches an epoch, the last a short one
def test_a_resumed_loop_has_the_bits_of_one_that_never_stopped(tmp_path, at):
    whole, losses = train()
    _, before = train(tmp_path / "a.ckpt", save=(at,), stop=at)
    resumed, after = train(tmp_path / "a.ckpt", resume=True)
    assert same(resumed, whole)
    assert before + after == losses
    assert before
    assert after


def test_the_step_that_crashed_after_a_save_is_done_again(tmp_path):
    whole, losses = train()
    train(tmp_path / "a.ckpt", save=(2, 5), stop=7)
    resumed, after = train(tmp_path / "a.ckpt", resume=True)
    assert same(resumed, whole)
    assert losses[5:] == after


@pytest.mark.parametrize("at", [3, "end 1", 7])
def test_an_epoch_that_the_loop_breaks_off_has_ended_once_it_is_counted(tmp_path, at):
    whole, losses = train(break_after=3)
    _, before = train(tmp_path / "a.ckpt", save=(at,), stop=at, break_after=3)
    resumed, after = train(tmp_path / "a.ckpt", resume=True, break_after=3)
    assert same(resumed, whole)
    assert before + after == losses


def test_the_scaler_of_16_mixed_goes_on_with_its_factor(tmp_path):
    whole, losses = train(precision="16-mixed", epochs=1)
    train(tmp_path / "a.ckpt", save=(3,), stop=3, precision="16-mixed", epochs=1)
    resumed, after = train(tmp_path / "a.ckpt", resume=True, precision="16-mixed", epochs=1)
    assert same(resumed, whole)
    assert losses[3:] == after
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["run"]["scaler"]["scale"] > 1


@pytest.mark.parametrize("order", ["generator", "seeded"])
def test_a_loaders_own_generator_and_seeding_by_sample_resume_too(tmp_path, monkeypatch, order):
    def options():
        if order == "generator":
            return {"generator": torch.Generator().manual_seed(9)}
        monkeypatch.setenv("PL_SEED_WORKERS", "samples")
        return {}

    whole, losses = train(**options())
    train(tmp_path / "a.ckpt", save=(8,), stop=8, **options())
    resumed, after = train(tmp_path / "a.ckpt", resume=True, **options())
    assert same(resumed, whole)
    assert after == losses[-len(after) :]


def make(dataset=None, **options):
    fabric = Fabric(accelerator="cpu", devices=1)
    return fabric, fabric.setup_dataloaders(DataLoader(dataset or list(range(10)), batch_size=2, **options))


def test_a_loader_that_is_set_up_after_the_load_takes_its_place(tmp_path):
    fabric, loader = make()
    iterator = iter(loader)
    next(iterator), next(iterator)
    fabric.save(tmp_path / "a.ckpt", {"run": fabric.run_state})

    later = Fabric(accelerator="cpu", devices=1)
    later.load(tmp_path / "a.ckpt", {"run": later.run_state})
    rest = later.setup_dataloaders(DataLoader(list(range(10)), batch_size=2))
    assert rest.batches_done == 2
    assert [batch.tolist() for batch in rest] == [[4, 5], [6, 7], [8, 9]]
    assert rest.batches_done == 0
    assert len(list(rest)) == 5


def test_loaders_that_nobody_holds_any_more_are_not_saved():
    fabric, first = make()
    second = fabric.setup_dataloaders(DataLoader([1]))
    assert len(fabric.run_state.state_dict()["ranks"][0]["loaders"]) == 2
    del first
    assert len(fabric.run_state.state_dict()["ranks"][0]["loaders"]) == 1
    assert len(second) == 1


def test_a_place_that_nobody_can_find_again_is_named_when_it_is_saved():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(6))

    fabric, loader = make(Stream())
    iterator = iter(loader)
    next(iterator)
    with pytest.warns(UserWarning, match="its place in Stream is not in it"):
        fabric.run_state.state_dict()


def test_a_state_of_a_later_version_and_a_loader_of_another_kind_are_refused():
    fabric, loader = make()
    iterator = iter(loader)
    next(iterator)
    state = fabric.run_state.state_dict()
    with pytest.raises(CheckpointError, match=r"layout 2; this fulmen-fabric reads 1. Update"):
        fabric.run_state.load_state_dict({**state, "version": 2})

    class Own(DataLoader):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    other = Fabric(accelerator="cpu", devices=1)
    kept = other.setup_dataloaders(Own([1, 2]))
    with pytest.raises(MisconfigurationException, match=r"Own has one\. Resume with the same kind of loader"):
        other.run_state.load_state_dict(state)
    assert len(kept) == 2


SCRIPT = """
    import os, signal, sys
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from fulmen_checkpoint import AsyncCheckpointIO
    from fulmen_fabric import Fabric

    folder, ranks, kill_at, killed = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=ranks, plugins=AsyncCheckpointIO())
    fabric.launch()
    fabric.seed_everything(5, verbose=False)
    module = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.4), nn.Linear(8, 1))
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=0.02))
    data = [torch.tensor([index / 10]) for index in range(40)]
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, shuffle=True))
    torch.rand(fabric.global_rank + 1)  # each rank has a random state of its own
    run = fabric.run_state
    state = {"model": model, "optimizer": optimizer, "run": run, "seen": []}
    path = f"{folder}/last.ckpt"
    if os.path.exists(path):
        torch.rand(9)  # which a resumed process must not notice
        fabric.load(path, state)
        fabric.print("resumed at", run.step)
    while run.epoch < 2:
        for batch in loader:
            optimizer.zero_grad()
            fabric.backward(model(batch).square().mean())
            optimizer.step()
            run.step += 1
            state["seen"] = [*state["seen"], *fabric.all_gather(batch).flatten().tolist()]
            if run.step % 3 == 0:
                fabric.save(path, state)
            if run.step == kill_at and fabric.global_rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
        run.epoch += 1
    torch.save({"model": model.state_dict(), "seen": state["seen"]}, f"{folder}/{fabric.global_rank}.pt")
    fabric.close()
"""


def life(folder, ranks, kill_at=0, killed=0):
    """One process tree, from its start to its end; rank ``killed`` kills itself right after a step."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(folder), str(ranks), str(kill_at), str(killed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def outcome(folder, rank=0):
    return torch.load(folder / f"{rank}.pt", weights_only=True)


def equal(left, right):
    return all(torch.equal(left["model"][name], right["model"][name]) for name in left["model"])


@pytest.mark.slow
def test_a_loop_killed_twice_ends_as_one_that_was_not(tmp_path):
    whole = life(tmp_path / "whole", 1)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed"
    assert life(folder, 1, kill_at=8).returncode == -signal.SIGKILL
    assert life(folder, 1, kill_at=26).returncode == -signal.SIGKILL
    last = life(folder, 1)
    assert last.returncode == 0, last.stderr
    assert "resumed at" in last.stdout
    assert equal(outcome(folder), outcome(tmp_path / "whole"))
    assert outcome(folder)["seen"] == outcome(tmp_path / "whole")["seen"]


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_go_on_as_two_and_as_one(tmp_path):
    whole = life(tmp_path / "whole", 2)
    assert whole.returncode == 0, whole.stderr
    folder, alone = tmp_path / "killed", tmp_path / "alone"
    dead = life(folder, 2, kill_at=8, killed=1)
    assert dead.returncode not in (0, None)
    assert "SIGKILL" in dead.stderr
    shutil.copytree(folder, alone)

    last = life(folder, 2)
    assert last.returncode == 0, last.stderr
    assert "resumed at" in last.stdout
    for rank in range(2):
        assert equal(outcome(folder, rank), outcome(tmp_path / "whole", rank))
        assert outcome(folder, rank)["seen"] == outcome(tmp_path / "whole", rank)["seen"]

    fewer = life(alone, 1)
    assert fewer.returncode == 0, fewer.stderr
    seen = [round(value * 10) for value in outcome(alone)["seen"]]
    assert sorted(seen[:40]) == list(range(40))
    assert sorted(seen[40:]) == list(range(40))
