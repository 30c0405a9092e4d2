"""Ending a run early and together: signals and time limits become a reason, and all ranks stop at the same point."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from fulmen_protocols import RankFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from torch.distributed.distributed_c10d import Store

    Handler = Callable[[int, FrameType | None], object] | int | None

__all__ = ["StopAgreement", "StopSignal"]


class StopSignal:
    """Watches for signals and a time limit; the loop asks ``poll`` when it may stop.

    A handler only notes the reason and then calls the handler it replaced, if that was a Python function: nothing is
    raised in the middle of a step. SIGINT is not among the defaults, so Ctrl+C interrupts as always.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        *,
        bypassed: Sequence[signal.Signals] = (),
        max_time: timedelta | None = None,
        on_stop: Callable[[str], object] | None = None,
    ) -> None:
        """Watch nothing yet.

        Args:
            signals: each is a reason to stop.
            bypassed: these are no reason to stop, and do not end the process either, which their default action would.
            max_time: counts from ``install`` on.
            on_stop: called with the reason from inside the handler, so it may only set flags.
        """
        self._on_stop = on_stop
        self.reason: str | None = None
        """Why to stop; None while nothing asks for it. Settable: the first reason is the one that counts."""
        self._signals = (*signals, *bypassed)
        self._bypassed = frozenset(bypassed)
        self._max_time = max_time
        self._deadline: float | None = None
        self._previous: dict[signal.Signals, Handler] = {}

    def install(self) -> bool:
        """Start the clock and watch the signals. A second call changes nothing.

        Returns:
            Whether signals are watched: Python delivers them to the main thread only.
        """
        if self._max_time is not None and self._deadline is None:
            self._deadline = time.monotonic() + self._max_time.total_seconds()
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in self._signals:
            if number not in self._previous:
                self._previous[number] = signal.signal(number, self._note)
        return True

    def restore(self) -> None:
        """Put back the handlers found by ``install``, unless somebody has replaced ours since."""
        self._deadline = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._note:
                # None: the handler was not set from Python and cannot be set back from here.
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def __enter__(self) -> StopSignal:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def poll(self) -> str | None:
        """The reason to stop, with the clock looked at; None to go on."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"the time limit of {self._max_time} has passed"
        return self.reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None and number not in self._bypassed:
            self.reason = f"received {signal.Signals(number).name}"
            if self._on_stop is not None:
                self._on_stop(self.reason)
        previous = self._previous.get(signal.Signals(number))
        if callable(previous):
            previous(number, frame)


class StopAgreement:
    """Lets one rank's wish to stop take effect on all ranks at the same declared point, without a collective.

    Any other wish that is fulfilled once, by all together, can be agreed on in the same way.

    Every rank calls ``point`` at the same places of the program (say, every 50 updates). Each call costs two requests
    to the store, no more, and waits for nobody while nobody wishes to stop.

    How ranks that are apart agree: on arrival a rank first writes which point it is at, then looks for a wish. Who
    wishes to stop writes the wish, then reads where everyone is, and proposes the point after the furthest. A rank that
    arrived too late to be read must see the wish, since the store serves one request after another: it waits for the
    proposal, which lies at its own point at the earliest. No rank can have passed it.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        *,
        name: str,
        timeout: timedelta = timedelta(seconds=60),
    ) -> None:
        """Keys in ``store`` start with ``name``; it must be new for each run that uses the same store.

        ``timeout`` bounds the wait for a proposal that another rank has begun. ``store`` may be None for one process.
        """
        if world_size > 1 and store is None:
            raise ValueError(f"{world_size} processes cannot agree without a store.")
        self._store = None if store is None or world_size == 1 else PrefixStore(name, store)
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._at = 0
        self._stop_at: int | None = None
        self.reason: str | None = None
        """Why the run stops, with the rank that asked; the same text on every rank. None until agreed."""

    def point(self, wish: str | None) -> bool:
        """Arrive at the next declared point; ``wish`` is this rank's reason to stop, if it has one.

        Returns:
            Whether to stop here. True at the same point on every rank.

        Raises:
            RankFailure: a rank began to propose and then fell silent.
        """
        if self._store is None:
            self.reason = self.reason or wish
            return self.reason is not None
        self._at += 1
        if self._stop_at is None:
            self._look(self._store, wish)
        return self._stop_at is not None and self._at >= self._stop_at

    def _look(self, store: Store, wish: str | None) -> None:
        store.set(f"at/{self._rank}", str(self._at))
        if wish is not None:
            store.set("wish", "1")
            names = [f"at/{rank}" for rank in range(self._world_size)]
            # A rank that has not come to its first point is at point 0.
            furthest = max(int(store.get(name)) if store.check([name]) else 0 for name in names)
            # The first proposal stands: compare_set writes only where nothing is.
            store.compare_set("proposal", "", f"{furthest + 1} rank {self._rank}: {wish}")
        elif not store.check(["wish"]):
            return
        try:
            store.wait(["proposal"], self._timeout)
        except dist.DistError as error:
            raise RankFailure(
                f"another rank wanted all to stop, or to look, at one point, but proposed no point within "
                f"{self._timeout}. It has probably died."
            ) from error
        point, _, self.reason = store.get("proposal").decode().partition(" ")
        self._stop_at = int(point)
