"""Ranks with unequal data in a run of the Trainer: what a rank does in rounds for which it has no batch of its own.

It takes part with a batch that it has had before, at zero weight (``fulmen_fabric.UnevenRounds``). Of that nothing may
stay: what the step logs, what it adds to metric objects, and what it does to buffers (running statistics) is undone.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader

from fulmen._metric_batch import first_batch_size
from fulmen_data import has_iterable_dataset, sized_len
from fulmen_fabric import UnevenRounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from fulmen._session import Session
    from fulmen_protocols import Collectives

__all__ = ["Borrowing", "joined_loaders", "rounds_for", "samples_of"]


def rounds_for(collectives: Collectives, window: int) -> UnevenRounds | None:
    """What lets the ranks of a run go through uneven epochs together; None for one process."""
    if collectives.world_size == 1:
        return None
    return UnevenRounds(collectives, count=lambda batch: first_batch_size(batch) or 1, window=window)


def samples_of(loader: object, batches: float) -> int | None:
    """How many samples are in the first ``batches`` batches of ``loader``; None if only reading tells."""
    if not isinstance(loader, DataLoader):
        return None
    inner = cast("object", loader.batch_sampler)
    if type(inner) is not BatchSampler:
        return None
    samples = sized_len(inner.sampler)
    return None if samples is None else int(min(samples, batches * inner.batch_size))


class Borrowing:
    """Surrounds the rounds of a borrowed batch.

    Args:
        session: whose module must stay as it was.
        rounds: knows which rounds those are.
    """

    def __init__(self, session: Session, rounds: UnevenRounds) -> None:
        self._session, self._rounds = session, rounds
        self._undo: list[Callable[[], object]] = []

    def begin(self) -> None:
        """A round starts."""
        self.end()
        if self._rounds.is_borrowed:
            self._undo = [*_silenced(self._session), *_kept(self._session.module)]

    def end(self) -> None:
        """The round, or the epoch, is over. May be called twice."""
        undo, self._undo = self._undo, []
        for each in undo:
            each()

    def run(self, step: Callable[[object], object]) -> Callable[[object], None]:
        """``step`` on a borrowed batch, from which nothing stays."""

        def join(batch: object) -> None:
            self._undo = [*_silenced(self._session), *_kept(self._session.module)]
            try:
                step(batch)
            finally:
                self.end()

        return join


def joined_loaders(
    session: Session, loaders: Iterable[Iterable[object]], limits: Iterable[float], steps: Iterable[Callable[..., Any]]
) -> list[Iterable[object]]:
    """``loaders`` for an evaluation whose forward pass is a collective: a rank that is through still joins the others.

    Each gives at most so many batches as its limit says. ``steps[i]`` runs a batch of loader ``i``.
    """
    rounds = rounds_for(session.world.collectives, 1)
    assert rounds is not None
    borrowing = Borrowing(session, rounds)
    return [
        _Joined(loader, limit, rounds, borrowing.run(step))
        for loader, limit, step in zip(loaders, limits, steps, strict=True)
    ]


class _Joined:
    def __init__(
        self, loader: Iterable[object], limit: float, rounds: UnevenRounds, join: Callable[[object], None]
    ) -> None:
        self._loader, self._limit, self._rounds, self._join = loader, limit, rounds, join

    def __iter__(self) -> Any:
        if has_iterable_dataset(self._loader) or (length := sized_len(self._loader)) is None:
            limited = self._loader if math.isinf(self._limit) else islice(self._loader, int(self._limit))
            return self._rounds.joining(limited, math.inf, self._join)
        return self._rounds.joining(self._loader, min(self._limit, length), self._join)


class _Unheard:
    """Stands in for the metric store of a module whose ``self.log`` must not be heard."""

    def log(self, *_: object, **__: object) -> None:
        """Forget it."""


def _silenced(session: Session) -> list[Callable[[], object]]:
    """Let ``self.log`` do nothing; returns what takes that back."""
    undo: list[Callable[[], object]] = []
    for module in session.logging_modules():
        store = module.__dict__.get("_metric_store")
        if store is not None:
            unheard = module.__dict__["_metric_store"] = _Unheard()
            undo.append(partial(_give_back, module, store, unheard))
    return undo


def _give_back(module: nn.Module, store: object, unheard: object) -> None:
    if module.__dict__.get("_metric_store") is unheard:  # else a validation has set another one meanwhile
        module.__dict__["_metric_store"] = store


def _kept(module: nn.Module) -> list[Callable[[], object]]:
    """Remember buffers and the states of metric objects; returns what puts them back."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]

    def restore_buffers() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

    return [restore_buffers, *(_metric_kept(each) for each in module.modules() if _is_metric(each))]


def _is_metric(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_defaults", None), dict) and hasattr(module, "_update_count")


def _metric_kept(metric: Any) -> Callable[[], object]:
    """Keep the states of a torchmetrics object: attributes whose names are those of their defaults."""
    names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    kept = {name: _copied(getattr(metric, name, None)) for name in names}

    def restore() -> None:
        for name, value in kept.items():
            setattr(metric, name, value)

    return restore


def _copied(value: Tensor | list[object] | object) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return list(cast("list[object]", value)) if isinstance(value, list) else value
