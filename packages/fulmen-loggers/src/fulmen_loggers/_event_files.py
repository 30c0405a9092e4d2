"""tensorboardX's writer with its queue and thread taken out of the caller's way.

tensorboardX pickles every event through a queue to a thread of its own: some 65 µs of this process's time for one
scalar, ``flush`` does not wait for the queue, and a writer opened again within the same second overwrites the file of
the first. Encoding an event takes less, so it is done at once, into a buffered file.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol, cast

from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
from tensorboardX import summary as summaries
from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboardX.record_writer import directory_check  # type: ignore[import-untyped]
from tensorboardX.writer import FileWriter  # type: ignore[import-untyped]

from fulmen_loggers._event_records import EventRecords, encode_scalars

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["EventFiles"]

_count = itertools.count()
# The library ships no types.
_event = cast("Callable[..., _Event]", Event)
_scalar = cast("Callable[[str, float], object]", summaries.scalar)
_settings = cast("Callable[[dict[str, object], dict[str, float]], tuple[object, ...]]", summaries.hparams)


class _Event(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802  protobuf's name


class _EventFile:
    """One event file; what tensorboardX calls an event file writer."""

    def __init__(self, logdir: str, flush_secs: float, suffix: str) -> None:
        cast("Callable[[str], None]", directory_check)(logdir)
        self._logdir = logdir
        self._flush_secs = flush_secs
        self._flushed_at = 0.0  # the first event is flushed at once, so that TensorBoard sees the run
        # Names sort by time within a process, and no two writers ever share one.
        unique = f".{os.getpid()}.{next(_count):06d}{suffix}"
        # A user's hook and the thread that a run feeds the logger from may write at once.
        self._lock = threading.Lock()
        self._records = EventRecords(logdir, unique)
        self._close = weakref.finalize(self, self._records.close)  # at exit, if nobody closed it

    def get_logdir(self) -> str:
        return self._logdir

    def add_event(self, event: _Event) -> None:
        self.add(event.SerializeToString())

    def add(self, event: bytes) -> None:
        with self._lock:
            self._records.write(event)
            now = time.monotonic()
            if now - self._flushed_at > self._flush_secs:
                self._flushed_at = now
                if self._close.alive:
                    self._records.flush()

    def flush(self) -> None:
        with self._lock:
            if self._close.alive:
                self._records.flush()

    def close(self) -> None:
        with self._lock:
            self._close()

    def reopen(self) -> None:
        """Never needed: a closed writer is replaced."""


class _FileWriter(FileWriter):  # type: ignore[misc]
    """tensorboardX's file writer on ``_EventFile``."""

    def __init__(self, logdir: str, flush_secs: float, suffix: str) -> None:
        # Not super().__init__: it would open a file and start the thread.
        self.event_writer = _EventFile(logdir, flush_secs, suffix)
        self._default_metadata: dict[str, object] = {}


class EventFiles(SummaryWriter):  # type: ignore[misc]
    """A ``tensorboardX.SummaryWriter`` whose files are written directly."""

    file_writer: _FileWriter | None
    all_writers: dict[str, _FileWriter] | None

    def _get_file_writer(self) -> _FileWriter:
        if self.file_writer is None or self.all_writers is None:
            self.file_writer = self._new_file(str(self.logdir))
            self.all_writers = {self.file_writer.get_logdir(): self.file_writer}
            if self.purge_step is not None:
                self.file_writer.add_event(_event(file_version="brain.Event:2"), step=self.purge_step)
        return self.file_writer

    def _new_file(self, folder: str) -> _FileWriter:
        flush_secs = cast("float | None", self._flush_secs)
        return _FileWriter(folder, 120.0 if flush_secs is None else flush_secs, self._filename_suffix or "")

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: Mapping[str, float],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Several curves in one chart: each in a folder of its own, as TensorBoard wants it."""
        self._get_file_writer()
        writers = self.all_writers
        assert writers is not None
        for tag, value in tag_scalar_dict.items():
            folder = os.path.join(str(self.logdir), main_tag, tag)
            if folder not in writers:
                writers[folder] = self._new_file(folder)
            writers[folder].add_summary(_scalar(main_tag, value), global_step, walltime)

    def add_row(self, values: Iterable[tuple[str, float]], step: int, time_s: float) -> None:
        """Write scalars of one step as one event, which happened ``time_s`` seconds after the epoch."""
        self._get_file_writer().event_writer.add(encode_scalars(values, step, time_s))

    def add_settings(self, params: dict[str, object], metrics: dict[str, float]) -> None:
        """Write what TensorBoard's HPARAMS page shows: settings, and the names of the metrics to compare."""
        file_writer = self._get_file_writer()
        for summary in _settings(params, metrics):
            file_writer.add_summary(summary)
