"""Draws that depend on (seed, epoch, sample) alone."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from fulmen_data import (
    LoaderPosition,
    SeededDataset,
    derive_seed,
    distribute_loader,
    sample_seed,
    seed_samples,
    set_epoch,
)

# Python 3.12 warns whenever a process with threads forks, as every DataLoader with workers does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning"
)

SIZE = 24


class Augmented(Dataset):
    """Each sample with what it drew."""

    note = "mine"

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int):
        return index, torch.rand(1).item(), random.random(), float(np.random.rand()), torch.randn(1).item()

    def __getitems__(self, indices):
        raise AssertionError("samples are seeded one by one")


def read(loader, epoch: int = 0) -> dict[int, tuple[float, ...]]:
    set_epoch(loader, epoch)
    return {int(row[0]): tuple(float(v) for v in row[1:]) for batch in loader for row in zip(*batch, strict=True)}


def test_draws_are_the_same_for_any_number_of_workers_and_ranks_and_others_in_each_epoch() -> None:
    def make(workers: int, rank: int = 0, ranks: int = 1, **options):
        loader = DataLoader(SeededDataset(Augmented(), 7), 5, shuffle=True, num_workers=workers, **options)
        return distribute_loader(loader, rank=rank, world_size=ranks, training=True)

    expected = read(make(0))
    assert len(set(expected.values())) == SIZE
    for workers in (2, 4):
        assert read(make(workers)) == expected
    parts = [read(make(workers, rank, 3)) for rank, workers in enumerate((0, 2, 0))]
    assert {index: draws for part in parts for index, draws in part.items()} == expected
    kept = make(2, persistent_workers=True)
    for epoch in range(3):
        assert read(kept, epoch) == read(make(0), epoch), "workers that are kept hear of the next epoch"
    assert not set(read(make(0), 1).values()) & set(expected.values())
    assert not set(read(DataLoader(SeededDataset(Augmented(), 8), 5)).values()) & set(expected.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_draws_what_the_uninterrupted_one_draws(workers) -> None:
    def make() -> LoaderPosition:
        position = LoaderPosition(DataLoader(SeededDataset(Augmented(), 1), 5, num_workers=workers))
        position.set_epoch(3)
        return position

    whole = [torch.stack(batch).tolist() for batch in make()]
    position = make()
    iterator = iter(position)
    next(iterator), next(iterator)
    resumed = make()
    resumed.load_state_dict(position.state_dict())
    assert [torch.stack(batch).tolist() for batch in resumed] == whole[2:]
    assert resumed.draws is None, "there is nothing that a resume would lose"


def test_reading_a_sample_outside_workers_leaves_the_generators_alone() -> None:
    data = SeededDataset(Augmented(), 1)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert data[3] == data[3]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


def test_a_million_keys_have_a_million_seeds() -> None:
    keys = [(seed, epoch, index) for seed in range(10) for epoch in range(100) for index in range(1_000)]
    assert len({sample_seed(*key) & (2**64 - 1) for key in keys}) == len(keys) == 10**6


def test_keys_that_look_alike_do_not_share_a_seed() -> None:
    keys = [(1, 23, 4), (12, 3, 4), (1, 2, 34), (123, 4, 0), (0, 1, -1), (0, -1, 1), (0, 0, "1"), (0, 0, 1)]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    assert sample_seed(1, 2, np.int64(3)) == sample_seed(1, 2, torch.tensor(3)) == derive_seed(1, 2, 3, bits=512)


def test_seed_samples_wraps_what_has_indices_and_nothing_twice(monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    plain = DataLoader(Augmented(), 5)
    seeded = seed_samples(plain)
    assert isinstance(seeded.dataset, SeededDataset)
    assert isinstance(plain.dataset, Augmented), "the user's loader is as it was"
    assert (seeded.dataset.seed, seeded.dataset.note, len(seeded)) == (7, "mine", len(plain))
    assert read(seeded) == read(DataLoader(SeededDataset(Augmented(), 7), 5))
    assert seed_samples(seeded) is seeded
    for other in (DataLoader(Stream()), [1, 2]):
        assert seed_samples(other) is other


def test_the_epoch_reaches_a_seeded_dataset_inside_others() -> None:
    inner = SeededDataset(Augmented(), 1)
    loader = DataLoader(ConcatDataset([Subset(inner, [0, 1]), Subset(SeededDataset(Augmented(), 2), [3])]), 2)
    set_epoch(loader, 5)
    assert inner.epoch == 5
    assert LoaderPosition(DataLoader(Subset(inner, [0, 1]), num_workers=2)).draws is None


def test_an_iterable_cannot_be_seeded_by_sample() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

        __getitem__ = None
        del __getitem__

    class Bare:
        pass

    with pytest.raises(TypeError, match=r"SeededDataset got Bare, which has no __getitem__.*Keep a generator"):
        SeededDataset(Bare())
