"""Reading on from the middle of data that has no position: by reading and dropping what came before."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from fulmen_data._random_state import RandomState
from fulmen_data._start import EpochStart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["FastForward"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_REPORT_EVERY_S = 10.0


class FastForward(Generic[T]):
    """A loader that resumes within an epoch by reading the epoch's first batches again and dropping them.

    For iterables without a ``state_dict``: it takes as long as reading did, so it happens only where you ask for it by
    this class. What comes out is what the uninterrupted run would have read if the iterable gives the same batches
    again when the random generators are as they were at the epoch's start.

    Args:
        loader: any iterable of batches.
    """

    def __init__(self, loader: Iterable[T]) -> None:
        self.loader = loader
        self._batches = 0
        self._start: EpochStart | None = None
        self._resume: Mapping[str, object] | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[T]:
        """Begin an epoch, or go on with the one that ``load_state_dict`` named."""
        resume, self._resume = self._resume, None
        if resume is None:
            self._batches, self._start = 0, EpochStart.take(self.loader)
            return self._counted(iter(self.loader))
        self._batches = cast("int", resume["batches"])
        self._start = EpochStart.from_plain(cast("dict[str, object]", resume["start"]))
        now = RandomState.take()
        try:
            if self._start is not None:
                self._start.restore(self.loader)
            iterator = iter(self.loader)
            self._drop(iterator, self._batches)
        finally:
            now.restore()
        return self._counted(iterator)

    def _counted(self, iterator: Iterator[T]) -> Iterator[T]:
        for batch in iterator:
            self._batches += 1
            yield batch

    def _drop(self, iterator: Iterator[T], count: int) -> None:
        name = type(self.loader).__name__
        _log.info("%s: reading and dropping %d batches to go on behind them.", name, count)
        began = reported = time.monotonic()
        for done in range(count):
            if next(iterator, self) is self:
                return
            now = time.monotonic()
            if now - reported >= _REPORT_EVERY_S:
                reported = now
                left = (now - began) / (done + 1) * (count - done - 1)
                _log.info("%s: dropped %d of %d batches; about %.0f s are left.", name, done + 1, count, left)

    def state_dict(self) -> dict[str, object]:
        """How many batches of this epoch were read, and the random state in which it began."""
        if self._resume is not None:
            return dict(self._resume)
        return {"batches": self._batches, "start": None if self._start is None else self._start.to_plain()}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Let the next ``iter`` go on where ``state_dict`` was taken."""
        self._resume = dict(state_dict)

    def __getattr__(self, name: str) -> object:
        # batch_size, dataset, ...: as if nothing were around it.
        if name.startswith("_") or name == "loader":  # copying and pickling ask before there is a loader
            raise AttributeError(name)
        return getattr(self.loader, name)
