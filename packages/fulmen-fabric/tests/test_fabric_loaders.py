"""Loaders in one process, and how data is split over ranks, against torch's DistributedSampler."""

from __future__ import annotations

import pytest
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
)

from fulmen_fabric import Fabric
from fulmen_protocols import MisconfigurationException

DATA = list(range(10))


def indices(loader):
    return [value for batch in loader for value in batch.tolist()]


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


@pytest.mark.proves("8.8")
def test_one_process_reads_everything_in_the_users_order():
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(DATA, batch_size=3))
    assert indices(loader) == DATA
    assert len(loader) == 4
    assert loader.batch_size == 3
    assert loader.dataset is DATA
    one, two = fabric.setup_dataloaders(DataLoader(DATA), DataLoader(DATA), move_to_device=False)
    assert len(one) == len(two) == 10


@pytest.mark.proves("8.8")
def test_samplers_learn_the_epoch_at_each_iteration():
    fabric = Fabric(accelerator="cpu", devices=1)
    sampler = DistributedSampler(DATA, 1, 0)
    loader = fabric.setup_dataloaders(DataLoader(DATA, sampler=sampler))
    first, second = indices(loader), indices(loader)
    assert first != second
    assert sampler.epoch == 1
    loader.set_epoch(0)
    assert indices(loader) == first


@pytest.mark.proves("8.8")
def test_a_loader_is_set_up_once():
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(MisconfigurationException, match="set up before"):
        fabric.setup_dataloaders(fabric.setup_dataloaders(DataLoader(DATA)))


@pytest.mark.proves("8.8")
def test_workers_are_seeded_when_the_seed_asks_for_it(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that seed_everything's own writes are undone
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    fabric = Fabric(accelerator="cpu", devices=1)
    assert fabric.setup_dataloaders(DataLoader(DATA)).worker_init_fn is None
    fabric.seed_everything(1, verbose=False)
    assert fabric.setup_dataloaders(DataLoader(DATA)).worker_init_fn is not None
    own = DataLoader(DATA, worker_init_fn=print)
    assert fabric.setup_dataloaders(own).worker_init_fn is print
