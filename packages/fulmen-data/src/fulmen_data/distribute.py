"""Giving each rank its part of a loader's data."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from fulmen_data.rebuild import rebuild_loader
from fulmen_data.samplers import (
    DistributedBatchSampler,
    DistributedSamplerWrapper,
    IndexBatchSamplerWrapper,
    SeekableSampler,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from fulmen_data.seeded import seeded_datasets
from fulmen_data.sizes import has_iterable_dataset

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["distribute_loader", "set_epoch", "split_loader", "track_batch_indices"]

T = TypeVar("T")


def distribute_loader(
    loader: T,
    *,
    rank: int,
    world_size: int,
    shuffle: bool | None = None,
    training: bool,
    seed: int = 0,
    shared: bool = False,
) -> T:
    """Return a loader like ``loader`` that reads this rank's part; ``loader`` itself where nothing is to be split.

    Not split: one part, anything but a ``DataLoader``, an iterable dataset (it must split itself), and a loader that
    has a distributed sampler already. A sampler or batch sampler of the user's is wrapped and never dropped. Training
    repeats the first samples so that ranks are equal, just as ``DistributedSampler(shuffle, seed)`` does; evaluation
    gives every sample exactly once over ranks, which may then be unequal, or empty.

    Args:
        loader: of any class derived from ``DataLoader``; see ``rebuild_loader`` for what that class must allow.
        rank: index of this part.
        world_size: number of parts.
        shuffle: whether to shuffle, where the user has no sampler of their own; None does what the loader does.
        training: whether ranks are made equal by repetition.
        seed: of the order, the same on every rank.
        shared: whether several ranks read each part (tensor parallel). Then the order never depends on a rank's own
            random state, also where there is but one part.

    Raises:
        TypeError: the loader's class cannot be made again, or its sampler has no length.
    """
    if (world_size == 1 and not shared) or not _is_loader(loader) or has_iterable_dataset(loader):
        return loader
    return cast("T", split_loader(loader, rank, world_size, shuffle=shuffle, training=training, seed=seed))


def split_loader(
    loader: object, rank: int, world_size: int, *, shuffle: bool | None, training: bool, seed: int
) -> object:
    """``distribute_loader`` for a map-style ``DataLoader``, also for one rank."""
    source = cast("DataLoader[object]", loader)
    batches, sampler = _batch_sampler(source), _sampler(source)
    if isinstance(sampler, DistributedSampler) or isinstance(batches, (DistributedSampler, DistributedBatchSampler)):
        return loader
    if batches is not None and type(batches) is not BatchSampler:
        dealt = DistributedBatchSampler(cast("Iterable[list[int]]", batches), world_size, rank, pad=training, seed=seed)
        return rebuild_loader(source, batch_sampler=dealt)
    new: DistributedSampler[int]
    if _is_default(sampler):
        follow = not isinstance(sampler, SequentialSampler) if shuffle is None else shuffle
        kind = SeekableSampler if training else UnrepeatedDistributedSampler
        new = kind(source.dataset, world_size, rank, shuffle=follow, seed=seed)  # type: ignore[arg-type]
    else:
        wrapper = DistributedSamplerWrapper if training else UnrepeatedDistributedSamplerWrapper
        new = wrapper(cast("Iterable[int]", sampler), world_size, rank, seed=seed)
    return rebuild_loader(source, sampler=new)


def track_batch_indices(loader: DataLoader[T]) -> tuple[DataLoader[T], IndexBatchSamplerWrapper | None]:
    """Return a loader like ``loader`` and the wrapper that knows each batch's indices.

    The wrapper is None, and the loader unchanged, where batches have no indices: an iterable dataset, or no batching.

    Raises:
        TypeError: the loader's class cannot be made again; see ``rebuild_loader``.
    """
    batches = _batch_sampler(loader)
    if has_iterable_dataset(loader) or batches is None:
        return loader, None
    if isinstance(batches, IndexBatchSamplerWrapper):
        return loader, batches
    wrapper = IndexBatchSamplerWrapper(cast("Iterable[list[int]]", batches))
    return rebuild_loader(loader, batch_sampler=wrapper), wrapper


def set_epoch(loader: object, epoch: int) -> None:
    """Tell ``epoch`` to every sampler and ``SeededDataset`` of ``loader``: call it on every rank before each epoch."""
    own = getattr(loader, "set_epoch", None)
    if callable(own) and not _is_loader(loader):
        own(epoch)
        return
    for sampler in _samplers(loader):
        method = getattr(sampler, "set_epoch", None)
        if callable(method):
            method(epoch)
    for dataset in seeded_datasets(loader):
        dataset.set_epoch(epoch)


def _is_loader(loader: object) -> bool:
    return isinstance(loader, DataLoader)


def _batch_sampler(loader: object) -> object:
    return getattr(loader, "batch_sampler", None)


def _sampler(loader: object) -> object:
    """The sampler that really chooses: a loader with a batch sampler has an idle one beside it."""
    return getattr(_batch_sampler(loader), "sampler", getattr(loader, "sampler", None))


def _samplers(loader: object) -> Iterator[object]:
    """The samplers of ``loader``, each once, with what they wrap."""
    seen: set[int] = set()
    waiting: list[object] = [loader]
    while waiting:
        holder = waiting.pop(0)
        for name in ("sampler", "batch_sampler"):
            sampler: object = getattr(holder, name, None)
            if sampler is not None and id(sampler) not in seen:
                seen.add(id(sampler))
                waiting.append(sampler)
                yield sampler


def _is_default(sampler: object) -> bool:
    """Whether this is what ``DataLoader(shuffle=...)`` makes, so that nothing of the user's is lost with it."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler
