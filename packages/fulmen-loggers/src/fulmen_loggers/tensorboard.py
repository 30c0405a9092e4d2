"""TensorBoardLogger: event files for TensorBoard, through tensorboardX."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from fulmen_loggers._folder_logger import FolderLogger
from fulmen_loggers._values import as_number, flatten
from fulmen_protocols.errors import MissingPackage

if TYPE_CHECKING:
    from torch import nn

    from fulmen_loggers._event_files import EventFiles
    from fulmen_loggers._event_records import Scalar
    from fulmen_protocols.logger import LoggerStatus

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(FolderLogger):
    """Writes event files and ``hparams.yaml`` to ``SAVE_DIR/NAME/version_N``. Satisfies ``fulmen_protocols.Logger``.

    Nothing is touched on disk before the first use. ``experiment`` is a ``tensorboardX.SummaryWriter`` for images,
    histograms and everything else.

    Args:
        save_dir: root folder.
        name: folder of the experiment below it; empty or None for none.
        version: which run: a number, a text used as the folder's name, or None for the next free number.
        log_graph: draw the model when ``log_graph`` is called.
        default_hp_metric: give TensorBoard's HPARAMS page a metric ``hp_metric`` of -1 when none is given with the
            hyperparameters; it shows no run without one.
        prefix: put before the names of metrics, with a dash.
        sub_dir: folder below ``version_N`` for the event files; ``~`` and ``$VARIABLES`` are expanded.
        **kwargs: further arguments of ``tensorboardX.SummaryWriter``: ``flush_secs``, ``filename_suffix``, ...

    Raises:
        MissingPackage: tensorboardX is not installed.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: object,
    ) -> None:
        if find_spec("tensorboardX") is None:
            raise MissingPackage("TensorBoardLogger needs tensorboardX. Run: pip install tensorboardX")
        super().__init__("TensorBoardLogger", save_dir, name, version, prefix)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._sub_dir: str | None = (
            None if sub_dir is None else os.path.expanduser(os.path.expandvars(os.fspath(sub_dir)))
        )
        self._kwargs = kwargs
        self._writer: EventFiles | None = None
        self._next_step = 0
        self._hp_metrics: dict[str, float] = {}
        # The HPARAMS page keeps the first settings it reads of a run: they are written by save, when all are known.
        self._hp_pending = False
        self._earlier: frozenset[Scalar] | None = None

    @property
    def sub_dir(self) -> str | None:
        """The folder below the run's, if any."""
        return self._sub_dir

    @property
    def log_dir(self) -> str:
        """The folder of this run, with ``sub_dir``."""
        return self._folder.path if self._sub_dir is None else self._folder.join(self._folder.path, self._sub_dir)

    @property
    def experiment(self) -> EventFiles:
        """The ``tensorboardX.SummaryWriter`` of this run; opens it, and again after ``finalize``.

        Raises:
            MisconfigurationException: the folder cannot be written.
        """
        writer = self._writer
        if writer is not None:
            return writer
        with self._guard:
            return self._open()

    def _open(self) -> EventFiles:
        if self._writer is None:
            # Here because it imports tensorboardX, which whoever logs to CSV only does not have.
            from fulmen_loggers._event_files import EventFiles

            self._folder.own()
            folder = self.log_dir
            self._folder.make(folder)
            try:
                self._writer = EventFiles(folder, **cast("dict[str, Any]", self._kwargs))
            except OSError as error:
                raise self._folder.unwritable(folder, error) from error
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float | Mapping[str, float]], step: int | None = None) -> None:
        """Write scalars. A mapping as a value draws its curves in one chart. ``step`` None: one more than before.

        Raises:
            MisconfigurationException: a value is not a single number.
        """
        self._write(metrics, self._next_step if step is None else int(step), time.time())

    def log_metrics_at(self, metrics: Mapping[str, float | Mapping[str, float]], step: int, time_s: float) -> None:
        """``log_metrics`` of what was logged ``time_s`` seconds after the epoch: TensorBoard's axis of wall time."""
        self._write(metrics, step, time_s)

    def _write(self, metrics: Mapping[str, float | Mapping[str, float]], at: int, time_s: float) -> None:
        self._next_step = at + 1
        writer, prefix = self.experiment, self._prefix
        row: list[tuple[str, float]] = []
        charts: list[tuple[str, dict[str, float]]] = []
        for name, value in metrics.items():
            tag = prefix + name if prefix else name
            if type(value) is float:
                row.append((tag, value))
            elif isinstance(value, Mapping):
                curves = cast("Mapping[str, object]", value)
                charts.append((tag, {curve: as_number(f"{name}/{curve}", item) for curve, item in curves.items()}))
            else:
                row.append((tag, as_number(name, value)))
        if row:
            writer.add_row(row, at, time_s)
        for tag, chart in charts:
            writer.add_scalars(tag, chart, at, time_s)

    def log_hyperparams(
        self,
        params: object = None,
        metrics: Mapping[str, float] | float | None = None,
        step: int | None = None,
        **more: object,
    ) -> None:
        """Record settings: a dict, a dataclass or a namespace. Later calls add to earlier ones.

        Args:
            params: the settings.
            metrics: what the HPARAMS page compares runs by: values by name, or one value called ``hp_metric``.
            step: x of ``metrics``; None: 0.
            **more: further settings.
        """
        self._hparams.add(params, more)
        if metrics is None:
            compared = {"hp_metric": -1.0} if self._default_hp_metric and not self._hp_metrics else {}
        elif isinstance(metrics, Mapping):
            compared = {name: as_number(name, value) for name, value in metrics.items()}
        else:
            compared = {"hp_metric": as_number("hp_metric", metrics)}
        if compared:
            following = self._next_step
            self.log_metrics(compared, 0 if step is None else step)
            self._next_step = following
        self._hp_metrics.update(compared)
        self._hp_pending = True

    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        """Draw ``model``, if ``log_graph=True`` was given: traced on ``input_array`` or its ``example_input_array``.

        Without an example (a tensor or a tuple of tensors) a warning says so and nothing is drawn.

        Raises:
            MissingPackage: the package tensorboard, which torch's converter of graphs needs, is not installed.
        """
        if not self._log_graph:
            return
        # Here because it imports torch, which logging does not need.
        from fulmen_loggers._graph import add_graph, is_example

        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if not is_example(example):
            found = "none was found" if example is None else f"it is of type {type(example).__name__}"
            warnings.warn(
                f"TensorBoardLogger(log_graph=True) needs an example input (a tensor or a tuple of tensors), but "
                f"{found}. Set {type(model).__name__}.example_input_array; no graph is drawn.",
                stacklevel=2,
            )
            return
        add_graph(self.experiment, model, example)

    def save(self) -> None:
        """Write everything so far to disk."""
        self._take_waiting_rows()
        with self._guard:
            self._flush()

    def has_row(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether the event files that an earlier process wrote hold exactly these values at this step."""
        # Here because it imports tensorboardX, which whoever logs to CSV only does not have.
        from fulmen_loggers._event_records import float32, scalars_in

        if self._earlier is None:
            self._earlier = frozenset() if self._folder.is_remote else scalars_in(self.log_dir)
        return all(
            (int(step), self._prefix + name, float32(as_number(name, value))) in self._earlier
            for name, value in metrics.items()
        )

    def reopen_options(self) -> dict[str, object]:
        """Arguments with which another process goes on with this run."""
        return {**super().reopen_options(), "sub_dir": self._sub_dir}

    def _flush(self) -> None:
        folder = self._folder
        folder.own()
        directory = self.log_dir
        folder.make(directory)
        self._hparams.save(folder, folder.join(directory, self.NAME_HPARAMS_FILE))
        if self._hp_pending:
            self.experiment.add_settings(flatten(self._hparams.simple()), self._hp_metrics)
            self._hp_pending = False
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: LoggerStatus) -> None:
        """Write everything and close the files. Logging afterwards opens a further event file of the same run."""
        self.save()
        with self._guard:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __getstate__(self) -> dict[str, object]:
        """The copy opens an event file of its own, in the same folder."""
        if self._writer is not None:
            self._writer.flush()
        return {**self.__dict__, "_writer": None, "_deliver": None}
