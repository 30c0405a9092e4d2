"""Where batches come from: the user's loaders, limited, split over ranks, and kept at their place.

Loaders passed to a call beat the datamodule's hooks, which beat the module's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from fulmen._predictions import tracked
from fulmen_data import (
    CombinationMode,
    CombinedLoader,
    end_workers,
    has_iterable_dataset,
    rebuild_loader,
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
    "Advise",
    "EvalLoaders",
    "LoaderSource",
    "batches_of",
    "combined_length",
    "is_single",
    "leaves",
    "length_of",
    "limited",
    "map_loaders",
    "may_end_early",
    "without_shuffling",
]

Advise = Callable[[Sequence[object], Sequence[object], Sequence[float]], None]
"""Called with loaders as the user gave them, as they were split over ranks, and their lengths on this rank."""

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
    return bool(items) and all(_is_loader(item) or _holds_loaders(item) for item in items)


def _holds_loaders(value: object) -> bool:
    if isinstance(value, Mapping):
        named = cast("Mapping[object, object]", value)
        return bool(named) and all(_is_loader(item) or _holds_loaders(item) for item in named.values())
    return _is_collection(value)


def _is_loader(item: object) -> bool:
    """Whether ``item``, found in a list, is a loader and not a batch: data is a tensor, an array or plain Python."""
    if isinstance(item, (DataLoader, CombinedLoader, range)):
        return True
    if isinstance(item, (Tensor, str, bytes, list, tuple, set, Mapping)):
        return False
    # Batches of one's own class can be moved to a device.
    return hasattr(item, "__iter__") and not hasattr(item, "__array__") and not hasattr(item, "to")


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
    """Batches of one loader; ``inf`` where it does not know."""
    length = sized_len(loader)
    return _INF if length is None else length


def may_end_early(loader: object) -> bool:
    """Whether only reading tells which batch is the last: no length, or one that an iterable data set claims."""
    return has_iterable_dataset(loader) or sized_len(loader) is None


def combined_length(mode: CombinationMode, lengths: Sequence[float]) -> float:
    """Batches of one pass over loaders of these lengths."""
    if mode == "sequential":
        return sum(lengths)
    return min(lengths) if mode == "min_size" else max(lengths)


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


def without_shuffling(hook: str, loader: object) -> object:
    """``loader`` in the order of its data set, with a warning if that was another; ``hook`` is where it came from."""
    if not _is_data_loader(loader) or has_iterable_dataset(loader) or isinstance(loader.sampler, SequentialSampler):
        return loader
    rank_zero_warn(
        f"overfit_batches needs the same batches every epoch, so shuffling is turned off: {hook} loses its "
        f"{type(cast('object', loader.sampler)).__name__}. Drop shuffle=True to silence this."
    )
    dataset = cast("Sized", loader.dataset)
    return rebuild_loader(loader, sampler=SequentialSampler(dataset))


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
        overfit: bool = False,
        advise: Advise | None = None,
        track_indices: bool = False,
    ) -> None:
        self._source, self._limit, self._limit_name = source, limit, limit_name
        self._split, self._process = split, process
        self._reload_every = reload_every_n_epochs
        self._overfit, self._advise = overfit, advise
        self._track_indices = track_indices
        self._loaded_in: int | None = None
        self.user_loaders: object = None
        self.collection: object = None
        """What runs, in the shape that the user gave it."""
        self.loaders: list[Iterable[object]] = []
        self.trackers: list[IndexBatchSamplerWrapper | None] = []
        """For each loader, who knows which samples its batches hold; empty unless that was asked for."""
        self.limits: list[float] = []

    def setup(self, epoch: int) -> None:
        """Ask for the loaders if that has not been done, or if it is time to ask again."""
        due = self._reload_every > 0 and self._loaded_in is not None and epoch - self._loaded_in >= self._reload_every
        if self._loaded_in is not None and not (due and self._source.from_hook):
            return
        self.close()
        self.user_loaders = loaders = self._source.load()
        given = leaves(loaders)
        if self._overfit:
            loaders = map_loaders(loaders, partial(without_shuffling, self._source.hook))
        self.collection = loaders = map_loaders(loaders, self._split)
        split = leaves(loaders)
        lengths = [length_of(loader) for loader in split]
        if self._advise is not None:
            self._advise(given, split, lengths)
        limits = [limited(self._limit_name, length, self._limit, self._source.hook) for length in lengths]
        if isinstance(loaders, CombinedLoader) and loaders.mode != "sequential":
            self.loaders[:] = [_Combined(loaders)]  # in place: a running evaluation holds the lists
            self.limits[:] = [combined_length(loaders.mode, limits)]
        else:
            if self._track_indices:
                split, self.trackers[:] = tracked(split)
            self.loaders[:] = split if self._process is None else [self._process(loader) for loader in split]
            self.limits[:] = limits
        self._loaded_in = epoch

    def reload(self, epoch: int) -> None:
        """Ask for the loaders again now: they would be others."""
        self.close()
        self._loaded_in = None
        self.setup(epoch)

    def close(self) -> None:
        """End the worker processes that the loaders keep between passes."""
        if isinstance(self.collection, CombinedLoader):
            self.collection.close()
        for loader in leaves(self.collection) if self._loaded_in is not None else ():
            end_workers(loader)

    @property
    def several(self) -> bool:
        """Whether there is more than one loader."""
        return len(self.loaders) > 1
