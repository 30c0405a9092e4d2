"""How loaders are split over ranks."""

from __future__ import annotations

from typing import Any, TypeGuard, cast

from torch.utils.data import BatchSampler, DataLoader

from fulmen_data import add_worker_seeding, distribute_loader, rebuild_loader

__all__ = ["Splitter"]


def _is_data_loader(loader: object) -> TypeGuard[DataLoader[Any]]:
    return isinstance(loader, DataLoader)


class Splitter:
    """How loaders are split over ranks: what ``distribute_loader`` needs to know of a run."""

    def __init__(
        self, *, rank: int, world_size: int, seed: int, enabled: bool, overfit: bool, seeds_workers: bool
    ) -> None:
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._seeds_workers = seeds_workers
        self._enabled = enabled and world_size > 1
        self._overfit = overfit

    def train(self, loader: object) -> object:
        """``loader`` for training: shuffled parts of equal length, padded like torch's DistributedSampler."""
        return self._split(loader, training=True)

    def evaluation(self, loader: object) -> object:
        """``loader`` for evaluation: every sample on exactly one rank."""
        return self._split(loader, training=False)

    def prediction(self, loader: object) -> object:
        """As for evaluation, and no sample is left out: ``drop_last`` does not apply."""
        split: Any = self.evaluation(loader)
        if not isinstance(cast("object", split), DataLoader):
            return split
        inner: object = getattr(split, "batch_sampler", None)
        if type(inner) is not BatchSampler or not inner.drop_last:
            return split
        return rebuild_loader(split, batch_sampler=BatchSampler(inner.sampler, inner.batch_size, drop_last=False))

    def _split(self, loader: object, *, training: bool) -> object:
        if not _is_data_loader(loader):
            return loader
        if self._enabled:
            # Training shuffles, as Lightning does, whatever the loader's own order; evaluation keeps the loader's.
            loader = distribute_loader(
                loader,
                rank=self._rank,
                world_size=self._world_size,
                shuffle=not self._overfit if training else None,
                training=training,
                seed=self._seed,
            )
        if self._seeds_workers:
            add_worker_seeding(loader, self._rank)
        return loader
