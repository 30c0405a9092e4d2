"""Loaders in one process, and how data is split over ranks, against torch's DistributedSampler."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from fulmen_fabric import Fabric
from fulmen_fabric._loaders import split_over_ranks
from fulmen_protocols import MisconfigurationException

DATA = list(range(10))


def indices(loader):
    return [value for batch in loader for value in batch.tolist()]


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_rank_reads_what_torchs_distributed_sampler_gives_it(shuffle):
    for rank in range(3):
        ours = split_over_ranks(DataLoader(DATA, batch_size=2, shuffle=shuffle), 3, rank)
        sampler = DistributedSampler(DATA, 3, rank, shuffle=shuffle, seed=3)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            ours.sampler.set_epoch(epoch)
            assert indices(ours) == indices(DataLoader(DATA, batch_size=2, sampler=sampler))


def test_the_users_loader_is_left_alone():
    loader = DataLoader(DATA, batch_size=4)
    split = split_over_ranks(loader, 2, 0)
    assert isinstance(loader.sampler, SequentialSampler)
    assert len(loader) == 3
    assert len(split) == 2
    assert split.batch_size == 4


def test_a_loader_class_of_the_users_keeps_all_it_has():
    class Mine(DataLoader):
        def __init__(self, secret, **kwargs):
            self.secret = secret
            super().__init__(DATA, **kwargs)

    split = split_over_ranks(Mine(7, batch_size=5), 2, 1)
    assert type(split) is Mine
    assert split.secret == 7
    assert indices(split) == [1, 3, 5, 7, 9]


def test_a_sampler_of_the_users_is_dealt_out_in_its_own_order():
    sampler = WeightedRandomSampler([1.0] * 10, 10, replacement=False, generator=torch.Generator().manual_seed(5))
    other = WeightedRandomSampler([1.0] * 10, 10, replacement=False, generator=torch.Generator().manual_seed(5))
    expected = list(WeightedRandomSampler([1.0] * 10, 10, False, generator=torch.Generator().manual_seed(5)))
    first = indices(split_over_ranks(DataLoader(DATA, batch_size=2, sampler=sampler), 2, 0))
    second = indices(split_over_ranks(DataLoader(DATA, batch_size=2, sampler=other), 2, 1))
    assert first == expected[::2]
    assert second == expected[1::2]


def test_a_batch_sampler_of_the_users_keeps_its_class():
    class Pairs(BatchSampler):
        pass

    loader = DataLoader(DATA, batch_sampler=Pairs(RandomSampler(DATA), 2, drop_last=False))
    split = split_over_ranks(loader, 2, 0)
    assert type(split.batch_sampler) is Pairs
    assert len(indices(split)) == 5
    assert len(indices(loader)) == 10


def test_without_batches_single_samples_are_split():
    split = split_over_ranks(DataLoader(DATA, batch_size=None), 2, 1)
    assert [int(one) for one in split] == [1, 3, 5, 7, 9]


def test_what_splits_itself_is_left_alone():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    stream = DataLoader(Stream())
    assert split_over_ranks(stream, 2, 0) is stream
    own = DataLoader(DATA, sampler=DistributedSampler(DATA, 2, 1))
    assert split_over_ranks(own, 2, 0) is own


def test_what_cannot_be_split_is_named():
    class Endless:
        def __iter__(self):
            return iter([[0]])

    with pytest.raises(MisconfigurationException, match="Endless cannot be split over 2 ranks"):
        split_over_ranks(DataLoader(DATA, batch_sampler=Endless()), 2, 0)


def test_one_process_reads_everything_in_the_users_order():
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(DATA, batch_size=3))
    assert indices(loader) == DATA
    assert len(loader) == 4
    assert loader.batch_size == 3
    assert loader.dataset is DATA
    one, two = fabric.setup_dataloaders(DataLoader(DATA), DataLoader(DATA), move_to_device=False)
    assert len(one) == len(two) == 10


def test_samplers_learn_the_epoch_at_each_iteration():
    fabric = Fabric(accelerator="cpu", devices=1)
    sampler = DistributedSampler(DATA, 1, 0)
    loader = fabric.setup_dataloaders(DataLoader(DATA, sampler=sampler))
    first, second = indices(loader), indices(loader)
    assert first != second
    assert sampler.epoch == 1
    loader.set_epoch(0)
    assert indices(loader) == first


def test_a_loader_is_set_up_once():
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(MisconfigurationException, match="set up before"):
        fabric.setup_dataloaders(fabric.setup_dataloaders(DataLoader(DATA)))


def test_workers_are_seeded_when_the_seed_asks_for_it(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that seed_everything's own writes are undone
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    fabric = Fabric(accelerator="cpu", devices=1)
    assert fabric.setup_dataloaders(DataLoader(DATA)).worker_init_fn is None
    fabric.seed_everything(1, verbose=False)
    assert fabric.setup_dataloaders(DataLoader(DATA)).worker_init_fn is not None
    own = DataLoader(DATA, worker_init_fn=print)
    assert fabric.setup_dataloaders(own).worker_init_fn is print
