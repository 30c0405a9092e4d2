"""Where in its data a loader is, and how to go on from there as if it had never stopped."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

from torch.utils.data import DataLoader

from fulmen_data._random_state import RandomState
from fulmen_data._replay import plain_batch_size, read_position, resumed_iterator, seekable_sampler
from fulmen_data._start import EpochStart, generators_of
from fulmen_data.distribute import set_epoch
from fulmen_data.iterable_position import IterablePosition, has_stateful_dataset
from fulmen_data.seeded import seeded_datasets
from fulmen_data.sizes import has_iterable_dataset, sized_len
from fulmen_data.worker_draws import WorkerDraws
from fulmen_data.workers import end_workers, shut_down
from fulmen_protocols import MisconfigurationException, Stateful

if TYPE_CHECKING:
    import torch

__all__ = ["LoaderPosition"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_READ_AHEAD = 16
"""Batches that somebody between loader and training may hold; a snapshot of each is kept, some kilobytes."""


class LoaderPosition(Generic[T]):
    """A loader that can be stopped anywhere in an epoch and continued exactly.

    Iterating gives the loader's own iterator, so a batch costs nothing extra. At each start of an epoch the state of
    the random generators is kept; resuming replays the sampler from it, over indices alone, up to the position. Thus
    no sample that was already trained on is read again, and the order is that of the uninterrupted run, whatever the
    sampler and the number of workers.

    - A loader with a ``state_dict`` of its own (``StatefulDataLoader``, ``CombinedLoader``, ``FastForward``) is saved
      by that; an iterable data set with one by that of each worker.
    - Any other iterable has no position (``lost`` names it): a resumed epoch reads it from its beginning. Wrap it in
      ``FastForward`` to have its first batches read again and dropped.
    - The iterator, and with it worker processes, lives until the next ``iter``, another epoch or ``restart``.
    - Random draws *inside workers* of a map-style data set start anew after a resume (``draws`` names it), unless it is
      a ``SeededDataset``; so do those of a sampler that draws from a global generator between batches.

    Args:
        loader: any iterable of batches; it is read from the beginning at each ``iter``.
        replayed: a position saved by another number of ranks, whose order ``loader`` goes on with; see
            ``elastic_loader``.
    """

    def __init__(self, loader: Iterable[T], *, replayed: Mapping[str, object] | None = None) -> None:
        self.loader = loader
        self.epoch = 0
        self.reads_ahead = False
        """Whether somebody takes batches before the ones in hand are used. Set it before ``iter``."""
        self.is_one_of_several = False
        """Whether other loaders are begun between this one's ``iter`` and its first batch. Set it before ``iter``."""
        self._replayed = replayed
        self._drawn: RandomState | None = None  # before the first batch, where that is another state than at iter
        self._stateful = _stateful(loader)
        self._iterator: Iterator[T] | None = None
        self._skipped = 0  # batches of this epoch that came before this iterator's first
        self._samples_before: int | None = None  # the same in samples over all ranks, where a sampler can seek
        self._start: EpochStart | None = None
        self._resume: Mapping[str, object] | None = None
        self._draws = _watch(loader)

    def __len__(self) -> int:
        """Batches of a whole epoch, also after a resume.

        Raises:
            TypeError: the loader has no length.
        """
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[T]:
        """Begin an epoch, or go on with the one that ``load_state_dict`` named."""
        resume, self._resume = self._resume, None
        self._skipped = 0 if resume is None else cast("int", resume["batches"])
        if self._stateful is not None:
            self._iterator = self._iterate_stateful(self._stateful, resume)
            return self._iterator
        self._drawn = None
        if resume is None:
            self._start, self._samples_before = EpochStart.take(self.loader), 0
            iterator = self._iterate()
        else:
            self._start = EpochStart.from_plain(cast("dict[str, object] | None", resume["start"]))
            self._samples_before = cast("int | None", resume["samples"])
            drawn = cast("dict[str, object] | None", resume.get("drawn"))
            self._drawn = None if drawn is None else RandomState.from_plain(drawn)
            iterator = self._iterate_rest(begun=bool(resume.get("begun")))
        self._iterator = iterator if hasattr(iterator, "_num_yielded") else _Counted(iterator)
        notes = self.is_one_of_several and resume is None and not getattr(self.loader, "num_workers", 0)
        return self._noted(self._iterator) if notes else self._iterator

    def _noted(self, iterator: Iterator[T]) -> Iterator[T]:
        self._drawn = RandomState.take()
        yield from iterator

    def _iterate(self) -> Iterator[T]:
        return iter(self.loader) if self._draws is None else self._draws.iterate(cast("DataLoader[T]", self.loader))

    def _iterate_rest(self, *, begun: bool) -> Iterator[T]:
        loader, skip = self.loader, self._skipped
        if _has_indices(loader):
            loader = cast("DataLoader[T]", loader)
            return resumed_iterator(
                loader, skip, self._samples_before, self._start, self._draws, begun=begun, drawn=self._drawn
            )
        now = RandomState.take()
        try:
            if self._start is not None:
                self._start.state.restore()
            iterator = iter(loader)
        finally:
            if self._start is not None:
                now.restore()
        if isinstance(loader, Sequence):
            next(islice(iterator, skip - 1, skip) if skip else iter(()), None)
        elif skip:
            _log.warning(
                "%s has no position: the epoch goes on at batch %d with data read from its beginning. Give it "
                "state_dict and load_state_dict, or wrap the loader in fulmen_data.FastForward.",
                self.lost,
                skip,
            )
        return _Counted(iterator)

    def _iterate_stateful(self, source: Iterable[T], resume: Mapping[str, object] | None) -> Iterator[T]:
        ahead = None if resume is None else cast("Mapping[str, object] | None", resume.get("ahead"))
        iterator: Iterator[T]
        if not self.reads_ahead:
            iterator = iter(source)
            return iterator if hasattr(iterator, "_num_yielded") and resume is None else _Counted(iterator)
        counted = _Remembered(iter(source), cast("Stateful", source), self._skipped)
        if ahead is None:
            return counted
        # What had been read ahead is read again as it was then, before the generators go on from where they are.
        now = RandomState.take()
        try:
            RandomState.from_plain(cast("dict[str, object]", ahead["random"])).restore()
            counted.fill(cast("int", ahead["batches"]))
        finally:
            now.restore()
        return counted

    @property
    def batches(self) -> int:
        """Batches of this epoch that were handed out."""
        if self._resume is not None:
            return cast("int", self._resume["batches"])
        # torch's iterators count for themselves; asking them is what makes counting free.
        return self._skipped + cast("int", getattr(self._iterator, "_num_yielded", 0))

    @property
    def lost(self) -> str | None:
        """What has no position, so that the middle of an epoch cannot be found again; None if it can."""
        if self._stateful is not None or _has_indices(self.loader) or isinstance(self.loader, Sequence):
            return None
        data: object = getattr(self.loader, "dataset", None)
        return type(self.loader if data is None else data).__name__

    @property
    def draws(self) -> str | None:
        """The data set that was seen to draw random numbers in workers, so that they are other ones after a resume."""
        if self._draws is None or not self._draws.seen:
            return None
        return type(cast("DataLoader[T]", self.loader).dataset).__name__

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that the next ``iter`` begins, and tell the samplers. Another epoch than now starts afresh."""
        if epoch != self.epoch:
            self.restart()
        self.epoch = epoch
        set_epoch(self.loader, epoch)

    def restart(self) -> None:
        """Forget the position: the next ``iter`` begins the epoch afresh."""
        self._iterator = self._resume = self._start = self._samples_before = self._drawn = None
        self._skipped = 0

    def close(self) -> None:
        """Forget the position and end all worker processes, also those that the loader keeps between epochs."""
        shut_down(self._iterator)
        self.restart()
        if isinstance(self._stateful, IterablePosition):
            self._stateful.close()
        for part in self.parts():
            if part is not self:
                part.close()
        end_workers(cast("object", self.loader))

    def state_dict(self, batches: int | None = None) -> dict[str, object]:
        """The position, as numbers, lists and tensors.

        Args:
            batches: how many batches of this epoch were really used, where somebody in between reads ahead; None takes
                the number that was handed out.
        """
        done = self.batches if batches is None else batches
        if self._resume is not None and done == self._resume["batches"]:
            return dict(self._resume)
        state: dict[str, object] = {"epoch": self.epoch, "batches": done}
        if self._stateful is not None:
            return state | self._state_of_source(cast("Stateful", self._stateful), done)
        if self._resume is None:
            skipped, samples_before = self._skipped, self._samples_before
            start = None if self._start is None else self._start.to_plain()
        else:
            skipped, samples_before = cast("int", self._resume["batches"]), cast("int | None", self._resume["samples"])
            start = cast("dict[str, object] | None", self._resume["start"])
        samples = read_position(self.loader, done - skipped)
        if samples is not None:
            samples += samples_before or 0
        pending = self._resume or {}
        drawn = pending.get("drawn") if self._drawn is None else self._drawn.to_plain()
        state |= {"samples": samples, "length": sized_len(self.loader), "start": start, "drawn": drawn}
        state["begun"] = bool(self.batches or pending.get("begun"))
        if self._replayed is not None:
            return state | {name: self._replayed[name] for name in ("start", "order", "batch_size")}
        return state | {"order": self.order, "batch_size": plain_batch_size(self.loader)}

    def _state_of_source(self, source: Stateful, done: int) -> dict[str, object]:
        iterator = self._iterator
        snapshot = iterator.at(done) if isinstance(iterator, _Remembered) else None
        if snapshot is None:
            return {"loader": source.state_dict()}
        ahead = {"batches": cast("_Remembered[T]", iterator).read - done, "random": snapshot.random.to_plain()}
        return {"loader": snapshot.state, "ahead": ahead}

    def parts(self) -> list[LoaderPosition[object]]:
        """The positions of the loaders inside a ``CombinedLoader``; itself for any other loader."""
        inner: object = getattr(self.loader, "positions", None)
        if isinstance(inner, list) and all(isinstance(each, LoaderPosition) for each in cast("list[object]", inner)):
            return cast("list[LoaderPosition[object]]", inner)
        return [cast("LoaderPosition[object]", self)]

    @property
    def order(self) -> dict[str, object] | None:
        """What makes the order where that is a function of (seed, epoch, position); None where it is not."""
        sampler = seekable_sampler(self.loader)
        return None if sampler is None else {"seed": sampler.seed, "shuffle": sampler.shuffle}

    def set_order(self, order: Mapping[str, object] | None) -> None:
        """Let a sampler with such an order take over the seed of another run."""
        sampler = seekable_sampler(self.loader)
        if sampler is not None and order is not None:
            sampler.seed = cast("int", order["seed"])

    def generator_states(self) -> dict[str, torch.Tensor]:
        """Where the loader's and its samplers' own generators are now: what decides the epochs to come."""
        return {path: generator.get_state() for path, generator in generators_of(self.loader).items()}

    def set_generator_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Put the generators where ``generator_states`` found them, between epochs; within one the position does it."""
        for path, generator in generators_of(self.loader).items():
            if path in states:
                generator.set_state(states[path].cpu())

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Let the next ``iter`` go on where ``state_dict`` was taken, in another process too.

        A sampler whose order is a function of its seed takes over the saved seed.

        Raises:
            ValueError: it was taken of a loader with a state of its own and this one has none, or the other way round.
        """
        owns = self._stateful is not None
        if owns != ("loader" in state_dict):
            had, has = ("a state", "none") if not owns else ("none", "one")
            raise MisconfigurationException(
                f"the saved position is of a loader that had {had} of its own; {type(self.loader).__name__} has {has}. "
                "Resume with the same kind of loader, or start the epoch anew."
            )
        self.set_epoch(cast("int", state_dict["epoch"]))
        self._iterator = None
        if owns:
            cast("Stateful", self._stateful).load_state_dict(cast("dict[str, object]", state_dict["loader"]))
            self._resume = dict(state_dict)
            return
        length, now = state_dict["length"], sized_len(self.loader)
        if length != now and state_dict["samples"] is None:
            _log.warning(
                "the loader had %s batches when its position was saved and has %s now: "
                "after the resume, samples of this epoch are repeated or left out.",
                length,
                now,
            )
        self.set_order(cast("Mapping[str, object] | None", state_dict.get("order")))
        self._resume = dict(state_dict)


class _Counted(Iterator[T]):
    """Counts what an iterator gives, for those that don't by themselves."""

    def __init__(self, iterator: Iterator[T]) -> None:
        self._next = iterator.__next__
        self._num_yielded = 0

    def __next__(self) -> T:
        item = self._next()
        self._num_yielded += 1
        return item


