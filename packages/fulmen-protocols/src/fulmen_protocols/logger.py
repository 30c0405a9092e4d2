"""Logger: where metrics and hyperparameters of a run go. Member names are Lightning's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["Logger", "LoggerStatus", "SupportsCheckpointUpload", "SupportsGraph", "SupportsLogDir"]

LoggerStatus = Literal["success", "failed", "finished"]


@runtime_checkable
class Logger(Protocol):
    """A sink of one run. Only rank 0 calls it."""

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
        ...

    def finalize(self, status: LoggerStatus) -> None:
        """Write everything and note how the run ended. Logging again afterwards reopens the sink."""
        ...


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
