"""Several loaders read as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal, cast, get_args

from fulmen_data._tree import leaves, map_leaves
from fulmen_data.position import LoaderPosition
from fulmen_data.sizes import sized_len
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError, did_you_mean

__all__ = ["CombinationMode", "CombinedLoader"]

CombinationMode = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
Item = tuple[object, int, int]


class CombinedLoader:
    """Reads a nested collection (dict, list, tuple) of loaders as one loader of ``(batch, batch_idx, dataloader_idx)``.

    ==================  =================================================================  ==========================
    mode                batch                                                              ends with
    ==================  =================================================================  ==========================
    ``min_size``        one of each loader, in the collection's shape                      the shortest
    ``max_size_cycle``  the same; loaders that end begin again                             the longest
    ``max_size``        the same; None for loaders that have ended                         the longest
    ``sequential``      of one loader after the other; ``dataloader_idx`` says of which    the last
    ==================  =================================================================  ==========================

    Its state is the position in every loader, so a resumed epoch goes on exactly; see ``LoaderPosition``.

    Args:
        iterables: the loaders; a list of plain values counts as a loader.
        mode: one of the four.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(self, iterables: object, mode: CombinationMode = "min_size") -> None:
        modes = get_args(CombinationMode)
        if mode not in modes:
            raise MisconfigurationException(
                f"CombinedLoader got mode={mode!r}.{did_you_mean(str(mode), modes)} "
                f"Allowed: {', '.join(map(repr, modes))}."
            )
        self._mode: CombinationMode = mode
        self._iterables = iterables
        self._positions = _positions(leaves(iterables))
        self._limits: list[float] | None = None
        self._iterator: _Parallel | _Sequential | None = None
        self._resume: Mapping[str, object] | None = None

    @property
    def mode(self) -> CombinationMode:
        """How the loaders are combined."""
        return self._mode

    @property
    def iterables(self) -> object:
        """The collection that was given."""
        return self._iterables

    @property
    def flattened(self) -> list[object]:
        """The loaders in order; assign a list of as many to replace them."""
        return [position.loader for position in self._positions]

    @flattened.setter
    def flattened(self, loaders: Sequence[object]) -> None:
        if len(loaders) != len(self._positions):
            raise MisconfigurationException(
                f"flattened was given {len(loaders)} loaders; this CombinedLoader holds {len(self._positions)}. "
                "Give one for each."
            )
        self._positions = _positions(loaders)
        remaining = iter(loaders)
        self._iterables = map_leaves(lambda _: next(remaining), self._iterables)
        self._iterator = None

    @property
    def positions(self) -> list[LoaderPosition[object]]:
        """The place in each loader, in order."""
        return list(self._positions)

    @property
    def sampler(self) -> object:
        """The loaders' samplers, in the collection's shape; None where there is none."""
        return map_leaves(lambda loader: getattr(loader, "sampler", None), self._iterables)

    @property
    def batch_sampler(self) -> object:
        """The loaders' batch samplers, in the collection's shape; None where there is none."""
        return map_leaves(lambda loader: getattr(loader, "batch_sampler", None), self._iterables)

    @property
    def limits(self) -> list[float] | None:
        """Most batches to read of each loader per pass; assign one number for all, a list, or None for no limit."""
        return self._limits

    @limits.setter
    def limits(self, limits: float | Sequence[float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._positions)
        if limits is not None and len(limits) != len(self._positions):
            raise MisconfigurationException(
                f"limits={limits!r} has {len(limits)} entries; this CombinedLoader holds {len(self._positions)} "
                "loaders. Give one number for all, or one for each."
            )
        self._limits = None if limits is None else list(limits)

    def __len__(self) -> int:
        """Number of items of one pass.

        Raises:
            TypeError: it depends on a loader that has neither length nor limit.
        """
        limits = self._limits or [math.inf] * len(self._positions)
        sizes: list[float] = []
        for position, limit in zip(self._positions, limits, strict=True):
            length = sized_len(position.loader)
            sizes.append(limit if length is None else min(length, limit))
        if not sizes:
            return 0
        total = sum(sizes) if self._mode == "sequential" else min(sizes) if self._mode == "min_size" else max(sizes)
        if math.isinf(total):
            raise TypeError(f"CombinedLoader(mode={self._mode!r}) has no length: one of its loaders has none.")
        return int(total)

    def __iter__(self) -> CombinedLoader:
        """Begin a pass, or go on with the one that ``load_state_dict`` named."""
        resume, self._resume = self._resume, None
        kind = _Sequential if self._mode == "sequential" else _Parallel
        limits = self._limits or [math.inf] * len(self._positions)
        self._iterator = kind(self._iterables, self._positions, limits, self._mode, resume)
        return self

    def __next__(self) -> Item:
        if self._iterator is None:
            raise RuntimeError("CombinedLoader was asked for a batch before iter(combined_loader) was called.")
        return next(self._iterator)

    def reset(self) -> None:
        """Drop the iterators, and with them their worker processes."""
        self._iterator = self._resume = None
        for position in self._positions:
            position.restart()

    def close(self) -> None:
        """Drop the iterators and end all worker processes, also those that loaders keep between epochs."""
        self._iterator = self._resume = None
        for position in self._positions:
            position.close()

    def set_epoch(self, epoch: int) -> None:
        """Tell the samplers of every loader which epoch begins; another one than now drops a position to resume."""
        for position in self._positions:
            if position.epoch != epoch:
                self._resume = None
            position.set_epoch(epoch)

    def state_dict(self) -> dict[str, object]:
        """The position in every loader and in the pass."""
        if self._resume is not None:
            return dict(self._resume)
        state: dict[str, object] = {
            "mode": self._mode,
            "positions": [position.state_dict() for position in self._positions],
        }
        return state | ({} if self._iterator is None else {"pass": self._iterator.state()})

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Let the next ``iter`` go on where ``state_dict`` was taken.

        Raises:
            ValueError: it was taken with another mode or number of loaders.
        """
        positions = cast("list[dict[str, object]]", state_dict["positions"])
        if state_dict["mode"] != self._mode or len(positions) != len(self._positions):
            raise MisconfigurationRuntimeError(
                f"the saved position is of a CombinedLoader of {len(positions)} loaders with mode="
                f"{state_dict['mode']!r}; this one has {len(self._positions)} and mode={self._mode!r}. "
                "Combine the same loaders, or start the epoch anew."
            )
        for position, state in zip(self._positions, positions, strict=True):
            position.load_state_dict(state)
        self._iterator = None
        self._resume = dict(state_dict) if "pass" in state_dict else None


def _positions(loaders: Iterable[object]) -> list[LoaderPosition[object]]:
    positions = [LoaderPosition(cast("Iterable[object]", loader)) for loader in loaders]
    for position in positions:
        position.is_one_of_several = True
    return positions


class _Parallel(Iterator[Item]):
    """One batch of each loader at a time."""

    def __init__(
        self,
        tree: object,
        positions: list[LoaderPosition[object]],
        limits: list[float],
        mode: CombinationMode,
        resume: Mapping[str, object] | None,
    ) -> None:
        state = {} if resume is None else cast("dict[str, object]", resume["pass"])
        self._tree = tree
        self._positions = positions
        self._limits = limits
        self._mode = mode
        self._index = cast("int", state.get("index", 0))
        self._ended = list(cast("list[bool]", state.get("ended", [False] * len(positions))))
        self._iterators = [self._begin(i, resumed=resume is not None) for i in range(len(positions))]

    def _begin(self, which: int, *, resumed: bool = False) -> Iterator[object]:
        position, limit = self._positions[which], self._limits[which]
        done = position.batches if resumed else 0
        iterator = iter(position)
        return iterator if math.isinf(limit) else islice(iterator, max(int(limit) - done, 0))

    def __next__(self) -> Item:
        batches = self._next_batches()
        remaining = iter(batches)
        batch = map_leaves(lambda _: next(remaining), self._tree)
        item = (batch, self._index, 0)
        self._index += 1
        return item

    def _next_batches(self) -> list[object]:
        if not self._iterators:
            raise StopIteration
        if self._mode == "min_size":
            return [next(iterator) for iterator in self._iterators]
        batches: list[object] = []
        for which in range(len(self._iterators)):
            if self._ended[which] and self._mode == "max_size":
                batches.append(None)
                continue
            try:
                batches.append(next(self._iterators[which]))
            except StopIteration:
                self._ended[which] = True
                if all(self._ended):
                    raise
                batches.append(self._again(which) if self._mode == "max_size_cycle" else None)
        return batches

    def _again(self, which: int) -> object:
        self._iterators[which] = self._begin(which)
        return next(self._iterators[which])

    def state(self) -> dict[str, object]:
        return {"index": self._index, "ended": list(self._ended)}


class _Sequential(Iterator[Item]):
    """One loader after the other; a loader is not begun before its turn."""

    def __init__(
        self,
        tree: object,
        positions: list[LoaderPosition[object]],
        limits: list[float],
        mode: CombinationMode,
        resume: Mapping[str, object] | None,
    ) -> None:
        state = {} if resume is None else cast("dict[str, object]", resume["pass"])
        self._positions = positions
        self._limits = limits
        self._which = cast("int", state.get("which", 0))
        self._index = cast("int", state.get("index", 0))
        self._iterator: Iterator[object] | None = None
        for position in positions[: self._which]:
            position.restart()  # read to its end before the resume: the next pass begins it again

    def __next__(self) -> Item:
        while self._which < len(self._positions):
            if self._index < self._limits[self._which]:
                if self._iterator is None:
                    self._iterator = iter(self._positions[self._which])
                for batch in self._iterator:
                    item = (batch, self._index, self._which)
                    self._index += 1
                    return item
            self._which, self._index, self._iterator = self._which + 1, 0, None
        raise StopIteration

    def state(self) -> dict[str, object]:
        return {"which": self._which, "index": self._index}
