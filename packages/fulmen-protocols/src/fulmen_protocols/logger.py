"""Logger: where metrics and hyperparameters of a run go. Member names are Lightning's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

__all__ = [
    "Logger",
    "LoggerStatus",
    "SupportsCallingThread",
    "SupportsCheckpointUpload",
    "SupportsDeferredUpload",
    "SupportsGraph",
    "SupportsLogDir",
    "SupportsReopening",
    "SupportsRowLookup",
    "SupportsRowTime",
    "SupportsWaitingRows",
]

LoggerStatus = Literal["success", "failed", "finished"]


@runtime_checkable
class Logger(Protocol):
    """A sink of one run. Only rank 0 calls it.

    A class that derives from this one may leave out ``save`` and ``finalize``.

    A Trainer calls ``log_metrics``, ``log_hyperparams``, ``save``, ``finalize`` and ``after_save_checkpoint`` from one
    thread of its own for each logger, which is not the thread that trains: see ``SupportsCallingThread``.
    """

    @property
    def name(self) -> str | None:
        """Name of the experiment."""
        ...

    @property
    def version(self) -> int | str | None:
        """Which run of the experiment this is."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record host floats at x = ``step``."""
        ...

    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        """Record the run's settings. May be called again with more."""
        ...

    def save(self) -> None:
        """Write buffered records."""
        return  # a body, so that a type checker does not take it for abstract

    def finalize(self, status: LoggerStatus) -> None:
        """Write everything and note how the run ended. Logging again afterwards reopens the sink."""
        return  # as above


@runtime_checkable
class SupportsLogDir(Protocol):
    """A logger with a folder of its own."""

    @property
    def save_dir(self) -> str | None:
        """The root folder that the user chose."""
        ...

    @property
    def log_dir(self) -> str | None:
        """The folder of this run, below ``save_dir``."""
        ...


@runtime_checkable
class SupportsGraph(Protocol):
    """A logger that can draw a model."""

    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        """Record the model's graph for one example input."""
        ...


@runtime_checkable
class SupportsCheckpointUpload(Protocol):
    """A logger that stores checkpoints."""

    def after_save_checkpoint(self, checkpoint_callback: object) -> None:
        """Called on rank 0 after each save, with the callback that saved."""
        ...


@runtime_checkable
class SupportsDeferredUpload(Protocol):
    """A logger that can set aside a checkpoint at once and upload it later."""

    def checkpoint_upload(self, checkpoint_callback: object | None) -> Callable[[], None] | None:
        """What uploads the files that the callback has now, also when they are deleted before it is called.

        Called by the thread that trains, instead of ``after_save_checkpoint``, so it must be quick. The argument None
        asks for what was kept until the end of a successful run. Answers None when there is nothing to do.
        """
        ...


@runtime_checkable
class SupportsRowTime(Protocol):
    """A logger that stores when a row was logged, which may be long before it gets there."""

    def log_metrics_at(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """``log_metrics`` of a row that was logged ``time_s`` seconds after the Unix epoch."""
        ...


@runtime_checkable
class SupportsReopening(Protocol):
    """A logger whose run another process can go on with."""

    def reopen_options(self) -> Mapping[str, object]:
        """Arguments of the logger's class, as plain data and without secrets, that open the same run again.

        Must not wait for a server.
        """
        ...


@runtime_checkable
class SupportsRowLookup(Protocol):
    """A logger that knows which rows it has from an earlier process of the same run."""

    def has_row(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether exactly this row was there when it was first asked."""
        ...


@runtime_checkable
class SupportsWaitingRows(Protocol):
    """A logger whose ``save`` first asks for what its run has logged and not handed over yet."""

    def waiting_rows(self, deliver: Callable[[], object] | None) -> None:
        """Call ``deliver`` at the beginning of ``save`` from now on; None: no longer. It waits a bounded time."""
        ...


@runtime_checkable
class SupportsCallingThread(Protocol):
    """A logger that says which thread may call it."""

    @property
    def needs_calling_thread(self) -> bool:
        """True: the thread that trains calls the logger, which then slows the run as much as it takes."""
        ...
