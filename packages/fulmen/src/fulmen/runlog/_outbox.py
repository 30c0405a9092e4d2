"""Handing one logger what a run has logged, in a thread of its own, so that no sink stops or slows the run."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from fulmen.runlog._items import Call, Hyperparameters, Item, Row
from fulmen.runlog._reader import deliverable, records
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsRowTime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fulmen.runlog._settings import LogDelivery
    from fulmen.runlog._writer import EventLog
    from fulmen_protocols import Logger, LoggerStatus

__all__ = ["Outbox"]

_LINGER_S = 0.05
"""A thread that has woken waits this long for more: work done in bunches disturbs the training thread less."""

_TRIES = 5
"""After so many failures with one record the one behind it is tried: the fault may be the record's alone."""

_CLOSING_RETRY_S = 0.25


class Outbox:
    """The queue of one logger, and the thread that empties it.

    Args:
        logger: what is called; only by the thread, unless ``threaded`` is False.
        settings: how long the queue may be, and how failures are retried.
        threaded: False: the training thread calls the logger; failures are kept from it all the same.
    """

    def __init__(
        self,
        logger: Logger,
        settings: LogDelivery,
        *,
        threaded: bool = True,
    ) -> None:
        self.logger = logger
        self.settings = settings
        self.delivered_to = 0
        """Where in the run's log the first record begins that the logger has not got and saved."""
        self.refused: list[tuple[int, str]] = []
        """Positions of records that the logger did not take, with the reason; they are not tried again."""
        self.lost = 0
        """Rows that did not fit into the queue and are in no log either."""
        self.failing: BaseException | None = None
        """Why the record in hand could not be delivered; None while all is well."""
        self._given_to = 0
        self._threaded = threaded
        self._timed: SupportsRowTime | None = logger if supports(logger, SupportsRowTime) else None
        self._items: deque[Item] = deque()
        self.when_finished: Callable[[], None] | None = None
        """Called by the logger's thread when it has finalized the logger after the run had stopped waiting for it."""
        self._log: EventLog | None = None
        self._overflow: int | None = None
        self._read_to = 0
        self._final: LoggerStatus | None = None
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._wake, self._hurry = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._busy_since: float | None = None
        self._pause_s, self._next_try, self._failures = settings.retry_s, 0.0, 0

    # ------------------------------------------------------------------ the training thread

    def read_from(self, log: EventLog) -> None:
        """What does not fit into the queue is read again from ``log``, in which the items' positions are."""
        self._log = log
        if log.size < self._read_to:  # somebody has deleted the file since
            self._read_to = 0

    def start_at(self, log: EventLog) -> None:
        """The same for a logger that is told nothing of what is in ``log`` already."""
        self._log = log
        self.delivered_to = self._given_to = log.size

    def put(self, item: Item) -> None:
        """Queue an item. Takes about a microsecond; never waits for the logger, unless that asked to be called here."""
        if item.start >= 0:
            if self._overflow is not None or len(self._items) >= self.settings.queue_rows:
                self._leave_in_log(item)
            elif item.start >= self._read_to or self._log is None:
                self._items.append(item)
        else:
            self._items.append(item)
        if not self._threaded:
            self.pump()
        elif self._thread is None:
            self._start()
        elif not self._wake.is_set():
            self._wake.set()

    def _leave_in_log(self, item: Item) -> None:
        with self._lock:
            if self._log is None:
                if len(self._items) >= self.settings.queue_rows:
                    self.lost += 1
                else:
                    self._items.append(item)
            elif self._overflow is None:
                if len(self._items) >= self.settings.queue_rows:
                    self._overflow = item.start
                elif item.start >= self._read_to:
                    self._items.append(item)

    def drain(self, timeout_s: float) -> bool:
        """Wait until everything that was put so far is delivered, at most ``timeout_s``; whether it is."""
        if not self._threaded:
            return self.pump()
        if threading.current_thread() is self._thread:
            return True
        deadline = time.monotonic() + timeout_s
        while self._items or self._overflow is not None:
            done = threading.Event()
            self.put(Call(done.set, "drain"))
            self._hurry.set()
            reached = done.wait(max(deadline - time.monotonic(), 0.0))
            self._hurry.clear()
            if not reached:
                return False
        return True

    def begin(self) -> None:
        """A call of the Trainer starts: the thread stays until ``finish``."""
        self.when_finished = None
        self._finished.clear()

    def finish(self, status: LoggerStatus) -> None:
        """Have the logger finalized when all is delivered; ``wait_finished`` waits for it."""
        self._finished.clear()
        self._final = status
        if not self._threaded:
            self.pump()
            return
        if self._thread is None:
            self._start()
        self._hurry.set()
        self._wake.set()

    def wait_finished(self, timeout_s: float) -> bool:
        """Whether the logger was finalized within ``timeout_s``. Otherwise the thread goes on trying."""
        if not self._threaded:
            deadline = time.monotonic() + timeout_s
            while not self.pump() and time.monotonic() < deadline:
                time.sleep(min(_CLOSING_RETRY_S, self.settings.retry_s))
        finished = self._finished.wait(timeout_s if self._threaded else 0.0)
        self._hurry.clear()
        return finished

    @property
    def has_uploads(self) -> bool:
        """Whether files wait to be uploaded."""
        return any(isinstance(item, Call) and item.what == "upload" for item in tuple(self._items))

    @property
    def waiting(self) -> int:
        """Items that are queued; those left in the run's log not counted."""
        return len(self._items)

    @property
    def is_behind(self) -> bool:
        """Whether something logged has not reached the logger."""
        return self._overflow is not None or bool(self._items) or self._final is not None

    @property
    def silent_s(self) -> float:
        """For how long the logger has not returned from the call it is in."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    # ------------------------------------------------------------------ the logger's thread

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                name = f"fulmen-{type(self.logger).__name__}"
                # A daemon, since a sink that never returns must not keep the process alive.
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            if self._items or self._refill():
                if not self._deliver_first():
                    self._wait_to_retry()
                continue
            if self._final is not None:
                if not self._finalize():
                    self._wait_to_retry()
                continue
            if self._finished.is_set():
                # Nothing to do until somebody logs again, who starts a new thread.
                self._thread = None
                if not self.is_behind or not self._come_back():
                    return
                continue
            self._wake.wait()
            self._wake.clear()
            if self._final is None:
                self._hurry.wait(_LINGER_S)

    def _come_back(self) -> bool:
        """Something was put in the moment of leaving: whether this thread goes on with it, or another has begun."""
        with self._lock:
            if self._thread is not None:
                return False
            self._thread = threading.current_thread()
            return True

    def pump(self) -> bool:
        """Deliver as much as can be delivered now; whether nothing is left."""
        if time.monotonic() < self._next_try and self._final is None:
            return not self.is_behind
        while self._items or self._refill():
            if not self._deliver_first():
                return False
        return self._final is None or self._finalize()

    def _refill(self) -> bool:
        """Take what was left in the run's log; whether there is anything to deliver now."""
        while self._overflow is not None and (log := self._log) is not None:
            with self._lock:
                start, end = self._overflow, log.size
            found, last = 0, start
            for item in _items(log.path, start, end):
                self._items.append(item)
                found, last = found + 1, item.end
                if found >= self.settings.queue_rows:
                    break
            with self._lock:
                if found >= self.settings.queue_rows:
                    self._overflow = last
                elif log.size == end:
                    self._read_to, self._overflow = end, None
                else:
                    self._overflow = end
            if found:
                return True
        return bool(self._items)

    def _deliver_first(self) -> bool:
        item = self._items[0]
        error = self._try(item)
        if error is None:
            self._succeeded(item)
            return True
        if _is_refusal(error):
            self._refuse(item, error)
            return True
        self._failures += 1
        if self._failures >= _TRIES and not _is_outage(item, error) and self._takes_others(item):
            return True
        self._failed(error)
        return False

    def _takes_others(self, item: Item) -> bool:
        """Try the next row instead; when the sink takes that, it is ``item`` that it does not take, and it goes."""
        items = tuple(self._items)  # the training thread may append meanwhile
        index = next((i for i, other in enumerate(items) if i and isinstance(other, Row)), 0)
        if not index or self._try(self._items[index]) is not None:
            return False
        end = self._items[index].end
        del self._items[index]
        last = self._try(item)  # the sink may have come back this moment
        if last is None:
            self._succeeded(item)
        else:
            self._refuse(item, last)
        self._given_to = max(self._given_to, end)
        return True

    def _try(self, item: Item) -> Exception | None:
        self._busy_since = time.monotonic()
        try:
            match item:
                case Row():
                    if self._timed is not None:
                        self._timed.log_metrics_at(dict(item.metrics), item.x, item.time_s)
                    else:
                        self.logger.log_metrics(dict(item.metrics), step=item.x)
                case Hyperparameters():
                    self.logger.log_hyperparams(item.values)
                case Call():
                    item.do()
        except Exception as error:  # noqa: BLE001 - whatever a sink raises, the run goes on
            return error
        finally:
            self._busy_since = None
        return None

    def _succeeded(self, item: Item) -> None:
        self._items.popleft()
        self._given_to = max(self._given_to, item.end)
        if isinstance(item, Call) and item.what == "save":
            self.delivered_to = max(self.delivered_to, self._given_to)
        self.failing, self._failures, self._pause_s = None, 0, self.settings.retry_s

    def _refuse(self, item: Item, error: Exception) -> None:
        what = item.what if isinstance(item, Call) else "record"
        self.refused.append((item.start, f"{what}: {type(error).__name__}: {error}"))
        self._succeeded(Call(_nothing, "nothing", item.start, item.end))

    def _failed(self, error: Exception) -> None:
        self.failing = error
        self._next_try = time.monotonic() + self._pause_s

    def _finalize(self) -> bool:
        status = self._final
        assert status is not None
        error = self._try(Call(lambda: self.logger.finalize(status), "finalize"))
        if error is not None and not _is_refusal(error):
            self._failed(error)
            return False
        if error is not None:
            self.refused.append((-1, f"finalize: {type(error).__name__}: {error}"))
        self.failing, self._pause_s = None, self.settings.retry_s
        self._final = None
        self.delivered_to = max(self.delivered_to, self._given_to)
        if self.when_finished is not None:
            self.when_finished()
        self._finished.set()
        return True

    def _wait_to_retry(self) -> None:
        if self._hurry.is_set():
            time.sleep(min(_CLOSING_RETRY_S, self._pause_s))
        else:
            self._hurry.wait(self._pause_s)
        self._pause_s = min(self._pause_s * 2, self.settings.longest_retry_s)


def _nothing() -> None:
    """What takes the place of an item that the logger refused."""


def _items(path: str, start: int, end: int) -> Iterator[Row | Hyperparameters]:
    for located in records(path, start, end):
        item = deliverable(located)
        if item is not None:
            yield item


def _is_outage(item: Item, error: Exception) -> bool:
    """Whether it says nothing of the sink that the next item is taken: into a buffer, while the disk is gone."""
    is_disk = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
    return is_disk and isinstance(item, Call) and item.what == "save"


def _is_refusal(error: Exception) -> bool:
    """Whether trying again is pointless: the fault is in what was logged, not in the sink."""
    return isinstance(error, (ValueError, TypeError)) and not isinstance(error.__cause__, OSError)
