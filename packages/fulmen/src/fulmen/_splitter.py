"""How loaders are split over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch.utils.data import BatchSampler, DataLoader

from fulmen_data import add_worker_seeding, distribute_loader, elastic_loader, rebuild_loader, seed_samples
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Splitter"]


def _is_data_loader(loader: object) -> TypeGuard[DataLoader[Any]]:
    return isinstance(loader, DataLoader)


class Splitter:
    """How loaders are split over ranks: what ``distribute_loader`` needs to know of a run."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        seed: int,
        enabled: bool,
        overfit: bool,
        seeding: str = "0",
        shared: bool = False,
    ) -> None:
        self.world_size = world_size
        self._rank, self._seed, self._seeding = rank, seed, seeding
        self._may_split = enabled
        self._enabled = enabled and (world_size > 1 or shared)
        self._shared = shared
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
                world_size=self.world_size,
                shuffle=not self._overfit if training else None,
                training=training,
                seed=self._seed,
                shared=self._shared,
            )
        return self._seeded(loader)

    def _seeded(self, loader: Any) -> object:
        """``loader`` as ``seed_everything(workers=...)`` asked for."""
        if self._seeding == "1":
            add_worker_seeding(loader, self._rank)
        return seed_samples(loader, self._seed) if self._seeding == "samples" else loader

    def rest_of_epoch(
        self, loader: object, position: Mapping[str, object], saved_ranks: int
    ) -> tuple[object, dict[str, object]]:
        """The user's ``loader`` for what is left of an epoch that another number of ranks began; and where that is.

        Raises:
            MisconfigurationException: nobody knows what is left.
        """
        if not self._may_split and self.world_size > 1:
            raise MisconfigurationException(
                f"this checkpoint was saved in the middle of an epoch by {saved_ranks} processes; to share the rest "
                f"among {self.world_size}, fulmen must split the data, and use_distributed_sampler=False. Pass True, "
                "or resume from a checkpoint of an epoch's end."
            )
        rest, state = elastic_loader(loader, position, rank=self._rank, ranks=self.world_size, saved_ranks=saved_ranks)
        return self._seeded(rest), state
