"""The training loader of a run: one iterable of batches, with its length, limit and place."""

from __future__ import annotations

import math
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from fulmen._data_waits import Spent
from fulmen._loaders import (
    batches_of,
    combined_length,
    is_single,
    leaves,
    length_of,
    limited,
    map_loaders,
    may_end_early,
    without_shuffling,
)
from fulmen._raw_batches import RawBatches
from fulmen._uneven import samples_of
from fulmen_data import CombinedLoader, batches_left
from fulmen_fabric import PossibleUserWarning, rank_zero_warn
from fulmen_fabric.place import LoaderPlace
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError, Stateful

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from fulmen._data_waits import DataWaits
    from fulmen._loaders import Advise, LoaderSource
    from fulmen._splitter import Splitter
    from fulmen.settings import BatchLimit
    from fulmen_fabric import UnevenRounds

__all__ = ["TrainLoader"]


class TrainLoader:
    """The training loader of a run.

    Args:
        source: whom to ask for it.
        limit: most batches of an epoch, or the fraction of them.
        limit_name: the flag that set the limit.
        splitter: gives each rank its part.
        waits: told how long each batch was waited for.
        process: how the strategy feeds its device, if it wants to.
        reload_every_n_epochs: when to ask for it again; 0: never.
        overfit: whether every epoch reads the same batches.
        advise: told of the loaders, to warn of what is slow in them.
        raw: where the step fetches its batches itself, told of each.
        rounds: lets ranks with unequal data go through an epoch together; None for one process.
        gather: an object of every rank.
    """

    def __init__(
        self,
        source: LoaderSource,
        *,
        limit: BatchLimit,
        limit_name: str,
        splitter: Splitter,
        waits: DataWaits,
        process: Callable[[Iterable[object]], Iterable[object]] | None = None,
        reload_every_n_epochs: int = 0,
        overfit: bool = False,
        advise: Advise | None = None,
        raw: Callable[[object], object] | None = None,
        rounds: UnevenRounds | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        self._source, self._limit, self._limit_name = source, limit, limit_name
        self._splitter, self._waits, self._process = splitter, waits, process
        self._reload_every = reload_every_n_epochs
        self._overfit = overfit
        self._advise = advise
        self.raw = raw
        """Where the step fetches its batches itself: told of each."""
        self.rounds = rounds
        """Lets ranks with unequal data go through an epoch together; None for one process."""
        self._gather = gather
        self._is_uneven = False
        self._own_batches: float = 0
        self._rounds_of_epoch: float = 0
        self._raw_batches: RawBatches | None = None
        self._looks_ahead = False
        self._loaded_in: int | None = None
        self._running: Iterator[tuple[object, bool]] | None = None
        self.last_is_out = False
        """Whether the epoch's last batch has been handed out, where only looking ahead could tell."""
        self._epoch = -1
        self._restored: Mapping[str, object] | None = None
        self.user_loader: object = None
        self.loader: Any = ()
        self._combined = False
        self.batches: float = 0
        """Of an epoch; the most that any rank has."""
        self._whole: float = 0  # without the limit

    def setup(self, epoch: int) -> None:
        """Ask for the loader if that has not been done, or if it is time to ask again."""
        due = self._reload_every > 0 and self._loaded_in is not None and epoch - self._loaded_in >= self._reload_every
        if self._loaded_in is not None and not (due and self._source.from_hook):
            return
        self.close()
        self.user_loader = loaders = self._source.load()
        given = leaves(loaders)
        if self._overfit:
            loaders = map_loaders(loaders, partial(without_shuffling, self._source.hook))
        loaders = map_loaders(loaders, self._splitter.train)
        split = leaves(loaders)
        lengths = [length_of(loader) for loader in split]
        if self._advise is not None:
            self._advise(given, split, lengths)
        limits = [limited(self._limit_name, length, self._limit, "training") for length in lengths]
        self._looks_ahead = any(may_end_early(loader) for loader in split)
        if len(split) == 1 and is_single(loaders):
            self.loader, self._combined = loaders, False
            self.batches, self._whole = limits[0], lengths[0]
        else:
            combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
            if combined.mode == "sequential":
                raise MisconfigurationException(
                    "train_dataloader is a CombinedLoader with mode='sequential', which is for evaluation. "
                    "Use 'min_size', 'max_size' or 'max_size_cycle'."
                )
            self.loader, self._combined = combined, True
            self.batches = combined_length(combined.mode, limits)
        self._waits.num_workers = None if self._combined else getattr(self.loader, "num_workers", None)
        self._compare_ranks()
        self._place = LoaderPlace(self.loader, self._splitter.world_size, self._rest_of_epoch)
        self._place.reads_ahead = (
            self._looks_ahead or self._is_uneven or self.raw is not None or self._process is not None
        )
        self._loaded_in = epoch

    def _compare_ranks(self) -> None:
        """Find out whether ranks have unequal data; equal ones run as if nobody had asked."""
        self._own_batches, self._is_uneven = self.batches, False
        if self.rounds is None or self._gather is None or self.raw is not None:
            return
        samples = None if self._combined else samples_of(self.loader, self.batches)
        of_ranks: list[tuple[float, int | None, bool]] = self._gather((self.batches, samples, self._looks_ahead))
        self.batches = max(batches for batches, _, _ in of_ranks)
        is_open = any(looks_ahead for _, _, looks_ahead in of_ranks)
        self._is_uneven = is_open or len(set(of_ranks)) > 1
        self._rounds_of_epoch = math.inf if is_open else self.batches

    @property
    def is_loaded(self) -> bool:
        """Whether the user has been asked for the loader."""
        return self._loaded_in is not None

    def epoch_batches(self, epoch: int, start: int) -> Iterator[tuple[object, bool]]:
        """The batches of ``epoch`` from index ``start`` on, each with whether it is the last.

        Called again within an epoch it gives the same iterator, so that a loop that was left goes on where it was.
        """
        if self._running is None or self._epoch != epoch:
            self.setup(epoch)
            position, restored = self._place.position, self._restored
            if restored is not None:
                position.load_state_dict(restored)
                if self.raw is not None:
                    start = cast("int", restored["batches"])  # a step may have fetched several
                self._restored = None
            else:
                position.restart()
            position.set_epoch(epoch)
            waits = self._waits
            with waits.starting():
                iterator: Iterator[object] = iter(position)
            if self._combined:
                iterator = batches_of(cast("Iterator[tuple[object, int, int]]", iterator))
            if self._process is not None:
                iterator = iter(self._process(iterator))
            first, rest = waits.first, waits.rest
            if not waits.looks_at_the_host_alone or self._looks_ahead or self.raw is not None:
                iterator, first, rest = waits.over(iterator), Spent(), Spent()
            if self.raw is None:
                self.last_is_out = False
                if self._looks_ahead:
                    self._running = _with_last_found(iterator, self._own_batches, start, self._note_last)
                else:
                    self._running = _with_last_counted(iterator, self._own_batches, start, first, rest)
                if self._is_uneven and self.rounds is not None:
                    own = (batch for batch, _ in self._running)
                    taken = start if restored is None else cast("int", restored.get("batches", start))
                    self._running = self.rounds.over(own, length=self._rounds_of_epoch, start=start, taken=taken)
            else:
                self._raw_batches = RawBatches(
                    iterator, length=self.batches, start=start, told=self.raw, looks_ahead=self._looks_ahead
                )
                self._running = self._raw_batches.rounds()
            self._epoch = epoch
        return self._running

    def _note_last(self) -> None:
        self.last_is_out = True

    def end_epoch(self) -> None:
        """Forget the running iterator: the next epoch starts a new one."""
        self._running = self._raw_batches = None
        self.last_is_out = False
        if self._loaded_in is not None:
            self._place.end_epoch()

    def reload(self, epoch: int) -> None:
        """Ask for the loader again now, between two epochs: it would be another one."""
        self.close()
        self._loaded_in, self._combined = None, False
        self.setup(epoch)

    def close(self) -> None:
        """End the running iterator and all worker processes, now and not whenever they are collected."""
        self._running = None
        if self._loaded_in is not None:
            self._place.close()

    # ------------------------------------------------------------------ in checkpoints

    def state_dict(self, batch: int, *, within_epoch: bool) -> dict[str, object]:
        """Where the loader is after ``batch`` batches of the running epoch, or between two epochs."""
        if self._raw_batches is not None:
            batch = self._raw_batches.fetched  # a step may have fetched several
        elif self._is_uneven and self.rounds is not None and self._running is not None:
            batch = self.rounds.taken  # other ranks may have had more
        return self._place.state_dict(batch, within_epoch=within_epoch)

    def load_state_dict(self, state: Mapping[str, Any], *, saved_ranks: int) -> int | None:
        """Go on from there when batches are next asked for.

        Args:
            state: from ``state_dict`` of this rank, or of any where ``saved_ranks`` is another number than now.
            saved_ranks: how many parts the data had.

        Returns:
            The index of the next batch, where that is another one with this number of ranks; else None.

        Raises:
            MisconfigurationException: the loader is of another kind, or nobody knows what is left of the epoch.
        """
        rest = self._place.load_state_dict(state, saved_ranks=saved_ranks)
        if rest is None:
            return None
        loader, position = rest
        self._restored = position
        left = None if saved_ranks == self._splitter.world_size else batches_left(loader, position)
        if left is None:
            return None
        whole = self._whole
        if self.batches < whole:  # limited: the epoch ends after so many batches, whoever reads them
            return int(min(self.batches, cast("int", position["batches"])))
        return max(int(whole) - left, 0)

    def _rest_of_epoch(self, position: Mapping[str, object], saved_ranks: int) -> tuple[object, dict[str, object]]:
        given = self.loader if self._combined else leaves(self.user_loader)[0]
        return self._splitter.rest_of_epoch(given, position, saved_ranks)

    def own_states(self) -> list[Any]:
        """The states of the loaders that have one, in order."""
        return [loader.state_dict() for loader in self._owners()]

    def load_own_states(self, states: Sequence[Any], epoch: int, batch: int) -> None:
        """Give them to the loaders that have one, where nothing else is known about ``batch`` of ``epoch``.

        Raises:
            MisconfigurationRuntimeError: there are more or fewer.
        """
        owners = self._owners()
        if len(states) != len(owners):
            raise MisconfigurationRuntimeError(
                f"the checkpoint holds the states of {len(states)} training loaders, and {len(owners)} of those now "
                "have load_state_dict. Pass the loaders that were saved, or resume from a checkpoint of an epoch's end."
            )
        if not owners:
            rank_zero_warn(
                f"the checkpoint does not say where in epoch {epoch} its data were: the epoch goes on at batch {batch} "
                "with data read from their beginning, and ends as early as it would have.",
                category=PossibleUserWarning,
            )
        for loader, state in zip(owners, states, strict=True):
            loader.load_state_dict(state)

    def _owners(self) -> list[Stateful]:
        return [loader for loader in leaves(self.loader) if isinstance(loader, Stateful)]

    @property
    def begins_again(self) -> bool:
        """Whether there are data that a resumed epoch reads from their beginning."""
        return self._place.begins_again

    def warn_of_what_is_lost(self) -> None:
        """Name, once each, the data whose place this checkpoint cannot hold."""
        self._place.warn_of_what_is_lost()


def _with_last_counted(
    iterator: Iterator[object], length: float, start: int, first: Spent, rest: Spent
) -> Iterator[tuple[object, bool]]:
    """Pair each batch with whether it is the epoch's last by its index; note how long the host waited for it.

    It measures by itself, and as many lines for each batch, since this is on the path of every batch.
    """
    index, now, spent = start, perf_counter, first
    while index < length:
        began = now()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        spent.s += now() - began
        spent = rest
        index += 1
        yield batch, index >= length


def _with_last_found(
    iterator: Iterator[object], length: float, start: int, note_last: Callable[[], None]
) -> Iterator[tuple[object, bool]]:
    """The same where a count does not tell: looks one batch ahead."""
    index = start
    if index >= length:
        return
    for batch in iterator:
        index += 1
        while index < length:
            following = next(iterator, _END)
            if following is _END:
                break
            yield batch, False
            batch = following  # the batch in hand is always one behind the iterator
            index += 1
        note_last()
        yield batch, True
        return


_END = object()
