"""Ranks with different numbers of batches go through an epoch together, and every sample weighs the same.

In each round every rank takes one batch. A rank that has none left takes part with its last one at zero weight, so
that every collective of the model (a wrapper's reduction, a sharded module's gathering) has all its ranks. Rank r's
loss, the mean over the ``c_r`` samples of its batch, is multiplied by ``W * c_r / sum(c)``; averaging gradients over
the ``W`` ranks then gives ``sum(c_r * g_r) / sum(c)``, the gradient of one process that has all the round's samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fulmen_protocols import Collectives

__all__ = ["UnevenRounds"]

_NONE_LEFT = -1


class UnevenRounds:
    """Gives every rank the same number of batches, however many its loader has.

    In a loop of one's own::

        rounds = UnevenRounds(fabric.strategy.collectives)
        for batch, is_last in rounds.over(loader):
            loss = model(batch).mean()
            fabric.backward(rounds.weigh(loss))

    Costs one collective for every ``window`` rounds (``world_size * (window + 1)`` integers), for which the host waits,
    and reads up to two windows of batches ahead.

    Args:
        collectives: of the ranks; each calls every method, in the same order.
        count: how many samples a batch holds, at least 0. None: the size of the first dimension of its first tensor,
            and 1 where it has no tensor.
        window: number of rounds that are agreed at once, usually the batches of one optimizer step.

    Raises:
        ValueError: ``window`` is not positive.
    """

    def __init__(
        self, collectives: Collectives, *, count: Callable[[object], int] | None = None, window: int = 1
    ) -> None:
        if window < 1:
            raise MisconfigurationException(f"UnevenRounds got window={window!r}: it counts rounds, at least 1.")
        self._collectives = collectives
        self._count = count or _samples
        self.window = window
        """Settable between two epochs."""
        self.weight: float | None = None
        """By what this rank's loss is multiplied in the running round; None outside of one."""
        self.is_borrowed = False
        """Whether the running round's batch is not one of this rank's own; its weight is 0 then."""
        self.taken = 0
        """Own batches that were given out in this epoch."""
        self._last: object = None
        self._has_last = False

    def weigh(self, loss: Tensor) -> Tensor:
        """``loss`` with the weight of this rank's batch in the running round; itself outside of one."""
        weight = self.weight
        return loss if weight is None else loss * weight

    def over(
        self, batches: Iterable[object], *, length: float = math.inf, start: int = 0, taken: int | None = None
    ) -> Iterator[tuple[object, bool]]:
        """The batches of one epoch, each with whether it is the last; equally many on every rank.

        Args:
            batches: this rank's own.
            length: rounds of the epoch, equal on every rank. Infinite: until no rank has a batch, for which one more
                window is read ahead.
            start: index of the first round, where an epoch is continued.
            taken: own batches that were given out before it; None: ``start``.
        """
        self.taken = start if taken is None else taken
        self._last, self._has_last = None, False
        iterator = iter(batches)
        index, ahead = start, math.isinf(length)
        try:
            block = self._agreed(iterator, self.window - start % self.window, length - index)
            while block:
                following = self._agreed(iterator, self.window, length - index - len(block)) if ahead else None
                for place, (batch, weight, is_borrowed) in enumerate(block):
                    index += 1
                    self.weight, self.is_borrowed = weight, is_borrowed
                    self.taken += not is_borrowed
                    ends = place == len(block) - 1
                    yield batch, (ends and not following) if ahead else index >= length
                block = following if following is not None else self._agreed(iterator, self.window, length - index)
        finally:
            self.weight, self.is_borrowed = None, False

    def joining(self, batches: Iterable[object], own: float, join: Callable[[object], object]) -> Iterator[object]:
        """This rank's own batches; then ``join`` runs on a borrowed one for as long as other ranks have batches.

        For evaluation, where nothing but the model's own collectives needs the ranks that are through.

        Args:
            batches: this rank's own.
            own: how many of them there are to be read; infinite: all.
            join: takes part in the collectives of one batch.
        """
        lengths = self._collectives.all_gather_object(own)
        if math.isinf(max(lengths)):
            for batch, _ in self.over(batches if math.isinf(own) else islice(batches, int(own))):
                if self.is_borrowed:
                    join(batch)
                else:
                    yield batch
            return
        iterator = islice(batches, int(own))
        last = next(iterator, None)
        if 0 in lengths and max(lengths) > 0:
            lender = next(rank for rank, length in enumerate(lengths) if length)
            borrowed = self._collectives.broadcast_object(last if self._collectives.rank == lender else None, lender)
            last = borrowed if own == 0 else last
        if own:
            yield last
        for batch in iterator:
            last = batch
            yield batch
        for _ in range(int(max(lengths) - own)):
            join(last)

    def _agreed(self, iterator: Iterator[object], window: int, left: float) -> list[tuple[object, float, bool]]:
        """The next rounds as ``(batch, weight, is borrowed)``; none when no rank has a batch left, or ``left`` is 0."""
        window = int(min(window, left))
        if window <= 0:
            return []
        own = list(islice(iterator, window))
        counts = [self._count(batch) for batch in own] + [_NONE_LEFT] * (window - len(own))
        is_needy = not own and not self._has_last
        mine = torch.tensor([*counts, int(is_needy)], dtype=torch.int64)
        # The only collective of a round; the host waits, because it has to know whether there is another round.
        everyone = cast("list[list[int]]", self._collectives.all_gather(mine).tolist())
        rounds = max(sum(count != _NONE_LEFT for count in row[:-1]) for row in everyone)
        if rounds == 0:
            return []
        if any(row[-1] for row in everyone):
            self._lend(own, next(rank for rank, row in enumerate(everyone) if row[0] != _NONE_LEFT), is_needy=is_needy)
        agreed: list[tuple[object, float, bool]] = []
        for place in range(rounds):
            is_borrowed = place >= len(own)
            if not is_borrowed:
                self._last, self._has_last = own[place], True
            total = sum(max(row[place], 0) for row in everyone)
            weight = 0.0 if is_borrowed else len(everyone) * counts[place] / total if total else 1.0
            agreed.append((self._last, weight, is_borrowed))
        return agreed

    def _lend(self, own: list[object], lender: int, *, is_needy: bool) -> None:
        """A rank that has never had a batch takes part with one of ``lender``."""
        lent = self._collectives.broadcast_object(own[0] if self._collectives.rank == lender else None, lender)
        if is_needy:
            self._last, self._has_last = lent, True


def _samples(batch: object) -> int:
    tensor = _first_tensor(batch)
    return tensor.shape[0] if tensor is not None and tensor.ndim else 1


def _first_tensor(batch: object) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = list(cast("Mapping[object, object]", batch).values())
    if not isinstance(batch, (list, tuple)):
        return None
    return next((found for part in cast("list[object]", batch) if (found := _first_tensor(part)) is not None), None)
