"""Where in its data a loader is, and how to go on from there as if it had never stopped."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Generic, TypeVar, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from fulmen_data._random_state import RandomState
from fulmen_data.distribute import set_epoch
from fulmen_data.samplers import SeekableSampler
from fulmen_data.sizes import has_iterable_dataset, sized_len
from fulmen_protocols import MisconfigurationException, Stateful

__all__ = ["LoaderPosition"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class LoaderPosition(Generic[T]):
    """A loader that can be stopped anywhere in an epoch and continued exactly.

    Iterating gives the loader's own iterator, so a batch costs nothing extra. At each start of an epoch the state of
    the random generators is kept; resuming replays the sampler from it, over indices alone, up to the position. Thus
    no sample that was already trained on is read again, and the order is that of the uninterrupted run, whatever the
    sampler and the number of workers.

    - A loader with a ``state_dict`` of its own (``StatefulDataLoader``, ``CombinedLoader``) is saved by that.
    - Iterable datasets and other iterables have no indices: their batches are read again and dropped.
    - The iterator, and with it worker processes, lives until the next ``iter``, another epoch or ``restart``.
    - Random draws *inside workers* start anew after a resume, as do those of a sampler that draws from a global
      generator between batches.

    Args:
        loader: any iterable of batches; it is read from the beginning at each ``iter``.
    """

    def __init__(self, loader: Iterable[T]) -> None:
        self.loader = loader
        self.epoch = 0
        self._iterator: Iterator[T] | None = None
        self._skipped = 0  # batches of this epoch that came before this iterator's first
        self._samples_before: int | None = None  # the same in samples over all ranks, where a sampler can seek
        self._start: _Start | None = None
        self._resume: Mapping[str, object] | None = None

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
        if _owns_state(self.loader):
            iterator = iter(self.loader)
        elif resume is None:
            self._start, self._samples_before = _Start.take(self.loader), 0
            iterator = iter(self.loader)
        else:
            self._start = _Start.from_plain(cast("dict[str, object] | None", resume["start"]))
            self._samples_before = cast("int | None", resume["samples"])
            iterator = _resumed(self.loader, self._skipped, self._samples_before, self._start)
        self._iterator = iterator if hasattr(iterator, "_num_yielded") else _Counted(iterator)
        return self._iterator

    @property
    def batches(self) -> int:
        """Batches of this epoch that were handed out."""
        if self._resume is not None:
            return cast("int", self._resume["batches"])
        # torch's iterators count for themselves; asking them is what makes counting free.
        return self._skipped + cast("int", getattr(self._iterator, "_num_yielded", 0))

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that the next ``iter`` begins, and tell the samplers. Another epoch than now starts afresh."""
        if epoch != self.epoch:
            self.restart()
        self.epoch = epoch
        set_epoch(self.loader, epoch)

    def restart(self) -> None:
        """Forget the position: the next ``iter`` begins the epoch afresh."""
        self._iterator = self._resume = self._start = self._samples_before = None
        self._skipped = 0

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
        if _owns_state(self.loader):
            return state | {"loader": cast("Stateful", self.loader).state_dict()}
        if self._resume is None:
            skipped, samples_before = self._skipped, self._samples_before
            start = None if self._start is None else self._start.to_plain()
        else:
            skipped, samples_before = cast("int", self._resume["batches"]), cast("int | None", self._resume["samples"])
            start = cast("dict[str, object] | None", self._resume["start"])
        samples = _samples(self.loader, done - skipped)
        if samples is not None:
            samples += samples_before or 0
        return state | {"samples": samples, "length": sized_len(self.loader), "start": start}

    def generator_states(self) -> dict[str, torch.Tensor]:
        """Where the loader's and its samplers' own generators are now: what decides the epochs to come."""
        return {path: generator.get_state() for path, generator in _generators(self.loader).items()}

    def set_generator_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Put the generators where ``generator_states`` found them, between epochs; within one the position does it."""
        for path, generator in _generators(self.loader).items():
            if path in states:
                generator.set_state(states[path].cpu())

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Let the next ``iter`` go on where ``state_dict`` was taken, in another process too.

        Raises:
            ValueError: it was taken of a loader with a state of its own and this one has none, or the other way round.
        """
        owns = _owns_state(self.loader)
        if owns != ("loader" in state_dict):
            had, has = ("a state", "none") if not owns else ("none", "one")
            raise MisconfigurationException(
                f"the saved position is of a loader that had {had} of its own; {type(self.loader).__name__} has {has}. "
                "Resume with the same kind of loader, or start the epoch anew."
            )
        self.set_epoch(cast("int", state_dict["epoch"]))
        self._iterator = None
        if owns:
            cast("Stateful", self.loader).load_state_dict(cast("dict[str, object]", state_dict["loader"]))
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
        self._resume = dict(state_dict)


