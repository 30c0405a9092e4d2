"""Making a map-style loader's iterator in the middle of an epoch, by its sampler's indices alone."""

from __future__ import annotations

import copy
from itertools import chain, islice
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from fulmen_data._random_state import RandomState
from fulmen_data._start import EpochStart
from fulmen_data.samplers import DistributedBatchSampler, SeekableSampler, indices_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fulmen_data.worker_draws import WorkerDraws

__all__ = ["plain_batch_size", "read_position", "replayed_order", "resumed_iterator", "seekable_sampler"]

T = TypeVar("T")


class _Replayed(Sampler[object]):
    """An index sampler whose next iteration was begun ahead of time; later ones are whole."""

    def __init__(self, sampler: Iterable[object]) -> None:
        self.inner = sampler
        self._ready: Iterator[object] | None = None

    def begin(self) -> Iterator[object]:
        """Start the next iteration now; some samplers draw their order here, others with the first item."""
        iterator = iter(self.inner)
        self._ready = self._once(iterator)
        return iterator

    def _once(self, iterator: Iterator[object]) -> Iterator[object]:
        # torch calls iter() up to twice before it asks for an item: both get this one.
        self._ready = None
        yield from iterator

    def advance(self, iterator: Iterator[object], skip: int) -> None:
        """Drop ``skip`` items of what ``begin`` gave, and let it draw its order in any case."""
        if skip:
            next(islice(iterator, skip - 1, skip), None)
        else:
            self._ready = self._once(chain(list(islice(iterator, 1)), iterator))

    def __iter__(self) -> Iterator[object]:
        return iter(self.inner) if self._ready is None else self._ready

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        if name.startswith("_") or name == "inner":  # copying and pickling ask before there is an inner
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Skipping(Sampler[object]):
    """``sampler`` without its first ``count`` items, once; what torch's own samplers skip is never made."""

    def __init__(self, sampler: Iterable[object], count: int) -> None:
        self.inner, self.count = sampler, count

    def __iter__(self) -> Iterator[object]:
        # The count is used up by the first item, not by iter(): torch's loaders call that twice.
        count, self.count = self.count, 0
        if not count:
            yield from self.inner
        elif type(self.inner) is SequentialSampler:
            yield from range(count, len(self.inner))
        elif type(self.inner) is RandomSampler and not self.inner.replacement:
            yield from _rest_of_permutations(self.inner, count)
        else:
            iterator = iter(self.inner)
            next(islice(iterator, count - 1, count), None)
            yield from iterator


def _rest_of_permutations(sampler: RandomSampler, count: int) -> Iterator[int]:
    """What ``RandomSampler`` gives after its first ``count`` indices, with the draws that it makes for them."""
    generator = cast("torch.Generator | None", sampler.generator)
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    size = len(sampler.data_source)
    passes, last = divmod(sampler.num_samples, size)
    for length in (*[size] * passes, last):
        order = torch.randperm(size, generator=generator)[:length]
        yield from indices_of(order[count:])
        count = max(0, count - length)


