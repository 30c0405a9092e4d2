"""CSVLogger: metrics as a table that any tool reads, and hyperparameters as YAML."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from fulmen_loggers._folder_logger import FolderLogger
from fulmen_loggers._table import Table, read_rows
from fulmen_loggers._values import as_number
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen_protocols.logger import LoggerStatus

__all__ = ["CSVLogger"]


class CSVLogger(FolderLogger):
    """Writes ``SAVE_DIR/NAME/version_N/metrics.csv`` and ``hparams.yaml``. Satisfies ``fulmen_protocols.Logger``.

    Nothing is touched on disk before the first use. Given the ``version`` of an earlier run, it continues that run's
    table. Rows are kept in memory and written every ``flush_logs_every_n_steps`` of them, by ``save`` and ``finalize``,
    and when the process ends.

    Args:
        save_dir: root folder, local or an fsspec URL.
        name: folder of the experiment below it; empty or None for none.
        version: which run: a number, a text used as the folder's name, or None for the next free number.
        prefix: put before the names of metrics, with a dash.
        flush_logs_every_n_steps: rows kept in memory at most.

    Raises:
        MisconfigurationException: ``flush_logs_every_n_steps`` is less than 1.
    """

    NAME_METRICS_FILE = "metrics.csv"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise MisconfigurationException(
                f"CSVLogger(flush_logs_every_n_steps={flush_logs_every_n_steps!r}): give 1 or more."
            )
        super().__init__("CSVLogger", save_dir, name, version, prefix)
        self._flush_every = flush_logs_every_n_steps
        self._pending: list[dict[str, float]] = []
        self._flush_at = flush_logs_every_n_steps
        self._next_step = 0
        self._table: Table | None = None
        self._earlier: frozenset[tuple[str, frozenset[tuple[str, str]]]] | None = None

    @property
    def log_dir(self) -> str:
        """The folder of this run."""
        return self._folder.path

    @property
    def experiment(self) -> CSVLogger:
        """What writes: this object."""
        return self

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one row. ``step`` None: one more than in the row before.

        Raises:
            MisconfigurationException: a value is not a single number.
        """
        prefix = self._prefix
        row: dict[str, float] = {"step": self._next_step if step is None else int(step)}
        for name, value in metrics.items():
            key = prefix + name if prefix else name
            if key != "step":
                row[key] = value if type(value) is float else as_number(name, value)
        with self._guard:
            self._pending.append(row)
            if len(self._pending) == 1:
                _write_at_exit(self)
            if len(self._pending) >= self._flush_at:
                try:
                    self._flush()
                except BaseException:
                    self._pending.pop()  # not taken, so that the caller can try again
                    raise
        self._next_step = int(row["step"]) + 1

    def log_hyperparams(self, params: object = None, **more: object) -> None:
        """Record settings: a dict, a dataclass or a namespace. Later calls add to earlier ones."""
        with self._guard:
            self._hparams.add(params, more)

    def save(self) -> None:
        """Write all rows and hyperparameters so far."""
        self._take_waiting_rows()
        self._flush()

    def has_row(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether the table that an earlier process wrote holds exactly this row."""
        if self._earlier is None:
            rows = read_rows(self._folder, self._folder.join(self._folder.path, self.NAME_METRICS_FILE))
            self._earlier = frozenset(
                (row.pop("step", ""), frozenset((name, text) for name, text in row.items() if text)) for row in rows
            )
        row = frozenset((self._prefix + name, repr(as_number(name, value))) for name, value in metrics.items())
        return (repr(int(step)), row) in self._earlier

    def finalize(self, status: LoggerStatus) -> None:
        """Write everything. Logging afterwards goes on in the same table."""
        self._flush()

    def _flush(self) -> None:
        with self._guard:
            self._write()

    def _write(self) -> None:
        folder = self._folder
        folder.own()
        directory = folder.path
        if self._table is None:
            folder.make(directory)
            self._table = Table(folder, folder.join(directory, self.NAME_METRICS_FILE))
        self._hparams.save(folder, folder.join(directory, self.NAME_HPARAMS_FILE))
        if self._pending:
            self._table.append(self._pending)
            self._pending = []
        _unwritten.discard(self)
        # A URL's file is put whole each time: rarer and rarer, so that the time stays linear.
        self._flush_at = max(self._flush_every, self._table.rows // 8) if folder.is_remote else self._flush_every

    def __getstate__(self) -> dict[str, object]:
        """The copy goes on with the file, so what is in memory is written first."""
        if self._pending:
            self._flush()
        return {**self.__dict__, "_table": None, "_deliver": None}


_unwritten: set[CSVLogger] = set()
"""Those with rows in memory. A loop of one's own may end without ``finalize``; its last rows are not lost by that."""


def _write_at_exit(logger: CSVLogger) -> None:
    _unwritten.add(logger)
    atexit.unregister(_write_all)  # it may be known already
    atexit.register(_write_all, os.getpid())


def _write_all(process: int) -> None:
    for logger in tuple(_unwritten) if process == os.getpid() else ():  # a forked one has only copies
        try:
            logger._flush()  # pyright: ignore[reportPrivateUsage] -- a function of this module
        except Exception as error:  # noqa: BLE001 -- any storage's; there is nobody left to hear it
            print(f"the last rows of a CSVLogger could not be written: {error}", file=sys.stderr)
