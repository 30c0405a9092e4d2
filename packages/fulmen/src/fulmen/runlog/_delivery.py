"""A run's log, and the loggers that are told what is in it: the log first, each logger when it can take it."""

from __future__ import annotations

import os
import shlex
import time
import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from fulmen.runlog import _cursors as cursors
from fulmen.runlog._items import Call, Hyperparameters, Row
from fulmen.runlog._outbox import Outbox
from fulmen.runlog._record import FORMAT, encode_row, plain
from fulmen.runlog._writer import EventLog
from fulmen_fabric import rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    SupportsCallingThread,
    SupportsCheckpointUpload,
    SupportsDeferredUpload,
    SupportsGraph,
    SupportsWaitingRows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from torch import nn

    from fulmen.runlog._settings import LogDelivery
    from fulmen_protocols import Logger, LoggerStatus

__all__ = ["Delivery"]

_ANSWER_S = 2.0
"""How long the training thread waits for a logger where order demands it: a graph, a checkpoint it must see at once."""

_SILENT_S = 10.0
"""After so long in one call a logger is said not to answer."""

_SYNC_S = 10.0
_STATE_S = 0.25
_DENSE_STATES = 200


class Delivery:
    """What a Trainer's reporter writes to, on rank 0.

    Lives as long as the Trainer: a logger that is behind when one call ends catches up during the next.

    Args:
        settings: of the queues.
        silent: whether a logger takes nothing anyway, so that the run needs no log for its sake.

    Attributes:
        mentioned: the reports that the user has been told of.
    """

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a Trainer begins with empty queues."""
        return Delivery, (self.settings, self._silent)

    def __init__(self, settings: LogDelivery, silent: Callable[[object], bool]) -> None:
        self.settings = settings
        self.log: EventLog | None = None
        self.mentioned: set[str] = set()
        self._silent = silent
        self._boxes: dict[int, tuple[Logger, Outbox]] = {}
        self._last = (-1, -1)
        self._cursors: dict[str, cursors.Cursor] = {}
        self._keys: dict[int, str] = {}
        self._warned: set[int] = set()
        self._began = 0.0
        self._stack: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = {}
        self._sample: Callable[[], Mapping[str, object]] = dict
        self._position: Callable[[], int] = int
        self._waited: Callable[[], float] = float
        self._states, self._state_at = 0, 0.0

    # ------------------------------------------------------------------ a call of the Trainer

    def use(self, settings: LogDelivery) -> None:
        """Take over settings that the user has changed between two calls."""
        self.settings = settings
        for _, box in self._boxes.values():
            box.settings = settings

    def begin(
        self,
        path: str,
        loggers: Sequence[Logger],
        about: Mapping[str, object],
        position: Callable[[], int],
        sample: Callable[[], Mapping[str, object]],
        waited: Callable[[], float] = float,
    ) -> None:
        """Open the log at ``path``.

        Args:
            path: of the log.
            loggers: of the run.
            about: the ``begin`` record: what runs, where, with which settings.
            position: batches that have stepped an optimizer so far.
            sample: what is worth knowing of the run at a row: learning rates, memory.
            waited: seconds of training that were spent on waiting for data.

        Raises:
            MisconfigurationException: the log cannot be written.
        """
        if self.log is None or self.log.path != path:
            self._cursors = cursors.load(path)
            self._boxes = {}  # one that is behind goes on with the log that it knows
            self._keys = {}
        is_known = self.log is not None and self.log.path == path
        self.log = EventLog(path)
        if not is_known:
            for cursor in self._cursors.values():
                if cursor.is_due and cursor.delivered_to < self.log.size:
                    cursor.gaps.append([cursor.delivered_to, self.log.size])
        for _, known in self._boxes.values():
            known.read_from(self.log)
        self._position, self._sample, self._waited = position, sample, waited
        self._states, self._state_at = 0, 0.0
        self._began = self._since = time.monotonic()
        self._stack, self._seconds = [], {}
        for logger in loggers:
            box = self._box(logger)
            if box is not None:
                box.begin()
        self._append({"kind": "begin", "format": FORMAT, **about})

    def goes_on(self) -> None:
        """Training begins here: what was logged beyond this step before will come again."""
        self._append({"kind": "position", "at": self._position()})
        self.enter("training")
        self._save_cursors()  # a process that is killed has noted whom it feeds

    @property
    def at(self) -> int:
        """Batches that have stepped an optimizer so far: where in the run a row of this moment belongs."""
        return self._position()

    def row(
        self,
        metrics: Mapping[str, float],
        x: int,
        loggers: Sequence[Logger],
        of: str,
        *,
        is_first: bool = True,
        at: int | None = None,
    ) -> None:
        """Log metrics at ``x``; ``of`` tells what they are of: ``step``, ``epoch``, ``eval_step``, ``callback``.

        A row that is given to one logger after the other is in the log once: when it ``is_first``. One that is of an
        earlier moment says ``at`` which.
        """
        now, at = time.time(), self._position() if at is None else at
        if is_first:
            log = self.log
            self._last = (-1, -1)
            if log is not None and log.is_open:
                self._last = log.append_line(encode_row(now, x, at, of, metrics))
        item = Row(metrics, x, now, *self._last)
        for logger in loggers:
            box = self._box(logger)
            if box is not None:
                box.put(item)

    def hyperparameters(self, values: Mapping[str, object], loggers: Sequence[Logger]) -> None:
        """Log settings of the run."""
        start, end = self._append({"kind": "hparams", "values": plain(values)})
        for logger in loggers:
            box = self._box(logger)
            if box is not None:
                box.put(Hyperparameters(values, start, end))

    def graph(self, module: nn.Module, loggers: Sequence[Logger]) -> None:
        """Let loggers draw the module, after what came before; here, since nobody may trace a module that trains."""
        for logger in loggers:
            box = self._box(logger)
            if box is None or not supports(logger, SupportsGraph) or _does_nothing(logger.log_graph):
                continue
            if not self._wait(box):
                self._warn(box, "it has not answered, and no graph is drawn")
                continue
            try:
                logger.log_graph(module)
            except Exception as error:  # noqa: BLE001 - whatever a sink raises, the run goes on
                rank_zero_warn(f"{type(logger).__name__}.log_graph failed, no graph is drawn: {_line(error)}")

    def checkpoint(self, callback: object, loggers: Sequence[Logger], about: Mapping[str, object]) -> None:
        """A checkpoint is there: note it, and tell the loggers that want to know."""
        self._append({"kind": "checkpoint", **about})
        for logger in loggers:
            box = self._box(logger)
            if box is None:
                continue
            if supports(logger, SupportsDeferredUpload):
                self._set_aside(box, logger, callback)
            elif supports(logger, SupportsCheckpointUpload) and not _does_nothing(logger.after_save_checkpoint):
                box.put(Call(partial(logger.after_save_checkpoint, weakref.proxy(callback)), "after_save_checkpoint"))
                self._wait(box)  # the next save may delete the file

    def _set_aside(self, box: Outbox, logger: SupportsDeferredUpload, callback: object) -> None:
        try:
            upload = logger.checkpoint_upload(None if callback is None else weakref.proxy(callback))
        except Exception as error:  # noqa: BLE001 - whatever a sink raises, the run goes on
            rank_zero_warn(f"{type(logger).__name__} cannot upload a checkpoint: {_line(error)}")
            return
        if upload is not None:
            box.put(Call(upload, "upload"))

    def save(self, loggers: Sequence[Logger]) -> None:
        """Have every logger write what it buffers, soon; say what is wrong with those that do not answer."""
        log = self.log
        if log is not None and log.is_open and time.monotonic() - log.synced_at >= _SYNC_S:
            self._note_stages()
            log.sync()
            self._save_cursors()
        for logger in loggers:
            box = self._box(logger)
            if box is not None:
                box.put(Call(logger.save, "save"))
                if box.failing is not None or box.silent_s > _SILENT_S:
                    self._warn_of_delay(box)

    def settle(self, loggers: Sequence[Logger]) -> None:
        """Wait a moment for what came before training, so that it is there if the first step ends the process."""
        until = time.monotonic() + _ANSWER_S
        for logger in loggers:
            box = self._box(logger)
            if box is not None and box.is_behind:
                self._wait(box, until - time.monotonic())

    def _wait(self, box: Outbox, limit_s: float = _ANSWER_S) -> bool:
        """Whether a logger that was well until now has got everything within the time."""
        return box.failing is None and box.silent_s < _ANSWER_S and box.drain(max(limit_s, 0.0))

    def end(self, status: LoggerStatus, loggers: Sequence[Logger], error: BaseException | None = None) -> None:
        """Finish the call: what was logged is delivered, within the settings' limits, and the log is closed."""
        self.enter("loggers")
        own = [(logger, box) for logger in loggers if (box := self._box(logger)) is not None]
        for logger, box in own:
            if status == "success" and supports(logger, SupportsDeferredUpload):
                self._set_aside(box, logger, None)
            box.finish(status)
        started = time.monotonic()
        for _, box in own:
            uploading = box.has_uploads and box.failing is None
            limit = self.settings.upload_timeout_s if uploading else self.settings.finalize_timeout_s
            box.wait_finished(max(started + limit - time.monotonic(), 0.0))
        self._note_stages()
        why = {} if error is None else {"error": _line(error)}
        self._append({"kind": "end", "status": status, "seconds": time.monotonic() - self._began, **why})
        if self.log is not None:
            if self.log.error is not None:
                rank_zero_warn(
                    f"the run's log {self.log.path!r} is not whole: {self.log.lost} records could not be written "
                    f"({self.log.error})."
                )
            self._save_cursors(ended=True)
            self.log.close()
        for _, box in own:
            if box.is_behind:
                box.when_finished = partial(self._save_cursors, ended=True)
            self._report_end(box)

    @property
    def is_open(self) -> bool:
        """Whether a call of the Trainer is being logged."""
        return self.log is not None and self.log.is_open

    # ------------------------------------------------------------------ where the time goes

    def enter(self, stage: str) -> None:
        """From now on time is spent in ``stage``."""
        self._count()
        self._stack = [stage]

    @contextmanager
    def within(self, stage: str) -> Generator[None, None, None]:
        """The block's time belongs to ``stage``, and not to what goes on around it."""
        self._count()
        self._stack.append(stage)
        try:
            yield
        finally:
            self._count()
            if self._stack:
                self._stack.pop()

    def _count(self) -> None:
        now = time.monotonic()
        if self._stack:
            name = self._stack[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def _note_stages(self) -> None:
        self._count()
        seconds = dict(self._seconds)
        if waited := min(self._waited(), seconds.get("training", 0.0)):
            seconds["training"] -= waited
            seconds["waiting for data"] = waited
        self._append({"kind": "stages", "seconds": {name: round(s, 4) for name, s in seconds.items()}})

    def note_state(self) -> None:
        """Log learning rates and memory of this moment, at most every ``_STATE_S`` seconds when there are many."""
        now = time.monotonic()
        if self._states >= _DENSE_STATES and now - self._state_at < _STATE_S:
            return
        self._states, self._state_at = self._states + 1, now
        self._count()
        training = self._seconds.get("training", 0.0)
        place = {"t": time.time(), "at": self._position(), "training_s": training}
        self._append({"kind": "state", **place, **self._sample()})

    # ------------------------------------------------------------------ sinks

    def _append(self, record: Mapping[str, object]) -> tuple[int, int]:
        if self.log is None or not self.log.is_open:
            return -1, -1
        if "t" not in record:
            record = {"kind": record["kind"], "t": time.time(), **record}
        return self.log.append(record)

    def _box(self, logger: Logger) -> Outbox | None:
        known = self._boxes.get(id(logger))
        if known is not None:
            return known[1]
        if self._silent(logger):
            return None
        here = supports(logger, SupportsCallingThread) and logger.needs_calling_thread
        box = Outbox(logger, self.settings, threaded=not here)
        if self.log is not None:
            box.start_at(self.log)
        self._boxes[id(logger)] = (logger, box)
        if supports(logger, SupportsWaitingRows):
            logger.waiting_rows(partial(box.drain, self.settings.finalize_timeout_s))
        return box

    def _save_cursors(self, *, ended: bool = False) -> None:
        log = self.log
        if log is None:
            return
        for logger, box in list(self._boxes.values()):
            name = cursors.registered_name(logger)
            options = cursors.options_of(logger)
            cursor = cursors.Cursor(
                name or type(logger).__name__,
                options or {},
                # The sink has everything: also the records that are none of its business.
                log.size if ended and not box.is_behind else box.delivered_to,
                [why for _, why in box.refused],
                can_reopen=name is not None and options is not None,
            )
            key = cursors.key_of(cursor.logger, cursor.options)
            if (before := self._keys.get(id(logger))) is not None and before != key:
                self._cursors.pop(before, None)  # a service has named its run meanwhile
            self._keys[id(logger)] = key
            if (known := self._cursors.get(key)) is not None:
                cursor.gaps = known.gaps
            cursor.is_due = box.is_behind or not ended or bool(cursor.gaps)
            self._cursors[key] = cursor
        try:
            cursors.save(log.path, self._cursors)
        except OSError as error:
            log.error = error

    # ------------------------------------------------------------------ what people are told

    def _warn_of_delay(self, box: Outbox) -> None:
        why = f"it has not answered for {box.silent_s:.0f} s" if box.failing is None else _line(box.failing)
        self._warn(box, why)

    def _warn(self, box: Outbox, why: str) -> None:
        if id(box) in self._warned:
            return
        self._warned.add(id(box))
        place = "in memory" if self.log is None else f"in {self.log.path!r}"
        rank_zero_warn(
            f"{type(box.logger).__name__} does not take what is logged: {why}. The run goes on; what is logged waits "
            f"{place} and is delivered when the logger answers again."
        )

    def _report_end(self, box: Outbox) -> None:
        name = type(box.logger).__name__
        if box.refused:
            first = box.refused[0][1]
            rank_zero_warn(f"{name} refused {len(box.refused)} of the run's records, the first as {first}")
            box.refused.clear()
        if box.lost:
            rank_zero_warn(f"{name}: {box.lost} rows are lost; they did not fit into its queue, and there is no log.")
        if not box.is_behind:
            self._warned.discard(id(box))
            return
        why = f"it has not answered for {box.silent_s:.0f} s" if box.failing is None else _line(box.failing)
        how = "Nothing can deliver it."
        if self.log is not None:
            folder = os.path.dirname(self.log.path)
            how = f"Deliver it later with: fulmen log replay {shlex.quote(folder)}"
            if cursors.registered_name(box.logger) is None or cursors.options_of(box.logger) is None:
                how = f"Deliver it later with fulmen.runlog.replay({folder!r}, logger)."
        rank_zero_warn(f"{name} did not get everything that was logged: {why}. {how}")


def _does_nothing(method: Callable[..., object]) -> bool:
    """Whether it is there for the name's sake alone, so that there is nothing to wait for."""
    return bool(getattr(method, "does_nothing", False))


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
