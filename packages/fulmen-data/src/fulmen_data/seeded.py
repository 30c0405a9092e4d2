"""Random draws of a data set that depend on the sample and the epoch alone."""

from __future__ import annotations

import copy
import os
import random
import sys
from contextlib import nullcontext
from operator import index as as_int
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fulmen_data._random_state import restored_afterwards
from fulmen_data.sizes import has_iterable_dataset
from fulmen_data.worker_seeding import derive_seed
from fulmen_protocols import MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

__all__ = ["SeededDataset", "sample_seed", "seed_samples", "seeded_datasets"]

T = TypeVar("T")


class SeededDataset(Dataset[T]):
    """A map-style data set whose samples are read with the random generators seeded by (run seed, epoch, index).

    Augmentations are then the same whatever the number of workers and ranks, and after a resume; and other ones in each
    epoch. Python's, NumPy's and torch's global generators are seeded; a generator that the data set owns is not.
    Outside workers the generators are given back as they were, so the model's own draws do not change.

    ``LoaderPosition``, ``CombinedLoader``, Fabric and the Trainer tell it the epoch; in a loop of your own call
    ``fulmen_data.set_epoch(loader, epoch)``.

    Args:
        dataset: anything with ``__getitem__``.
        seed: of the run, the same on every rank; None reads ``PL_GLOBAL_SEED`` (``seed_everything`` sets it), or 0.

    Raises:
        TypeError: the data set has no ``__getitem__``.
    """

    def __init__(self, dataset: Dataset[T], seed: int | None = None) -> None:
        if not hasattr(dataset, "__getitem__"):
            raise MisconfigurationTypeError(
                f"SeededDataset got {type(dataset).__name__}, which has no __getitem__, so its samples have no index "
                "to be seeded by. Keep a generator in the data set's own state_dict instead."
            )
        self.dataset = dataset
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        # In memory that workers share: those that are kept from epoch to epoch hear of the next one, too.
        self._epoch: torch.Tensor = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]  # torch's

    @property
    def epoch(self) -> int:
        """The epoch whose draws are made now."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; batches that workers have read ahead keep theirs."""
        self._epoch[0] = epoch

    def __getitem__(self, index: object) -> T:
        with nullcontext() if get_worker_info() is not None else restored_afterwards():
            _seed_generators(sample_seed(self.seed, self.epoch, index))
            return self.dataset[index]

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def __getattr__(self, name: str) -> object:
        # As if nothing were around it; but reading several samples at once (__getitems__) would seed only the first.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def sample_seed(seed: int, epoch: int, index: object) -> int:
    """512 bits that depend on the run's seed, the epoch and the sample: a BLAKE2b hash, so that no two keys share one.

    Any prefix is as good: with 64 bits, a million keys collide with a probability of 3e-8 (birthday bound).
    """
    try:
        key = as_int(index)  # type: ignore[arg-type]
    except TypeError:  # a name, a tuple: what tells samples apart is how they are written
        key = int.from_bytes(repr(index).encode(), "little")
    return derive_seed(seed, epoch, key, bits=512)


def _seed_generators(key: int) -> None:
    torch.default_generator.manual_seed(key & ((1 << 64) - 1))
    random.seed(key)
    # Who never imported NumPy never draws from it.
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed([(key >> shift) & 0xFFFFFFFF for shift in range(0, 512, 32)])


def seed_samples(loader: T, seed: int | None = None) -> T:
    """A loader like ``loader`` whose data set is a ``SeededDataset``; ``loader`` itself where it has no indices."""
    given: object = loader
    if not isinstance(given, DataLoader) or has_iterable_dataset(cast("object", given)):
        return loader
    source = cast("DataLoader[object]", given)
    if any(True for _ in seeded_datasets(source)):
        return loader
    clone = copy.copy(source)
    clone._iterator = None  # pyright: ignore[reportPrivateUsage]
    # Assignment goes around the loader, which refuses another data set after construction.
    object.__setattr__(clone, "dataset", SeededDataset(source.dataset, seed))
    return cast("T", clone)


def seeded_datasets(loader: object) -> Iterator[SeededDataset[object]]:
    """Those that ``loader`` reads, also inside a ``Subset``, a ``ConcatDataset`` or another wrapper."""
    waiting: list[object] = [getattr(loader, "dataset", None)]
    seen: set[int] = set()
    while waiting:
        dataset = waiting.pop()
        if dataset is None or id(dataset) in seen:
            continue
        seen.add(id(dataset))
        inner: object = getattr(dataset, "dataset", None)
        several: object = getattr(dataset, "datasets", ())
        if isinstance(dataset, SeededDataset):
            yield cast("SeededDataset[object]", dataset)
        waiting += [inner, *(cast("list[object]", several) if isinstance(several, (list, tuple)) else ())]