class _Snapshot(NamedTuple):
    batches: int
    state: object
    random: RandomState


class _Remembered(Iterator[T]):
    """Counts, and remembers the loader's state before each of the last batches: somebody reads ahead."""

    def __init__(self, iterator: Iterator[T], source: Stateful, skipped: int) -> None:
        self._iterator, self._source = iterator, source
        self._num_yielded = 0
        self.read = skipped  # batches of the epoch
        self._ready: deque[T] = deque()
        self._snapshots: deque[_Snapshot] = deque(maxlen=_READ_AHEAD)

    def __next__(self) -> T:
        item = self._ready.popleft() if self._ready else self._read()
        self._num_yielded += 1
        return item

    def _read(self) -> T:
        state = copy.deepcopy(self._source.state_dict())
        self._snapshots.append(_Snapshot(self.read, state, RandomState.take()))
        item = next(self._iterator)
        self.read += 1
        return item

    def at(self, batches: int) -> _Snapshot | None:
        """What was so before the batch that came after the first ``batches``; None if that was not read yet."""
        return next((snapshot for snapshot in self._snapshots if snapshot.batches == batches), None)

    def fill(self, batches: int) -> None:
        """Read that many now; they are given out when they are asked for."""
        for _ in range(batches):
            try:
                self._ready.append(self._read())
            except StopIteration:
                return


def _stateful(loader: Iterable[T]) -> Iterable[T] | None:
    """What knows its own position, if anything does."""
    if isinstance(loader, Stateful):
        return cast("Iterable[T]", loader)
    return IterablePosition(cast("DataLoader[T]", loader)) if has_stateful_dataset(loader) else None


def _watch(loader: object) -> WorkerDraws | None:
    if not _has_indices(loader) or not cast("DataLoader[object]", loader).num_workers:
        return None
    return None if any(True for _ in seeded_datasets(loader)) else WorkerDraws()


def _has_indices(loader: object) -> bool:
    return isinstance(loader, DataLoader) and not has_iterable_dataset(cast("object", loader))
