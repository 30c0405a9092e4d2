"""Samplers that give each rank its part of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import distributed
from torch.utils.data import Dataset, DistributedSampler, Sampler

from fulmen_data._random_state import agreed_randomness
from fulmen_data.sizes import sized_len
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized

__all__ = [
    "DistributedBatchSampler",
    "DistributedSamplerWrapper",
    "IndexBatchSamplerWrapper",
    "SeekableSampler",
    "UnrepeatedDistributedSampler",
    "UnrepeatedDistributedSamplerWrapper",
]

T = TypeVar("T")

_PIECE = 1 << 12


class SeekableSampler(DistributedSampler[int]):
    """``torch.utils.data.DistributedSampler``'s order, from any position, on any number of ranks.

    The order is a function of (seed, epoch, position). Positions count samples over all ranks, so a position reached on
    4 ranks is continued on 3 without leaving out or repeating a sample (but for the padding that makes ranks equal).

    Args:
        dataset: anything with a length.
        num_replicas: number of ranks; None: those of ``torch.distributed``, or 1 where it is not in use.
        rank: this one; None: likewise.
        shuffle: whether the order changes with each epoch; otherwise it is 0, 1, 2, ...
        seed: the same on every rank.
        drop_last: leave out the last samples instead of repeating the first, where ranks would get unequal numbers.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        ranks, rank = _ranks(num_replicas, rank)
        super().__init__(cast("Dataset[object]", dataset), ranks, rank, shuffle, seed, drop_last)
        self._start = 0
        self._yielded = 0

    def __iter__(self) -> Iterator[int]:
        self._yielded = self._start // self.num_replicas
        return self._walk()

    def _walk(self) -> Iterator[int]:
        # The position is used up by the first item, not by iter(): torch's loaders may call that twice.
        start, self._start = self._start, 0
        for index in self._order(start):
            self._yielded += 1
            yield index

    def _order(self, start: int) -> Iterator[int]:
        if not start:
            return super().__iter__()
        size = len(cast("Sized", self.dataset))
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.arange(size)
        rest = order[start:]
        if self.drop_last:
            rest = rest[: len(rest) // self.num_replicas * self.num_replicas]
        else:  # the first samples pad the end, over and over if there are few
            missing = -len(rest) % self.num_replicas
            rest = torch.cat([rest, order.repeat(-(-missing // max(size, 1)))[:missing]])
        return indices_of(rest[self.rank :: self.num_replicas])

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; another epoch starts at position 0."""
        if epoch != self.epoch:
            self._start = self._yielded = 0
        super().set_epoch(epoch)

    def seek(self, position: int) -> None:
        """Let the next iteration, and only that one, start at ``position`` samples over all ranks.

        Raises:
            ValueError: ``position`` is negative.
        """
        if position < 0:
            raise MisconfigurationException(f"seek got position={position!r}; it counts samples from 0.")
        self._start = position
        self._yielded = position // self.num_replicas

    def state_dict(self) -> dict[str, object]:
        """Seed, epoch and position: how far this was read, which is ahead of training where loaders prefetch."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self._yielded * self.num_replicas,
            "size": len(cast("Sized", self.dataset)),
        }

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Continue from ``state_dict`` at the next iteration, on this number of ranks.

        Raises:
            ValueError: it belongs to another seed or length of the data, so its order is another one.
        """
        for name, here in (("seed", self.seed), ("size", len(cast("Sized", self.dataset)))):
            if state_dict[name] != here:
                raise MisconfigurationException(
                    f"the sampler's saved state has {name}={state_dict[name]!r}, this sampler {here!r}: "
                    f"the order would be another one. Use the same {name}, or start the epoch anew."
                )
        self.set_epoch(cast("int", state_dict["epoch"]))
        self.seek(cast("int", state_dict["position"]))


class UnrepeatedDistributedSampler(DistributedSampler[int]):
    """Every sample exactly once over all ranks: for evaluation and prediction.

    The first ``len(dataset) % num_replicas`` ranks get one sample more than the others; with fewer samples than ranks
    some get none. Arguments are those of ``SeekableSampler``, without ``drop_last``.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        ranks, rank = _ranks(num_replicas, rank)
        super().__init__(cast("Dataset[object]", dataset), ranks, rank, shuffle, seed)
        self.total_size = len(dataset)
        self.num_samples = len(range(rank, self.total_size, ranks))

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.rank, self.total_size, self.num_replicas))
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.total_size, generator=generator)
        return iter(cast("list[int]", order[self.rank :: self.num_replicas].tolist()))


class DistributedSamplerWrapper(SeekableSampler):
    """Splits what another sampler gives over ranks, in that sampler's order.

    The inner sampler is read whole at each iteration, while every rank's global random state is set to the same value,
    so that a random sampler gives one order to all. A sampler with a generator of its own must have equal ones.

    Args:
        sampler: any sized iterable of indices.
        num_replicas: number of ranks.
        rank: this one.
        shuffle: whether to shuffle on top of the sampler's order.
        seed: the same on every rank.
        drop_last: as in ``SeekableSampler``.

    Raises:
        TypeError: ``sampler`` has no length.
    """

    def __init__(
        self,
        sampler: Iterable[T],
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(_sized(sampler), num_replicas, rank, shuffle, seed, drop_last)
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        order = _read_in_agreement(self.sampler, self.seed, self.epoch)
        return (cast("int", order[position]) for position in super().__iter__())


class UnrepeatedDistributedSamplerWrapper(UnrepeatedDistributedSampler):
    """``DistributedSamplerWrapper`` without padding: everything the inner sampler gives, exactly once over ranks."""

    def __init__(
        self,
        sampler: Iterable[T],
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(_sized(sampler), num_replicas, rank, shuffle, seed)
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        order = _read_in_agreement(self.sampler, self.seed, self.epoch)
        return (cast("int", order[position]) for position in super().__iter__())


class DistributedBatchSampler(Sampler[list[int]]):
    """Deals whole batches of another batch sampler to ranks: rank r takes batches r, r + n, r + 2n, ...

    What the batches hold stays the user's business (buckets of equal length, for example).

    Args:
        batch_sampler: any sized iterable of index lists.
        num_replicas: number of ranks.
        rank: this one.
        pad: whether the first batches are repeated so that all ranks get equally many.
        seed: the same on every rank; see ``DistributedSamplerWrapper``.

    Raises:
        TypeError: ``batch_sampler`` has no length.
    """

    def __init__(
        self, batch_sampler: Iterable[Sequence[int]], num_replicas: int, rank: int, *, pad: bool, seed: int = 0
    ) -> None:
        kind = SeekableSampler if pad else UnrepeatedDistributedSampler
        self.batch_sampler = batch_sampler
        self._deal = kind(_sized(batch_sampler), num_replicas, rank, shuffle=False, seed=seed)

    def __iter__(self) -> Iterator[list[int]]:
        batches = _read_in_agreement(self.batch_sampler, self._deal.seed, self._deal.epoch)
        return (list(batches[position]) for position in self._deal)

    def __len__(self) -> int:
        return len(self._deal)

    @property
    def seekable(self) -> SeekableSampler | None:
        """Who can be told a position, in batches over all ranks; None without padding."""
        return self._deal if isinstance(self._deal, SeekableSampler) else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random numbers the inner sampler draws."""
        self._deal.set_epoch(epoch)


class IndexBatchSamplerWrapper(Sampler[list[int]]):
    """Remembers which indices each batch of the current iteration holds, so that predictions can be put in order.

    ``seen_batch_indices[i]`` are the indices of batch ``i``; where workers prefetch, later batches are there already.
    """

    def __init__(self, batch_sampler: Iterable[Sequence[int]]) -> None:
        self.batch_sampler = batch_sampler
        self.seen_batch_indices: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        self.seen_batch_indices = []
        for batch in self.batch_sampler:
            indices = list(batch)
            self.seen_batch_indices.append(indices)
            yield indices

    def __len__(self) -> int:
        return len(cast("Sized", self.batch_sampler))

    def __getattr__(self, name: str) -> object:
        # sampler, batch_size, drop_last, set_epoch, ...: as if nothing were around it. Private names are not passed
        # on, which also keeps copying and pickling from asking an object that has no batch_sampler yet.
        if name.startswith("_") or name == "batch_sampler":
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


def indices_of(order: torch.Tensor) -> Iterator[int]:
    """The numbers of a one-dimensional tensor, of which few at a time become Python objects of 32 bytes."""
    for start in range(0, len(order), _PIECE):
        yield from cast("list[int]", order[start : start + _PIECE].tolist())


def _ranks(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    in_use = distributed.is_available() and distributed.is_initialized()
    if num_replicas is None:
        num_replicas = distributed.get_world_size() if in_use else 1
    if rank is None:
        rank = distributed.get_rank() if in_use else 0
    return num_replicas, rank


def _sized(sampler: Iterable[T]) -> Sized:
    if sized_len(sampler) is None:
        raise TypeError(
            f"{type(sampler).__name__} has no length, so it cannot be split over ranks. Give it __len__, or split it "
            "by yourself and pass use_distributed_sampler=False."
        )
    return cast("Sized", sampler)


def _read_in_agreement(sampler: Iterable[T], seed: int, epoch: int) -> list[T]:
    set_epoch = getattr(sampler, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    with agreed_randomness(seed, epoch):
        order = list(sampler)
    if len(order) != sized_len(sampler):
        raise MisconfigurationException(
            f"{type(sampler).__name__} says its length is {sized_len(sampler)} but gave {len(order)} items. "
            "Make its __len__ and __iter__ agree: ranks are given their parts by it."
        )
    return order
