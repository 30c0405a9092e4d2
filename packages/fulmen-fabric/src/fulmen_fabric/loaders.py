"""What ``Fabric.setup_dataloaders`` returns: batches on the device, epochs counted, and a place that can be saved."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.utils.data import DataLoader

    from fulmen_fabric.place import LoaderPlace
    from fulmen_fabric.prefetch import Prefetcher

    # To who reads it, it is a DataLoader: it has every attribute of one. To be one, it would have to be made as one.
    _LooksLike = DataLoader[Any]
else:
    _LooksLike = object

__all__ = ["FabricDataLoader"]


class FabricDataLoader(_LooksLike):
    """Iterates over a ``DataLoader``: batches come on the device, and samplers learn the epoch by themselves.

    Each ``iter`` begins an epoch, or goes on with the one that a loaded ``run_state`` was in. Everything else
    (``batch_size``, ``dataset``, ...) is the loader's own.
    """

    def __init__(
        self, place: LoaderPlace, number: int, feed: Callable[[Iterator[object]], Iterator[object]] | None = None
    ) -> None:
        """``feed`` brings the batches of an iterator to the device; None leaves them where they are."""
        self.number = number
        self._place = place
        self._feed = feed
        self._loader = cast("DataLoader[Any]", place.loader)
        self._epoch = 0
        self._is_running = False
        self._given: Callable[[], int] | None = None
        self._began_at: object = None
        self.clock: Callable[[], object] = int
        """Says which epoch of the run it is; one that was begun in another has ended, wherever its iterator stands."""

    # Any: the user's batches. torch names the class of its own iterator, which ours is not.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        position = self._place.position
        position.set_epoch(self._epoch)
        self._epoch += 1
        before = position.batches
        batches = iter(position)
        self._is_running, self._began_at, self._given = True, self.clock(), None
        if self._feed is not None:
            batches = self._feed(batches)
            if self._place.reads_ahead:
                self._given = _counter(batches, before)
        return chain(batches, self._end())

    def _end(self) -> Iterator[object]:
        self._is_running = False
        self._place.end_epoch()
        yield from ()

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next ``iter``, for a run that does not start at epoch 0."""
        self._epoch = epoch

    @property
    def batches_done(self) -> int:
        """Batches of the running epoch that were handed out; 0 between epochs. A loaded state sets it."""
        if not self._is_within_epoch:
            return 0
        return self._place.position.batches if self._given is None else self._given()

    @property
    def _is_within_epoch(self) -> bool:
        return self._is_running and self._began_at == self.clock()

    def state_dict(self) -> dict[str, object]:
        """The place in the data, as numbers, lists and tensors; each rank has its own."""
        within = self._is_within_epoch
        if within:
            self._place.warn_of_what_is_lost()
        given = None if self._given is None else self._given()
        return {"epoch": self._epoch, **self._place.state_dict(given, within_epoch=within)}

    def load_state_dict(self, state: Mapping[str, object], saved_ranks: int | None = None) -> None:
        """Go on there at the next ``iter``. ``saved_ranks`` is the number of parts that the data had; None: as now.

        Raises:
            MisconfigurationException: the place is that of another kind of loader, or nobody knows what is left.
        """
        self._place.restart()
        self._epoch, self._given, self._is_running = cast("int", state["epoch"]), None, False
        rest = self._place.load_state_dict(state, saved_ranks=saved_ranks or self._place.ranks)
        if rest is not None:
            position = self._place.position
            position.reads_ahead = self._place.reads_ahead
            position.load_state_dict(rest[1])
            self._epoch, self._is_running, self._began_at = position.epoch, True, self.clock()

    def __getattr__(self, name: str) -> object:
        # Only reached for names that are not ours. Our own, missing, mean that __init__ has not run (copy, pickle).
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def _counter(batches: Iterator[object], before: int) -> Callable[[], int]:
    ahead = cast("Prefetcher | Counted", batches)
    return lambda: before + ahead.given


class Counted:
    """Counts what was taken from an iterator that reads ahead of that."""

    def __init__(self, iterator: Iterator[object]) -> None:
        self._next = iterator.__next__
        self.given = 0

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        item = self._next()
        self.given += 1
        return item
