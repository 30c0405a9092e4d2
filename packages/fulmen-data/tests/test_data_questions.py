import random
import subprocess
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fulmen_data import (
    add_worker_seeding,
    derive_seed,
    extract_batch_size,
    has_iterable_dataset,
    has_len,
    seed_worker,
    sized_len,
)

# Python 3.12 warns whenever a process with threads forks, as every DataLoader with workers does.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    note: str
    image: torch.Tensor


class Reiterable:
    def __iter__(self):
        return iter([torch.zeros(6, 2)])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        (torch.tensor(1.0), 1),
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        ([torch.zeros(3)], 3),
        ({"text": "abc", "x": torch.zeros(5, 1)}, 5),
        (Pair(None, [{"deep": torch.zeros(2, 2)}]), 2),
        (Sample("n", torch.zeros(7)), 7),
        ((3, torch.zeros(2), "s", np.zeros(9)), 2),
        (Reiterable(), 6),
        (torch.zeros(0, 3), 0),
    ],
)
def test_the_batch_size_is_the_first_dimension_of_the_first_tensor(batch, size) -> None:
    assert extract_batch_size(batch) == size


def test_tensors_that_disagree_are_reported_and_the_first_counts() -> None:
    with pytest.warns(UserWarning, match="first dimension 4 and 3; 4, the first, is taken"):
        assert extract_batch_size((torch.zeros(4), torch.zeros(3))) == 4


def test_values_beside_tensors_are_no_disagreement() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract_batch_size({"x": torch.zeros(4), "step": 3, "names": ["a"]}) == 4


@pytest.mark.parametrize("batch", [[], "text", {"a": 1}, None, np.zeros(3), iter([torch.zeros(2)])])
def test_a_batch_without_tensors_is_an_error_that_says_what_to_do(batch) -> None:
    with pytest.raises(ValueError, match="Pass batch_size="):
        extract_batch_size(batch)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1])


class SizedStream(Stream):
    def __len__(self) -> int:
        return 12


def test_lengths_of_loaders() -> None:
    assert sized_len(DataLoader([1, 2, 3], 2)) == 2
    assert sized_len(DataLoader(SizedStream(), 4)) == 3
    assert sized_len(DataLoader(Stream())) is None
    assert sized_len(iter([])) is None
    assert has_len([])
    assert not has_len(DataLoader(Stream()))
    assert has_iterable_dataset(DataLoader(Stream()))
    assert not has_iterable_dataset(DataLoader([1]))
    assert not has_iterable_dataset([1])


def test_a_million_seeds_do_not_collide_and_hang_on_every_part() -> None:
    seeds = {
        derive_seed(3, epoch, worker, rank) for epoch in range(100) for worker in range(100) for rank in range(100)
    }
    assert len(seeds) == 10**6
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(2**63, 1) < 2**64
    assert derive_seed(1, bits=32) < 2**32


def test_derived_seeds_are_the_same_on_every_machine() -> None:
    # printf '1,2' | b2sum (GNU coreutils): its first eight bytes, read as a little-endian number.
    assert derive_seed(1, 2) == int.from_bytes(bytes.fromhex("9b7e48cc5318446f"), "little")


class Draws(Dataset):
    """Each sample is what the three generators of the worker give."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return torch.rand((), dtype=torch.float64).item(), random.random(), np.random.rand()


def draws(rank: int, epochs: int = 3, persistent: bool = False) -> list[tuple[float, ...]]:
    torch.manual_seed(0)  # ranks are seeded alike
    loader = DataLoader(Draws(), 2, num_workers=2, persistent_workers=persistent)
    add_worker_seeding(loader, rank)
    return [row for _ in range(epochs) for batch in loader for row in zip(*(c.tolist() for c in batch), strict=True)]


@pytest.mark.proves("13.12")
@pytest.mark.parametrize("persistent", [False, True])
def test_no_worker_rank_or_epoch_repeats_anothers_random_numbers(persistent) -> None:
    rows = draws(0, persistent=persistent) + draws(1, persistent=persistent)
    assert len(rows) == 48
    for source in zip(*rows, strict=True):
        assert len(set(source)) == 48


@pytest.mark.proves("13.12")
def test_the_same_run_draws_the_same_numbers() -> None:
    assert draws(1, epochs=2) == draws(1, epochs=2)


def test_the_rank_is_read_from_the_launcher_when_not_given(monkeypatch) -> None:
    def first_draw(rank: int | None) -> float:
        torch.manual_seed(5)
        seed_worker(0, rank)
        return torch.rand(()).item()

    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert first_draw(None) == first_draw(0)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert first_draw(None) == first_draw(3)
    monkeypatch.setenv("RANK", "2")
    assert first_draw(None) == first_draw(2) != first_draw(3)


def test_a_users_worker_init_function_stays() -> None:
    loader = DataLoader([1], worker_init_fn=print)
    add_worker_seeding(loader, 0)
    assert loader.worker_init_fn is print


def test_workers_are_seeded_without_numpy_too() -> None:
    script = """
import sys
sys.modules["numpy"] = None
import torch, random
from fulmen_data import seed_worker
torch.manual_seed(1)
seed_worker(0, 0)
first = torch.rand(()).item(), random.random()
torch.manual_seed(1)
seed_worker(0, 0)
assert first == (torch.rand(()).item(), random.random())
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
