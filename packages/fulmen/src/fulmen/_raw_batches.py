"""Steps that fetch their batches themselves: ``training_step(self, dataloader_iter)``.

The loop then runs over an iterator that it hands to the step, again and again, until the iterator is used up. The step
calls ``next`` on it for ``(batch, batch_idx, dataloader_idx)`` and puts the batch on the device itself.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["RawBatches", "RawLoader", "fetches_itself", "hook_of_raw", "step_of_raw"]

Item = tuple[Any, int, int]


def fetches_itself(step: object) -> bool:
    """Whether ``step`` takes ``dataloader_iter``."""
    return callable(step) and "dataloader_iter" in inspect.signature(step).parameters


class RawBatches(Iterator[Item]):
    """What a step gets: the batches of one epoch, and what the loop must know of them.

    Args:
        batches: of the epoch, from index ``start`` on.
        length: batches of the whole epoch; ``inf`` if unknown.
        start: index of the first.
        dataloader_idx: of the loader they come from.
        told: called with each batch that is fetched.
        looks_ahead: whether only reading tells that the epoch has ended, ``length`` or not.
    """

    def __init__(
        self,
        batches: Iterable[object],
        *,
        length: float = math.inf,
        start: int = 0,
        dataloader_idx: int = 0,
        told: Callable[[object], object] | None = None,
        looks_ahead: bool = True,
    ) -> None:
        self._iterator = iter(batches)
        self._ahead: deque[object] = deque()
        self._per_step = 1
        self._told = told
        self._looks_ahead = looks_ahead
        self.length = length
        self.fetched = start
        self.dataloader_idx = dataloader_idx
        self.batch: Any = None
        """The last one that was fetched; None before the first. ``batch_idx`` is its index."""
        self.batch_idx = max(0, start - 1)

    def __next__(self) -> Item:
        if not self._has(1):
            raise StopIteration
        self.batch, self.batch_idx = self._ahead.popleft(), self.fetched
        self.fetched += 1
        if self._told is not None:
            self._told(self.batch)
        return self.batch, self.batch_idx, self.dataloader_idx

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return not self._expects(1)

    def rounds(self) -> Iterator[tuple[RawBatches, bool]]:
        """Itself, once for each step, with whether that step will take what is left.

        A step is taken to fetch as many batches as the one before it.
        """
        while self._expects(1):
            before = self.fetched
            yield self, not self._expects(self._per_step + 1)
            if self.fetched == before:
                return  # a step that takes nothing would run for ever
            self._per_step = self.fetched - before

    def _expects(self, count: int) -> bool:
        return self._has(count) if self._looks_ahead else self.fetched + count <= self.length

    def _has(self, count: int) -> bool:
        """Whether ``count`` more batches are there; reads ahead for them."""
        if self.fetched + count > self.length:
            return False
        while len(self._ahead) < count:
            try:
                self._ahead.append(next(self._iterator))
            except StopIteration:
                return False
        return True


class RawLoader:
    """A loader of an evaluation as its step wants it: the iterator itself, once for each step."""

    def __init__(
        self, loader: Iterable[object], limit: float, dataloader_idx: int, told: Callable[[object], object]
    ) -> None:
        self._loader, self._limit, self._dataloader_idx, self._told = loader, limit, dataloader_idx, told

    def __iter__(self) -> Iterator[RawBatches]:
        raw = RawBatches(self._loader, length=self._limit, dataloader_idx=self._dataloader_idx, told=self._told)
        for each, _ in raw.rounds():
            yield each


def step_of_raw(step: Callable[..., object]) -> Callable[..., object]:
    """``step`` for the loop, which passes more than the iterator. One that finds it empty leaves it at that."""

    def run(raw: RawBatches, *_: object) -> object:
        try:
            return step(raw)
        except StopIteration:
            if not raw.done:
                raise
            return None

    return run


def hook_of_raw(hook: Callable[..., Any], *, outputs_first: bool) -> Callable[..., Any]:
    """A batch hook that is told of the last batch fetched, where the loop has only the iterator."""

    def after(outputs: object, raw: RawBatches, _: int, *rest: object) -> Any:
        return hook(outputs, raw.batch, raw.batch_idx, *rest)

    def before(raw: RawBatches, _: int, *rest: object) -> Any:
        return hook(raw.batch, raw.batch_idx, *rest)

    return after if outputs_first else before
