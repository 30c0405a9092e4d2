"""Loaders for Fabric: each rank's part of the data, on its device."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from fulmen_fabric.seed import pl_worker_init_function
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sized

__all__ = ["FabricDataLoader", "seed_workers", "split_over_ranks"]

# DataLoader's element type says nothing here: batches are objects.
Loader = DataLoader[Any]


@runtime_checkable
class _HasEpoch(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


class FabricDataLoader:
    """Iterates over a ``DataLoader``: batches come on the device, and samplers learn the epoch by themselves.

    Everything else (``batch_size``, ``dataset``, ...) is the loader's own.
    """

    def __init__(
        self, loader: Loader, batches: Iterable[object], move: Callable[[object], object] | None = None
    ) -> None:
        """``batches`` is ``loader``, or what a strategy feeds its device with in its place; None moves nothing."""
        self._loader = loader
        self._batches = batches
        self._move = move
        self._epoch = 0
        batch_sampler = cast("object", loader.batch_sampler)
        samplers: list[object] = [loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
        self._with_epoch = list({id(one): one for one in samplers if isinstance(one, _HasEpoch)}.values())

    def __iter__(self) -> Iterator[object]:
        for sampler in self._with_epoch:
            sampler.set_epoch(self._epoch)
        self._epoch += 1
        return iter(self._batches) if self._move is None else map(self._move, self._batches)

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next ``iter``, for a run that does not start at epoch 0."""
        self._epoch = epoch

    def __getattr__(self, name: str) -> object:
        # Only reached for names that are not ours. Our own, missing, mean that __init__ has not run (copy, pickle).
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def split_over_ranks(loader: Loader, num_replicas: int, rank: int) -> Loader:
    """A loader like ``loader`` over this rank's part of the data. ``loader`` itself is left alone.

    A ``RandomSampler`` becomes a shuffling ``DistributedSampler``, a ``SequentialSampler`` one that keeps the order. An
    iterable data set, or a sampler that is distributed already, splits by itself: then ``loader`` is returned.

    Raises:
        MisconfigurationException: a sampler of the user's cannot be split.
    """
    if isinstance(loader.dataset, IterableDataset):
        return loader
    batch_sampler = cast("object", loader.batch_sampler)
    own = cast("object", loader.sampler if batch_sampler is None else getattr(batch_sampler, "sampler", None))
    if isinstance(own, DistributedSampler) or isinstance(batch_sampler, DistributedSampler):
        return loader
    sampler = _distributed(loader, own, num_replicas, rank)
    # A copy with another sampler keeps whatever the loader's own class has added; rebuilding it through a constructor
    # that we do not know could not. DataLoader forbids the assignment, because its own samplers would disagree: here
    # both are replaced together, before the copy is first iterated.
    split = copy.copy(loader)
    if batch_sampler is None:
        split.__dict__.update(sampler=sampler, _iterator=None)
    else:
        batches: Sampler[list[int]]
        if type(batch_sampler) is BatchSampler:
            batches = BatchSampler(sampler, batch_sampler.batch_size, batch_sampler.drop_last)
        else:
            batches = copy.copy(cast("Sampler[list[int]]", batch_sampler))
            cast("Any", batches).sampler = sampler
        split.__dict__.update(sampler=sampler, batch_sampler=batches, _iterator=None)
    return split


def _distributed(loader: Loader, own: object, num_replicas: int, rank: int) -> Sampler[int]:
    what = type(own if own is not None else cast("object", loader.batch_sampler)).__name__
    if type(own) in (RandomSampler, SequentialSampler):
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        shuffle = isinstance(own, RandomSampler)
        return DistributedSampler(
            cast("Any", loader.dataset), num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=False
        )
    if isinstance(own, Sampler) and hasattr(cast("object", own), "__len__"):
        return _SplitSampler(cast("Sampler[int]", own), num_replicas, rank)
    raise MisconfigurationException(
        f"{what} cannot be split over {num_replicas} ranks: it has no length, or no sampler to split. "
        "Split it yourself and pass use_distributed_sampler=False."
    )


class _SplitSampler(DistributedSampler[int]):
    """A user's sampler, dealt out to ranks in turn; all ranks must draw the same order from it."""

    def __init__(self, sampler: Sampler[int], num_replicas: int, rank: int) -> None:
        self.original = sampler
        super().__init__(cast("Any", _Order(sampler)), num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        cast("_Order", self.dataset).draw()
        return (cast("_Order", self.dataset)[place] for place in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if isinstance(self.original, _HasEpoch):
            self.original.set_epoch(epoch)


class _Order:
    """The indices that a sampler drew last, as a sequence."""

    def __init__(self, sampler: Sampler[int]) -> None:
        self._sampler = sampler
        self._drawn: list[int] = []

    def draw(self) -> None:
        self._drawn = list(self._sampler)

    def __len__(self) -> int:
        return len(cast("Sized", self._sampler))

    def __getitem__(self, place: int) -> int:
        return self._drawn[place]


def seed_workers(loader: Loader, rank: int) -> None:
    """Give ``loader`` a ``worker_init_fn`` that seeds, if ``seed_everything(workers=True)`` asked for it."""
    if os.environ.get("PL_SEED_WORKERS", "0") == "1" and loader.worker_init_fn is None:
        loader.worker_init_fn = partial(pl_worker_init_function, rank=rank)
