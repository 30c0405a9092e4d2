"""Loaders for Fabric: batches on the device, epochs counted by themselves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fulmen_data import add_worker_seeding, distribute_loader, seed_samples, set_epoch
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsLoaderProcessing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.utils.data import DataLoader

    from fulmen_fabric.world import World
    from fulmen_protocols import Strategy

__all__ = ["FabricDataLoader", "prepare_loader"]


class FabricDataLoader:
    """Iterates over a ``DataLoader``: batches come on the device, and samplers learn the epoch by themselves.

    Everything else (``batch_size``, ``dataset``, ...) is the loader's own.
    """

    # Any: batches are objects, and DataLoader's element type says nothing here.
    def __init__(
        self, loader: DataLoader[Any], batches: Iterable[object], move: Callable[[object], object] | None = None
    ) -> None:
        """``batches`` is ``loader``, or what a strategy feeds its device with in its place; None moves nothing."""
        self._loader = loader
        self._batches = batches
        self._move = move
        self._epoch = 0

    def __iter__(self) -> Iterator[object]:
        set_epoch(self._loader, self._epoch)
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


def prepare_loader(
    loader: DataLoader[Any],
    world: World,
    strategy: Strategy,
    *,
    split: bool,
    move: Callable[[object], object] | None,
) -> FabricDataLoader:
    """This rank's part of ``loader``, unless not ``split``; ``move`` brings batches to the device."""
    if split:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        rank, parts = world.data_parallel_rank, world.data_parallel_size
        loader = distribute_loader(loader, rank=rank, world_size=parts, training=True, seed=seed)
    seeding = os.environ.get("PL_SEED_WORKERS", "0")
    if seeding == "1":
        add_worker_seeding(loader, world.data_parallel_rank)  # ranks of one model read the same batches
    elif seeding == "samples":
        loader = seed_samples(loader)
    if supports(strategy, SupportsLoaderProcessing):
        return FabricDataLoader(loader, strategy.process_loader(loader))
    return FabricDataLoader(loader, loader, move)
