"""Making the loaders of a Fabric: each rank's part of the data, seeded, on its device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fulmen_data import add_worker_seeding, distribute_loader, elastic_loader, seed_samples
from fulmen_fabric._in_use import InUse
from fulmen_fabric.abilities import supports
from fulmen_fabric.loaders import Counted, FabricDataLoader
from fulmen_fabric.place import LoaderPlace
from fulmen_fabric.prefetch import Prefetcher, can_prefetch
from fulmen_protocols import MisconfigurationException, SupportsLoaderProcessing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.utils.data import DataLoader

    from fulmen_fabric.world import World
    from fulmen_protocols import Strategy

__all__ = ["LoaderMaker"]


class LoaderMaker:
    """Makes the loaders of a Fabric, and knows those still in use, in the order in which they were made."""

    def __init__(self, world: World, strategy: Strategy) -> None:
        self._world = world
        self._process = strategy.process_loader if supports(strategy, SupportsLoaderProcessing) else None
        self._made: InUse[FabricDataLoader] = InUse()
        self._number = 0
        self.on_made: Callable[[FabricDataLoader], object] | None = None
        """Told of each new loader."""

    def in_use(self) -> list[FabricDataLoader]:
        """The loaders that somebody still holds."""
        return sorted(self._made, key=lambda loader: loader.number)

    def make(
        self, given: DataLoader[Any], *, split: bool, move: Callable[[object], object] | None, prefetch: int
    ) -> FabricDataLoader:
        """This rank's part of ``given``, unless not ``split``; ``move`` brings batches to the device."""
        world = self._world
        rank, parts = world.data_parallel_rank, world.data_parallel_size
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        loader = given
        if split:
            shared = world.data_parts is not None
            loader = distribute_loader(given, rank=rank, world_size=parts, training=True, seed=seed, shared=shared)

        def rest_of_epoch(position: Mapping[str, object], saved_ranks: int) -> tuple[object, dict[str, object]]:
            if not split and parts > 1:
                raise MisconfigurationException(
                    f"this place in the data was saved in the middle of an epoch by {saved_ranks} processes; to share "
                    f"the rest among {parts}, Fabric must split the data, and use_distributed_sampler=False. Pass True "
                    "to setup_dataloaders, or resume from a checkpoint of an epoch's end."
                )
            rest, state = elastic_loader(given, position, rank=rank, ranks=parts, saved_ranks=saved_ranks)
            return self._seeded(rest), state

        place = LoaderPlace(self._seeded(loader), parts, rest_of_epoch)
        # A strategy's own loader is ahead of the batch in hand, too.
        place.reads_ahead = self._process is not None or (prefetch > 0 and can_prefetch(world.device))
        self._number += 1
        made = FabricDataLoader(place, self._number, self._feed(move, prefetch))
        self._made.add(made)
        if self.on_made is not None:
            self.on_made(made)
        return made

    def _feed(
        self, move: Callable[[object], object] | None, prefetch: int
    ) -> Callable[[Iterator[object]], Iterator[object]] | None:
        process, device = self._process, self._world.device
        if process is not None:
            return lambda batches: Counted(iter(process(batches)))
        if move is None:
            return None
        if prefetch and can_prefetch(device):
            return lambda batches: Prefetcher(batches, move, device, prefetch)
        return lambda batches: map(move, batches)

    def _seeded(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """``loader`` as ``seed_everything(workers=...)`` asked for."""
        seeding = os.environ.get("PL_SEED_WORKERS", "0")
        if seeding == "1":
            # Ranks of one model read the same batches.
            add_worker_seeding(loader, self._world.data_parallel_rank)
        return seed_samples(loader) if seeding == "samples" else loader
