"""Where batches come from: the user's loaders, limited, split over ranks, and kept at their place.

Loaders passed to a call beat the datamodule's hooks, which beat the module's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch.utils.data import BatchSampler, DataLoader

from fulmen._predictions import tracked
from fulmen_data import (
    CombinedLoader,
    add_worker_seeding,
    distribute_loader,
    elastic_loader,
    has_iterable_dataset,
    rebuild_loader,
    seed_samples,
    sized_len,
)
from fulmen_fabric import rank_zero_warn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule
    from fulmen.settings import BatchLimit
    from fulmen_data import IndexBatchSamplerWrapper

__all__ = [
    "EvalLoaders",
    "LoaderSource",
    "Splitter",
    "batches_of",
    "combined_length",
    "is_single",
    "leaves",
    "length_of",
    "limited",
    "map_loaders",
]

_INF = math.inf


class LoaderSource:
    """One stage's loaders: given by the caller, or asked of the datamodule or module when they are first needed."""

    def __init__(
        self, stage: str, given: object, datamodule: LightningDataModule | None, module: LightningModule
    ) -> None:
        self.hook = f"{stage}_dataloader"
        self.scoped: Callable[..., Callable[[], object]] = _as_it_is
        """``(name, hook, owner)``: wraps the hook so that ``self.log`` inside it knows where it is called."""
        self._given = given
        self._owner: Any = None
        if given is None:
            for owner in (datamodule, module):
                if owner is not None and _overrides(owner, self.hook):
                    self._owner = owner
                    break

    @property
    def is_defined(self) -> bool:
        """Whether anybody supplies loaders."""
        return self._given is not None or self._owner is not None

    @property
    def from_hook(self) -> bool:
        """Whether the loaders come from a hook, and so can be made anew."""
        return self._owner is not None

    def load(self) -> object:
        """The loaders as the user gave them; calls the hook."""
        owner, hook = self._owner, self.hook
        loaders = self._given if owner is None else self.scoped(hook, getattr(owner, hook), owner)()
        if loaders is None:
            raise MisconfigurationException(
                f"{self.hook} returned None. Return a DataLoader, any iterable of batches, or a collection of them."
            )
        _require_iterable(self.hook, loaders)
        return loaders


def _as_it_is(_name: str, hook: Callable[[], object], _owner: object) -> Callable[[], object]:
    return hook


def _overrides(owner: object, name: str) -> bool:
    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule

    method = getattr(owner, name, None)
    own = getattr(method, "__func__", method)
    return method is not None and own not in (
        getattr(LightningModule, name, None),
        getattr(LightningDataModule, name, None),
    )


def _require_iterable(name: str, loaders: object) -> None:
    for loader in leaves(loaders):
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise MisconfigurationException(
                f"{name} gave an object of type {type(loader).__name__}, which is not iterable. "
                "Pass a DataLoader or any iterable of batches."
            )


def leaves(loaders: object) -> list[Any]:
    """The single loaders in a nested collection of them."""
    if isinstance(loaders, CombinedLoader):
        return list(loaders.flattened)
    if isinstance(loaders, Mapping):
        named = cast("Mapping[object, object]", loaders)
        return [leaf for value in named.values() for leaf in leaves(value)]
    if _is_collection(loaders):
        return [leaf for value in loaders for leaf in leaves(value)]
    return [loaders]


def _is_collection(loaders: object) -> TypeGuard[Sequence[object]]:
    # A list or tuple of loaders; a list of batches is itself a loader.
    if not isinstance(loaders, (list, tuple)):
        return False
    items = cast("Sequence[object]", loaders)
    return bool(items) and all(
        isinstance(item, (DataLoader, CombinedLoader, Mapping)) or _is_collection(item) for item in items
    )


def is_single(loaders: object) -> bool:
    """Whether this is one loader, and no collection."""
    return not isinstance(loaders, (CombinedLoader, Mapping)) and not _is_collection(loaders)


def _is_data_loader(loader: object) -> TypeGuard[DataLoader[Any]]:
    return isinstance(loader, DataLoader)


def limited(name: str, length: float, limit: BatchLimit, stage: str) -> float:
    """How many of ``length`` batches to take: an int counts batches, a float is a fraction, rounded down.

    Raises:
        MisconfigurationException: the fraction is of an unknown length, or leaves no batch.
    """
    if isinstance(limit, int):
        return min(length, limit)
    if limit == 1.0 or limit == 0.0:
        return length if limit else 0
    if length == _INF:
        raise MisconfigurationException(
            f"{name}={limit!r} is a fraction, but the {stage} loader does not know its length. "
            "Give a number of batches."
        )
    taken = math.floor(length * limit)
    if taken == 0 and length > 0:
        raise MisconfigurationException(
            f"{name}={limit!r} of {int(length)} batches is less than one batch. Give at least {1 / length:.3g}, "
            "or a number of batches."
        )
    return taken


