"""The training loader of a run: one iterable of batches, with its length, limit and place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from fulmen._loaders import batches_of, combined_length, is_single, leaves, length_of, limited, map_loaders
from fulmen_data import CombinedLoader, LoaderPosition, batches_left, needs_elastic_loader, rebuild_loader
from fulmen_fabric import PossibleUserWarning, rank_zero_warn
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError, Stateful

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

    from fulmen._loaders import LoaderSource, Splitter
    from fulmen.settings import BatchLimit

__all__ = ["TrainLoader"]


class TrainLoader:
    """The training loader of a run.

    Args:
        source: whom to ask for it.
        limit: most batches of an epoch, or the fraction of them.
        limit_name: the flag that set the limit.
        splitter: gives each rank its part.
        process: how the strategy feeds its device, if it wants to.
        reload_every_n_epochs: when to ask for it again; 0: never.
        overfit: whether every epoch reads the same batches.
    """

    def __init__(
        self,
        source: LoaderSource,
        *,
        limit: BatchLimit,
        limit_name: str,
        splitter: Splitter,
        process: Callable[[Iterable[object]], Iterable[object]] | None = None,
        reload_every_n_epochs: int = 0,
        overfit: bool = False,
    ) -> None:
        self._source, self._limit, self._limit_name = source, limit, limit_name
        self._splitter, self._process = splitter, process
        self._reload_every = reload_every_n_epochs
        self._overfit = overfit
        self._loaded_in: int | None = None
        self._running: Iterator[tuple[object, bool]] | None = None
        self._epoch = -1
        self._rest: LoaderPosition[object] | None = None
        self._restored: Mapping[str, object] | None = None
        self._warned: set[str] = set()
        self.user_loader: object = None
        self.loader: Any = ()
        self._combined = False
        self.batches: float = 0

    def setup(self, epoch: int) -> None:
        """Ask for the loader if that has not been done, or if it is time to ask again."""
        due = self._reload_every > 0 and self._loaded_in is not None and epoch - self._loaded_in >= self._reload_every
        if self._loaded_in is not None and not (due and self._source.from_hook):
            return
        self.user_loader = loaders = self._source.load()
        if self._overfit:
            loaders = map_loaders(loaders, _without_shuffling)
        loaders = map_loaders(loaders, self._splitter.train)
        if len(leaves(loaders)) == 1 and is_single(loaders):
            self.loader = loaders
            length = length_of(loaders)
        else:
            combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
            if combined.mode == "sequential":
                raise MisconfigurationException(
                    "train_dataloader is a CombinedLoader with mode='sequential', which is for evaluation. "
                    "Use 'min_size', 'max_size' or 'max_size_cycle'."
                )
            self.loader, self._combined = combined, True
            length = combined_length(combined)
        self._position = LoaderPosition(self.loader)
        self.batches = limited(self._limit_name, length, self._limit, "training")
        self._position.reads_ahead = self.batches == math.inf or self._process is not None
        self._loaded_in = epoch
        if length == 0:
            rank_zero_warn("the training loader has no batch, so nothing will be trained.")

    def epoch_batches(self, epoch: int, start: int) -> Iterator[tuple[object, bool]]:
        """The batches of ``epoch`` from index ``start`` on, each with whether it is the last.

        Called again within an epoch it gives the same iterator, so that a loop that was left goes on where it was.
        """
        if self._running is None or self._epoch != epoch:
            self.setup(epoch)
            position = self._place
            if self._restored is not None:
                position.load_state_dict(self._restored)
                self._restored = None
            else:
                position.restart()
            position.set_epoch(epoch)
            iterator: Iterator[object] = iter(position)
            if self._combined:
                iterator = batches_of(cast("Iterator[tuple[object, int, int]]", iterator))
            if self._process is not None:
                iterator = iter(self._process(iterator))
            self._running = _with_last(iterator, self.batches, start)
            self._epoch = epoch
        return self._running

    @property
    def _place(self) -> LoaderPosition[object]:
        return self._position if self._rest is None else self._rest

    def end_epoch(self) -> None:
        """Forget the running iterator: the next epoch starts a new one."""
        self._running = self._rest = None

    def reload(self, epoch: int) -> None:
        """Ask for the loader again now, between two epochs: it would be another one."""
        self.close()
        self._loaded_in, self._combined = None, False
        self.setup(epoch)

    def close(self) -> None:
        """Let go of the running iterator, and so of its workers, now and not whenever it is collected."""
        self._running = None
        if self._loaded_in is not None:
            self._place.restart()
        self._rest = None

    # ------------------------------------------------------------------ in checkpoints

    def state_dict(self, batch: int, *, within_epoch: bool) -> dict[str, object]:
        """Where the loader is after ``batch`` batches of the running epoch, or between two epochs."""
        position = self._place.state_dict(batch) if within_epoch else None
        return {
            "position": position,
            "generators": self._position.generator_states(),
            "order": self._position.order,
        }

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
        position, ranks = cast("dict[str, object] | None", state["position"]), self._splitter.world_size
        if position is None:
            self._position.set_generator_states(state["generators"])
            self._position.set_order(state["order"])
            return None
        loader: object = self.loader
        elastic = needs_elastic_loader(loader, position, saved_ranks=saved_ranks, ranks=ranks)
        if elastic and self._position.lost is None:
            given = leaves(self.user_loader)
            loader, position = self._splitter.rest_of_epoch(
                self.loader if self._combined else given[0], position, saved_ranks
            )
            self._rest = LoaderPosition(
                cast("Iterable[object]", loader), replayed=position if _is_replayed(position) else None
            )
        self._restored = position
        left = None if saved_ranks == ranks else batches_left(loader, position)
        if left is None:
            return None
        whole = length_of(self.loader)
        if self.batches < whole:  # limited: the epoch ends after so many batches, whoever reads them
            return int(min(self.batches, cast("int", position["batches"])))
        return max(int(whole) - left, 0)

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
        return any(position.lost is not None for position in self._place.parts())

    def warn_of_what_is_lost(self) -> None:
        """Name, once each, the data whose place this checkpoint cannot hold."""
        for position in self._place.parts():
            lost, draws = position.lost, position.draws
            if lost is not None and lost not in self._warned:
                self._warned.add(lost)
                rank_zero_warn(
                    f"this checkpoint is saved in the middle of an epoch, and its place in {lost} is not in it: "
                    f"resumed from it, the epoch goes on with {lost} read from its beginning. Give it state_dict and "
                    "load_state_dict, or wrap the loader in fulmen_data.FastForward to have the batches before read "
                    "again and dropped.",
                    category=PossibleUserWarning,
                )
            if draws is not None and draws not in self._warned:
                self._warned.add(draws)
                rank_zero_warn(
                    f"{draws} draws random numbers in loader workers, whose random state is not in checkpoints: "
                    "resumed in the middle of an epoch, a run draws other ones. Use seed_everything(..., "
                    f"workers='samples'), or fulmen_data.SeededDataset({draws}): then they depend on epoch and sample "
                    "alone.",
                    category=PossibleUserWarning,
                )


def _is_replayed(position: Mapping[str, object]) -> bool:
    return "replayed" in cast("Mapping[str, object]", position["order"] or {})


def _with_last(iterator: Iterator[object], length: float, start: int) -> Iterator[tuple[object, bool]]:
    """Pair each batch with whether it is the epoch's last; looks one batch ahead only where the length is unknown."""
    if length != math.inf:
        index = start
        while index < length:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            index += 1
            yield batch, index >= length
        return
    for batch in iterator:
        for following in iterator:
            yield batch, False
            batch = following  # the batch in hand is always one behind the iterator
        yield batch, True


def _without_shuffling(loader: object) -> object:
    if not isinstance(loader, DataLoader):
        return loader
    source = cast("DataLoader[object]", loader)
    if not isinstance(source.sampler, RandomSampler):
        return source
    rank_zero_warn("overfit_batches trains on the same batches every epoch, so shuffling is turned off.")
    dataset = cast("Sized", source.dataset)  # a RandomSampler needs its length, too
    return rebuild_loader(source, sampler=SequentialSampler(dataset))