def resumed_iterator(
    loader: DataLoader[T],
    skip: int,
    samples: int | None,
    start: EpochStart | None,
    draws: WorkerDraws | None,
    *,
    begun: bool,
    drawn: RandomState | None = None,
) -> Iterator[T]:
    """The rest of an epoch.

    Args:
        loader: map-style; it is left as it is.
        skip: batches that came before.
        samples: the same in samples over all ranks, where the sampler can seek.
        start: the random state in which the epoch began.
        draws: watches whether workers draw random numbers.
        begun: whether a batch had been asked for, so that the sampler had drawn its order.
        drawn: the random state before that batch, where others drew between ``iter`` and it.
    """
    # A shallow copy shares dataset, collate function and all else; only its index sampler starts later. Assignment
    # goes around the loader, which refuses another sampler after construction.
    clone = copy.copy(loader)
    clone._iterator = None  # pyright: ignore[reportPrivateUsage]
    name = _index_sampler(loader)
    sampler = cast("Iterable[object]", getattr(loader, name))
    seekable = seekable_sampler(loader)
    if seekable is not None and samples is not None:
        seekable.seek(samples)
        skip = 0
    draws_early = begun or bool(skip or loader.num_workers)  # the sampler drew its order before it was saved
    if skip and name == "sampler":
        sampler, skip = _Skipping(sampler, skip), 0
    elif skip and type(sampler) is BatchSampler:
        # A million batches one by one take a second; their samples at once do not.
        shorter = copy.copy(sampler)
        shorter.sampler = cast("Iterable[int]", _Skipping(sampler.sampler, skip * sampler.batch_size))
        sampler, skip = shorter, 0
    replayed = _Replayed(sampler)
    object.__setattr__(clone, name, replayed)

    generator = cast("torch.Generator | None", loader.generator)
    now = RandomState.take()
    try:
        indices = _begin(loader, replayed, start)
        if draws_early:
            if drawn is not None:
                drawn.restore()
            replayed.advance(indices, skip)
        if start is not None:
            # The copy draws the workers' seed again, from the same state; the real generators stay where they are now.
            start.state.restore()
            if generator is not None and "generator" in start.generators:
                clone.generator = torch.Generator()
                clone.generator.set_state(start.generators["generator"].cpu())
        iterator = cast("Iterator[T]", iter(clone) if draws is None else draws.iterate(clone))
    finally:
        if start is not None:
            now.restore()
    if loader.persistent_workers and loader.num_workers:
        # The next epoch keeps these workers, as it would have kept the original ones.
        loader._iterator = clone._iterator  # pyright: ignore[reportPrivateUsage]
    return iterator


def _begin(loader: DataLoader[T], replayed: _Replayed, start: EpochStart | None) -> Iterator[object]:
    """Draw what ``iter(loader)`` drew in ``start``, in the same order.

    Some samplers draw at iter(); then comes the workers' seed (unless they were kept from an earlier epoch); other
    samplers draw with the first batch, which workers ask for at once.
    """
    if start is not None:
        start.restore(loader)
    begun = replayed.begin()
    if start is not None and not start.workers_kept:
        torch.empty((), dtype=torch.int64).random_(generator=cast("torch.Generator | None", loader.generator))
        if loader.num_workers:  # here torch calls iter() once more
            begun = replayed.begin()
    return begun


def replayed_order(loader: DataLoader[T], start: EpochStart) -> list[object]:
    """What an epoch that began in ``start`` reads: indices, or lists of them where a batch sampler of the user's does.

    Generators and random state are left as they are.
    """
    now = EpochStart.take(loader)
    sampler = cast("Iterable[object]", getattr(loader, _index_sampler(loader)))
    try:
        items = list(_begin(loader, _Replayed(sampler), start))
    finally:
        now.restore(loader)
    if type(sampler) is not BatchSampler:
        return items
    return [index for batch in cast("list[list[object]]", items) for index in batch]


def read_position(loader: object, batches: int) -> int | None:
    """Samples (or batches, of a dealt batch sampler) over all ranks in the first ``batches``; None: it cannot seek."""
    sampler = seekable_sampler(loader)
    if sampler is None:
        return None
    return min(batches * (plain_batch_size(loader) or 1), len(sampler)) * sampler.num_replicas


def plain_batch_size(loader: object) -> int | None:
    """Indices in a batch, where batches are a sampler's indices in order; None where a batch sampler decides."""
    batches: object = getattr(loader, "batch_sampler", None)
    if batches is None:
        return 1
    return batches.batch_size if type(batches) is BatchSampler else None


def seekable_sampler(loader: object) -> SeekableSampler | None:
    """The sampler that can be told a position: of indices, or of whole batches."""
    batches: object = getattr(loader, "batch_sampler", None)
    if isinstance(batches, DistributedBatchSampler):
        return batches.seekable
    sampler: object = getattr(loader if batches is None else batches, "sampler", None)
    plain = batches is None or type(batches) is BatchSampler
    return sampler if plain and isinstance(sampler, SeekableSampler) else None


def _index_sampler(loader: object) -> str:
    return "sampler" if getattr(loader, "batch_sampler", None) is None else "batch_sampler"