def length_of(loader: object) -> float:
    """Batches of one loader; ``inf`` where it does not know, or where its own word cannot be trusted."""
    if has_iterable_dataset(loader):
        return _INF
    length = sized_len(loader)
    return _INF if length is None else length


class Splitter:
    """How loaders are split over ranks: what ``distribute_loader`` needs to know of a run."""

    def __init__(
        self, *, rank: int, world_size: int, seed: int, enabled: bool, overfit: bool, seeding: str = "0"
    ) -> None:
        self.world_size = world_size
        self._rank, self._seed = rank, seed
        self._seeding = seeding
        self._may_split = enabled
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
                world_size=self.world_size,
                shuffle=not self._overfit if training else None,
                training=training,
                seed=self._seed,
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


def combined_length(combined: CombinedLoader) -> float:
    """Batches of one pass, as far as the loaders know their lengths."""
    lengths = [length_of(leaf) for leaf in combined.flattened]
    if combined.mode == "sequential":
        return sum(lengths)
    return min(lengths) if combined.mode == "min_size" else max(lengths)


def batches_of(combined: Iterable[tuple[object, int, int]]) -> Iterator[object]:
    """What a CombinedLoader gives, without ``batch_idx`` and ``dataloader_idx``."""
    for batch, _, _ in combined:
        yield batch


def map_loaders(loaders: object, function: Callable[[object], object]) -> object:
    """The same collection with ``function`` applied to each loader."""
    if isinstance(loaders, CombinedLoader):
        loaders.flattened = [function(leaf) for leaf in loaders.flattened]
        return loaders
    if isinstance(loaders, Mapping):
        named = cast("Mapping[object, object]", loaders)
        return {key: map_loaders(value, function) for key, value in named.items()}
    if _is_collection(loaders):
        return [map_loaders(value, function) for value in loaders]
    return function(loaders)


class _Combined:
    """The batches of a CombinedLoader without their indices, from the beginning at each ``iter``."""

    def __init__(self, combined: CombinedLoader) -> None:
        self._loader = combined

    def __iter__(self) -> Iterator[object]:
        return batches_of(self._loader)


class EvalLoaders:
    """The loaders of an evaluation or prediction: a list, run one after the other."""

    def __init__(
        self,
        source: LoaderSource,
        *,
        limit: BatchLimit,
        limit_name: str,
        split: Callable[[object], object],
        process: Callable[[Iterable[object]], Iterable[object]] | None = None,
        reload_every_n_epochs: int = 0,
        track_indices: bool = False,
    ) -> None:
        self._source, self._limit, self._limit_name = source, limit, limit_name
        self._split, self._process = split, process
        self._reload_every = reload_every_n_epochs
        self._track_indices = track_indices
        self._loaded_in: int | None = None
        self.user_loaders: object = None
        self.loaders: list[Iterable[object]] = []
        self.trackers: list[IndexBatchSamplerWrapper | None] = []
        """For each loader, who knows which samples its batches hold; empty unless that was asked for."""
        self.limits: list[float] = []

    def setup(self, epoch: int) -> None:
        """Ask for the loaders if that has not been done, or if it is time to ask again."""
        due = self._reload_every > 0 and self._loaded_in is not None and epoch - self._loaded_in >= self._reload_every
        if self._loaded_in is not None and not (due and self._source.from_hook):
            return
        self.user_loaders = loaders = self._source.load()
        split = map_loaders(loaders, self._split)
        if isinstance(split, CombinedLoader) and split.mode != "sequential":
            self.loaders[:] = [_Combined(split)]  # in place: a running evaluation holds the lists
            lengths: list[float] = [combined_length(split)]
        else:
            single = leaves(split)
            if self._track_indices:
                single, self.trackers[:] = tracked(single)
            self.loaders[:] = single if self._process is None else [self._process(leaf) for leaf in single]
            lengths = [length_of(leaf) for leaf in single]
        self.limits[:] = [limited(self._limit_name, length, self._limit, self._source.hook) for length in lengths]
        for index, length in enumerate(lengths):
            if length == 0:
                rank_zero_warn(f"{self._source.hook}: loader {index} has no batch.")
        self._loaded_in = epoch

    def reload(self, epoch: int) -> None:
        """Ask for the loaders again now: they would be others."""
        self._loaded_in = None
        self.setup(epoch)

    @property
    def several(self) -> bool:
        """Whether there is more than one loader."""
        return len(self.loaders) > 1
