"""One rank's watch over its steps: its own work, and what ranks tell each other of it."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.distributed_c10d import PrefixStore

from fulmen.callbacks._own_work import OwnWork, own_work
from fulmen.callbacks._slow_ranks import RankTimes
from fulmen.callbacks._step_times import (
    BACKWARD,
    FORWARD,
    HOOKS,
    OPTIMIZER,
    OUTSIDE,
    TRANSFER,
    WAITING,
    step_times,
    usual,
)
from fulmen_fabric.voting import group_store, new_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.distributed_c10d import Store

    from fulmen._session import Session
    from fulmen.callbacks._slow_ranks import SlowRanks
    from fulmen.callbacks._step_times import StepTimes
    from fulmen.fit import FitParts

__all__ = ["Watch"]


class Watch:
    """The watch of one fit: a rank's times, and what it exchanges."""

    def __init__(self, session: Session, rank: int, world_size: int, every_n_steps: int, slow: SlowRanks) -> None:
        assert session.data_waits is not None
        self.session = session
        self.times: StepTimes = step_times(session.world.device, session.data_waits)
        self.work = OwnWork()
        self.slow = slow
        self._store = _Windows(rank, world_size)
        self._is_first = rank == 0
        self._every = every_n_steps
        self._host = socket.gethostname()
        self._seen = self._window_from = 0
        self._in_step = self._in_forward = self._accumulates = self._has_stepped = self._borrows = False
        self._wanted: int | None = None
        self._next_look = 0

    def begin(self, step: int) -> None:
        """Training begins: the module is placed."""
        self.work = own_work(self.session)
        self._window_from = step
        self.times.turn(OUTSIDE)

    def around(self, parts: FitParts, look: Callable[[], None]) -> FitParts:
        """``parts``, measured; ``look`` is called after each optimizer step."""
        turn = self.times.turn
        transfer, end_batch = parts.transfer, parts.end_batch
        loader = self.session.train_loader
        rounds = None if loader is None else loader.rounds

        def timed_transfer(batch: object) -> object:
            turn(OUTSIDE)  # but for the loader's part: ranks with unequal data wait for each other here
            batch = transfer(batch)
            turn(TRANSFER)
            if rounds is not None and rounds.is_borrowed:
                self._borrows = True
            return batch

        def timed_end_batch() -> None:
            turn(HOOKS)
            if end_batch is not None:
                end_batch()
            if self._has_stepped:
                self._has_stepped = False
                look()
            turn(OUTSIDE)

        return replace(
            parts,
            transfer=timed_transfer,
            step=self._timed(parts.step, accumulates=False),
            accumulate=self._timed(parts.accumulate, accumulates=True),
            end_batch=timed_end_batch,
        )

    def _timed(self, step: Callable[[object, int], object], *, accumulates: bool) -> Callable[[object, int], object]:
        turn, end_step = self.times.turn, self.times.end_step

        def timed(batch: object, batch_idx: int) -> object:
            turn(HOOKS)
            self._in_step = self._in_forward = True
            self._accumulates = accumulates
            outputs = step(batch, batch_idx)
            self._in_step = self._in_forward = False
            turn(OPTIMIZER if self.work.optimizer else WAITING)
            if not accumulates:
                end_step()
                self._has_stepped = True
            return outputs

        return timed

    def turn_inside(self, part: int, is_forward: bool) -> None:
        """``part`` ends, if a step is running, and its forward pass if only that counts."""
        if self._in_forward if is_forward else self._in_step:
            self.times.turn(part)

    def end_forward(self) -> None:
        """A backward pass begins."""
        self._in_forward = False
        self.times.turn(FORWARD if self.work.forward else WAITING)

    def end_backward(self) -> None:
        """It ends. Without a reduction of gradients nobody has waited in it."""
        self._in_forward = self._in_step
        self.times.turn(BACKWARD if self.work.backward and self._accumulates else WAITING)

    def note_step(self, step: int) -> None:
        """Count an optimizer step; tell the others of a window that is full."""
        self._seen += 1
        if self._seen % self._every:
            return
        steps = self.times.take()
        parts = None if self._borrows else usual(steps)
        window = self._seen // self._every
        self._store.tell(
            window, None if parts is None else RankTimes(self._host, self._window_from, parts, self.work.backward)
        )
        self._window_from, self._borrows = step, False
        if self._is_first:
            self._wanted, self._next_look = window, self._seen + 1

    def window_of_all(self) -> list[RankTimes] | None:
        """On rank 0, once, the last window of all ranks, as soon as all have told theirs."""
        wanted, seen = self._wanted, self._seen + 1
        if wanted is None or seen < self._next_look:
            return None
        found = self._store.of_all(wanted)
        if found is None:  # some host is behind; ask ever more rarely
            self._next_look = seen + (seen - wanted * self._every)
            return None
        self._wanted = None
        whole = [each for each in found if each is not None]
        return whole if len(whole) == len(found) else None


class _Windows:
    """What ranks tell each other through the store: each has one key, which it writes anew for every window."""

    def __init__(self, rank: int, world_size: int) -> None:
        store = group_store()
        assert store is not None
        self._store: Store = PrefixStore(new_name("straggler"), store)
        self._rank = rank
        self._keys = [str(each) for each in range(world_size)]

    def tell(self, window: int, times: RankTimes | None) -> None:
        self._store.set(self._keys[self._rank], json.dumps([window, times]))

    def of_all(self, window: int) -> list[RankTimes | None] | None:
        """None: somebody has not told it yet. A rank that knows nothing of the window is None in the list."""
        store, keys = self._store, self._keys
        if not store.check(keys):
            return None
        values = store.multi_get(keys) if cast("Any", store).has_extended_api() else [store.get(key) for key in keys]
        told: list[tuple[int, Sequence[Any] | None]] = [json.loads(value) for value in values]
        if any(each != window for each, _ in told):
            return None
        return [None if times is None else RankTimes(*times) for _, times in told]
