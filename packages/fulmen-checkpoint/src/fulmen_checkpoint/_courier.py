"""A thread that carries snapshots to where they are written, one after the other, and does what waits for them."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulmen_checkpoint._buffer import Buffer
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Courier", "Save"]

_END_S = 5.0
"""A thread that has nothing to do ends at once; one that hangs in a storage does not."""


@dataclass(slots=True, eq=False)
class Save:
    """One checkpoint on its way."""

    target: str
    run: Callable[[], None]
    """Waits for the snapshot's copies and writes it; returns when the checkpoint is visible."""
    buffer: Buffer
    error: Exception | None = None
    done: bool = False


@dataclass(slots=True, eq=False)
class _Action:
    """Something that must not happen before the saves ahead of it are visible."""

    run: Callable[[], None]
    after: tuple[Save, ...]
    removes: str | None


class Courier:
    """Saves and actions in the order in which they came, in a thread that lives from the first to ``stop``.

    Args:
        limit: how many snapshots there may be at a time.
        timeout_s: how long to wait for anything.
        stop_writing: makes the save that is being written fail; called after ``timeout_s``.
    """

    def __init__(self, limit: int, timeout_s: float, stop_writing: Callable[[], None]) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._stop_writing = stop_writing
        self._changed = threading.Condition()
        self._queue: deque[Save | _Action] = deque()
        self._running: Save | _Action | None = None
        self._saves: list[Save] = []
        """Not written yet, or failed and not told yet."""
        self._errors: list[Exception] = []
        self._free: list[Buffer] = []
        self._held = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        """Tells this thread, and no later one, to end."""
        self._pid = os.getpid()

    # -- what the training thread calls -------------------------------------------------------------------------------

    def take_buffer(self, size: int, target: str) -> Buffer:
        """A buffer of at least ``size`` bytes, when fewer than ``limit`` snapshots exist.

        Raises:
            CheckpointError: there is no memory for it, or the saves before it do not get done.
        """
        with self._changed:
            self._wait_until(lambda: self._held < self._limit, target)
            self._held += 1
            fitting = [buffer for buffer in self._free if buffer.size >= size]
            if fitting:
                buffer = min(fitting, key=lambda found: found.size)
                self._free.remove(buffer)
                return buffer
            while self._free:  # too small for this checkpoint, and probably for the next ones
                self._free.pop().close()
        try:
            return Buffer(size)
        except (OSError, RuntimeError, MemoryError) as error:
            with self._changed:
                self._held -= 1
            raise CheckpointError(
                f"the checkpoint {target!r} was not written: there is no memory for a snapshot of {size:,} bytes "
                f"({error}). Give AsyncCheckpointIO(max_pending=0), or save without it."
            ) from error

    def give_back(self, buffer: Buffer) -> None:
        """Return a buffer that no save needs."""
        with self._changed:
            self._held -= 1
            self._free.append(buffer)
            self._changed.notify_all()

    def submit(self, save: Save) -> None:
        """Queue a save; its buffer comes back by itself."""
        with self._changed:
            self._saves.append(save)
            self._enqueue(save)

    def after_saves(self, action: Callable[[], None], removes: str | None = None) -> None:
        """Run ``action`` when every save so far is visible: here and now if all are; never if one of them failed.

        ``removes`` is the path that will be gone then.
        """
        with self._changed:
            after = tuple(self._saves)
            if after or self._queue or self._running is not None:
                self._enqueue(_Action(action, after, removes))
                return
        action()

    def will_exist(self, target: str) -> bool | None:
        """What is on its way: True if a file will be at ``target``, False if it will be removed, None if neither."""
        with self._changed:
            for item in (*reversed(self._queue), *([] if self._running is None else [self._running])):
                if isinstance(item, Save) and item.target == target:
                    return True
                if isinstance(item, _Action) and item.removes == target and not any(s.error for s in item.after):
                    return False
        return None

    @property
    def has_failed(self) -> bool:
        """Whether there is an error that has not been raised."""
        return bool(self._errors)

    def poll(self) -> None:
        """Raise the first error that has not been raised, with the others as its notes."""
        if not self._errors:
            return
        with self._changed:
            errors, self._errors = self._errors, []
            self._saves = [save for save in self._saves if save.error is None]
        if not errors:
            return
        first, *others = errors
        for other in others:
            first.add_note(f"fulmen: another save failed as well: {other}")
        raise first

    def drain(self) -> None:
        """Return when nothing is on its way.

        Raises:
            CheckpointError: it takes longer than ``timeout_s``; what is being written is given up.
        """
        with self._changed:
            self._wait_until(lambda: not self._queue and self._running is None, None)

    def stop(self) -> None:
        """Drain, let the thread end and give the memory back. Calling it twice is allowed; so is going on."""
        if os.getpid() != self._pid:  # forked: the thread is the parent's
            return
        if threading.current_thread() is self._thread:  # the garbage collector ran here; what is queued is still done
            self._stop.set()
            return
        try:
            self.drain()
        finally:
            with self._changed:
                thread, self._thread = self._thread, None
                self._stop.set()
                self._changed.notify_all()
            if thread is not None:
                thread.join(_END_S)
            with self._changed:
                while self._free:
                    self._free.pop().close()

    def _wait_until(self, ready: Callable[[], bool], target: str | None) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not ready():
            if not self._changed.wait(deadline - time.monotonic()) and not ready():
                self._give_up(target)

    def _give_up(self, target: str | None) -> None:
        running = self._running
        waiting = [item for item in self._queue if isinstance(item, Save)]
        for save in waiting:
            save.error = CheckpointError(
                f"the checkpoint {save.target!r} was not written: what was saved before it did not get done within "
                f"{self._timeout_s:g} s."
            )
            self._errors.append(save.error)
            self._held -= 1
            self._free.append(save.buffer)
        self._queue.clear()
        self._stop_writing()
        named = running.target if isinstance(running, Save) else "a removal"
        lost = f" {target!r} was not saved." if target is not None else ""
        raise CheckpointError(
            f"writing the checkpoint {named!r} has taken longer than timeout_s={self._timeout_s:g} and is given up."
            f"{lost} Paths keep what they held. Look at the storage, or give AsyncCheckpointIO a longer timeout_s."
        )

    def _enqueue(self, item: Save | _Action) -> None:
        self._queue.append(item)
        self._changed.notify_all()
        if self._thread is None:
            self._stop = threading.Event()
            # A daemon: Python joins other threads before it runs what shall happen at exit, which is to stop this one.
            self._thread = threading.Thread(
                target=self._work, args=(self._stop,), name="fulmen-checkpoints", daemon=True
            )
            self._thread.start()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self, stop: threading.Event) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if stop.is_set():
                        return
                    self._changed.wait()
                item = self._running = self._queue.popleft()
            error: Exception | None = None
            try:
                if isinstance(item, Save) or not any(save.error for save in item.after):
                    item.run()
            except Exception as raised:  # noqa: BLE001 - raised again in the training thread
                error = raised
            with self._changed:
                self._running = None
                if error is not None:
                    self._errors.append(error)
                if isinstance(item, Save):
                    item.error = error
                    if error is None:
                        self._saves.remove(item)
                    self._held -= 1
                    self._free.append(item.buffer)
                self._changed.notify_all()
            del item