class _Start:
    """What decides the order of an epoch: random state at ``iter``, and whether the workers were already there."""

    def __init__(self, state: RandomState, generators: dict[str, torch.Tensor], workers_kept: bool) -> None:
        self.state = state
        self.generators = generators
        self.workers_kept = workers_kept

    @classmethod
    def take(cls, loader: object) -> _Start:
        """The state now, just before ``iter(loader)``."""
        generators = {path: generator.get_state() for path, generator in _generators(loader).items()}
        kept = bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None
        return cls(RandomState.take(), generators, kept)

    def restore(self, loader: object) -> None:
        """Make this the state of the process and of the loader's own generators again."""
        self.state.restore()
        for path, generator in _generators(loader).items():
            if path in self.generators:
                generator.set_state(self.generators[path].cpu())

    def to_plain(self) -> dict[str, object]:
        """Numbers, lists and tensors."""
        return {
            "random": self.state.to_plain(),
            "generators": dict(self.generators),
            "workers_kept": self.workers_kept,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, object] | None) -> _Start | None:
        """Undo ``to_plain``."""
        if plain is None:
            return None
        return cls(
            RandomState.from_plain(cast("dict[str, object]", plain["random"])),
            cast("dict[str, torch.Tensor]", plain["generators"]),
            cast("bool", plain["workers_kept"]),
        )


class _Counted(Iterator[T]):
    """Counts what an iterator gives, for those that don't by themselves."""

    def __init__(self, iterator: Iterator[T]) -> None:
        self._next = iterator.__next__
        self._num_yielded = 0

    def __next__(self) -> T:
        item = self._next()
        self._num_yielded += 1
        return item


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


def _resumed(loader: Iterable[T], skip: int, samples: int | None, start: _Start | None) -> Iterator[T]:
    if not _has_indices(loader):
        return _read_again(loader, skip, start)
    source = cast("DataLoader[T]", loader)
    # A shallow copy shares dataset, collate function and all else; only its index sampler starts later. Assignment
    # goes around the loader, which refuses another sampler after construction.
    clone = copy.copy(source)
    clone._iterator = None  # pyright: ignore[reportPrivateUsage]
    name = "sampler" if getattr(source, "batch_sampler", None) is None else "batch_sampler"
    replayed = _Replayed(cast("Iterable[object]", getattr(source, name)))
    object.__setattr__(clone, name, replayed)
    seekable = _seekable(source)
    if seekable is not None and samples is not None:
        seekable.seek(samples)
        skip = 0

    generator = cast("torch.Generator | None", source.generator)
    now = RandomState.take()
    try:
        # Draw what was drawn then, in the same order: some samplers draw at iter(); then comes the workers' seed
        # (unless they were kept from an earlier epoch); others draw with the first batch, asked for at once by workers.
        if start is not None:
            start.restore(source)
        begun = replayed.begin()
        if start is not None and not start.workers_kept:
            torch.empty((), dtype=torch.int64).random_(generator=generator)
            if source.num_workers:  # here torch calls iter() once more
                begun = replayed.begin()
        if skip or source.num_workers:
            replayed.advance(begun, skip)
        if start is not None:
            # The copy draws the workers' seed again, from the same state; the real generators stay where they are now.
            start.state.restore()
            if generator is not None and "generator" in start.generators:
                clone.generator = torch.Generator()
                clone.generator.set_state(start.generators["generator"].cpu())
        iterator = cast("Iterator[T]", iter(clone))
    finally:
        if start is not None:
            now.restore()
    if source.persistent_workers and source.num_workers:
        # The next epoch keeps these workers, as it would have kept the original ones.
        source._iterator = clone._iterator  # pyright: ignore[reportPrivateUsage]
    return iterator


def _read_again(loader: Iterable[T], skip: int, start: _Start | None) -> Iterator[T]:
    now = RandomState.take()
    try:
        if start is not None:
            start.state.restore()
        iterator = iter(loader)
        if skip:
            if not isinstance(loader, Sequence):
                _log.warning("%s has no indices: reading and dropping %d batches.", type(loader).__name__, skip)
            next(islice(iterator, skip - 1, skip), None)
    finally:
        if start is not None:
            now.restore()
    return _Counted(iterator)  # a count of its own would include what was dropped


def _has_indices(loader: object) -> bool:
    return isinstance(loader, DataLoader) and not has_iterable_dataset(cast("object", loader))


def _owns_state(loader: object) -> bool:
    return isinstance(loader, Stateful)


def _generators(loader: object) -> dict[str, torch.Generator]:
    """The generators that a loader and its samplers were given, by the path of attributes to them, each once."""
    found: dict[str, torch.Generator] = {}
    waiting: list[tuple[str, object]] = [("", loader)]
    seen: set[int] = set()
    while waiting:
        path, holder = waiting.pop(0)
        generator: object = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            found[f"{path}generator"] = generator
        for name in ("sampler", "batch_sampler"):
            inner: object = getattr(holder, name, None)
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((f"{path}{name}.", inner))
    return found


def _seekable(loader: object) -> SeekableSampler | None:
    """The sampler that can be told a position, where batches are its indices in order."""
    batches: object = getattr(loader, "batch_sampler", None)
    sampler: object = getattr(loader if batches is None else batches, "sampler", None)
    plain = batches is None or type(batches) is BatchSampler
    return sampler if plain and isinstance(sampler, SeekableSampler) else None


def _samples(loader: object, batches: int) -> int | None:
    """Samples over all ranks in the first ``batches`` batches; None where only batches can be counted."""
    sampler = _seekable(loader)
    if sampler is None:
        return None
    batch_sampler: object = getattr(loader, "batch_sampler", None)
    size = 1 if batch_sampler is None else cast("BatchSampler", batch_sampler).batch_size
    return min(batches * size, len(sampler)) * sampler.num_replicas
