"""What outside code reads of Lightning's loops and connectors, under their names, as views of what this Trainer holds.

Reading is offered, and what merely forwards; nothing here can change the course of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fulmen import _checkpointing
from fulmen._reporting import reporter_of
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen._predictions import PredictionRecord
    from fulmen.progress import Progress
    from fulmen.trainer import Trainer
    from fulmen_fabric.assembly import Assembly

__all__ = [
    "AcceleratorConnectorView",
    "CheckpointConnectorView",
    "Counts",
    "DataSourceView",
    "EvaluationLoopView",
    "FitLoopView",
    "LoggerConnectorView",
    "PredictionLoopView",
    "ProgressView",
    "TrainingEpochLoopView",
]


class Counts(NamedTuple):
    """How many of something are ready, started, processed and completed, the one in hand included as far as it is."""

    ready: int
    started: int
    processed: int
    completed: int


class ProgressView(NamedTuple):
    """Counts within the epoch, or run, and over all of them."""

    current: Counts
    total: Counts
    is_last_batch: bool = False


class DataSourceView:
    """``_data_source`` of a loop: who supplies its loaders."""

    def __init__(self, trainer: Trainer, stage: str) -> None:
        self._trainer, self._stage = trainer, stage

    def is_defined(self) -> bool:
        """Whether anybody does, in the running call or the last one."""
        session = self._trainer._session  # pyright: ignore[reportPrivateUsage]
        return session is not None and session.sources[self._stage].is_defined


class TrainingEpochLoopView:
    """``trainer.fit_loop.epoch_loop``."""

    def __init__(self, trainer: Trainer, progress: Progress) -> None:
        self._trainer, self._progress = trainer, progress

    @property
    def batch_progress(self) -> ProgressView:
        """Training batches: of the running epoch, and of all."""
        progress = self._progress
        begun = int(progress.epoch_started and not progress.epoch_ended and not progress.batch_is_open)
        # The hooks at a batch's end belong to it; the validation after it does not.
        ending = int(progress.batch_is_open and not progress.epoch_ended and not self._trainer.validating)
        current, total = (
            Counts(done + begun, done + begun, done, done - ending) for done in (progress.batch, progress.total_batches)
        )
        return ProgressView(current, total, self._trainer.is_last_batch)

    @property
    def log_step(self) -> int:
        """Where loggers draw the batch in hand: how many batches had stepped an optimizer before it."""
        return self._progress.log_step

    @property
    def _batches_that_stepped(self) -> int:
        return self.log_step

    @property
    def batch_idx(self) -> int:
        """Index of the batch in hand, or of the one done last in the running epoch; -1 before the first."""
        return self.batch_progress.current.ready - 1

    @property
    def total_batch_idx(self) -> int:
        """The same over all epochs."""
        return self.batch_progress.total.ready - 1

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        return self._trainer.global_step

    @property
    def min_steps(self) -> int:
        """``Trainer.min_steps``."""
        return self._trainer.min_steps

    @property
    def max_steps(self) -> int:
        """``Trainer.max_steps``."""
        return self._trainer.max_steps

    @property
    def val_loop(self) -> EvaluationLoopView:
        """Validation inside fit."""
        return EvaluationLoopView(self._trainer, "val")


class FitLoopView:
    """``trainer.fit_loop``."""

    def __init__(self, trainer: Trainer, progress: Progress) -> None:
        self._trainer, self._progress = trainer, progress

    @property
    def epoch_loop(self) -> TrainingEpochLoopView:
        """The loop over the batches of an epoch."""
        return TrainingEpochLoopView(self._trainer, self._progress)

    @property
    def epoch_progress(self) -> ProgressView:
        """Epochs, over all resumes."""
        progress = self._progress
        begun = progress.epoch + int(progress.epoch_started)
        epochs = Counts(begun, begun, progress.epoch + int(progress.epoch_ended), progress.epoch)
        return ProgressView(epochs, epochs)

    @property
    def max_epochs(self) -> int:
        """``Trainer.max_epochs``. Settable."""
        return self._trainer.max_epochs

    @max_epochs.setter
    def max_epochs(self, value: int) -> None:
        self._trainer.max_epochs = value

    @property
    def min_epochs(self) -> int:
        """``Trainer.min_epochs``."""
        return self._trainer.min_epochs

    @property
    def max_steps(self) -> int:
        """``Trainer.max_steps``."""
        return self._trainer.max_steps

    @property
    def min_steps(self) -> int:
        """``Trainer.min_steps``."""
        return self._trainer.min_steps

    @property
    def max_batches(self) -> float:
        """Training batches of an epoch on this rank; ``inf`` when unknown."""
        return self._trainer.num_training_batches

    def setup_data(self) -> None:
        """Ask for the training loader now, if nobody has; then ``num_training_batches`` is known.

        For ``configure_optimizers``, which runs before the loader is needed. Does nothing before there is a model.
        """
        self._trainer._load_training_data()  # pyright: ignore[reportPrivateUsage]

    @property
    def _data_source(self) -> DataSourceView:
        return DataSourceView(self._trainer, "train")

    @property
    def trainer(self) -> Trainer:
        """Whose loop it is."""
        return self._trainer

    @property
    def batch_idx(self) -> int:
        """Index of the batch in hand, or of the one done last in the running epoch; -1 before the first."""
        return self.epoch_loop.batch_idx

    @property
    def total_batch_idx(self) -> int:
        """The same over all epochs."""
        return self.epoch_loop.total_batch_idx

    @property
    def done(self) -> bool:
        """Whether no further batch will be trained."""
        return self._trainer._plan.finished(self._progress)  # pyright: ignore[reportPrivateUsage]


class EvaluationLoopView:
    """``trainer.validate_loop``, ``test_loop``, ``predict_loop`` and ``fit_loop.epoch_loop.val_loop``."""

    def __init__(self, trainer: Trainer, stage: str) -> None:
        self._trainer, self._stage = trainer, stage

    @property
    def trainer(self) -> Trainer:
        """Whose loop it is."""
        return self._trainer

    @property
    def _data_source(self) -> DataSourceView:
        return DataSourceView(self._trainer, self._stage)

    @property
    def max_batches(self) -> list[float]:
        """Batches of each loader on this rank; empty before they are known."""
        return self._trainer._limits(self._stage)  # pyright: ignore[reportPrivateUsage]

    @property
    def num_dataloaders(self) -> int:
        """How many loaders there are."""
        return len(self.max_batches)


class PredictionLoopView(EvaluationLoopView):
    """``trainer.predict_loop``: also the indices of the samples, where a prediction writer asked for them."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, "predict")

    @property
    def predictions(self) -> list[Any]:
        """What the running prediction has kept so far, one list where there is one loader."""
        record = self._record
        return [] if record is None else record.predictions

    @property
    def epoch_batch_indices(self) -> list[Any]:
        """Indices of the samples of every batch so far, one list for each loader."""
        record = self._record
        return [] if record is None else record.epoch_batch_indices

    @property
    def current_batch_indices(self) -> list[int] | None:
        """Those of the batch in hand; None where they are unknown."""
        record = self._record
        return None if record is None else record.current_batch_indices

    @property
    def return_predictions(self) -> bool:
        """Whether ``trainer.predict`` returns the outputs."""
        record = self._record
        return record is not None and record.return_predictions

    @property
    def _record(self) -> PredictionRecord | None:
        session = self._trainer._session  # pyright: ignore[reportPrivateUsage]
        return None if session is None else session.predictions


class LoggerConnectorView:
    """``trainer._logger_connector``."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def should_update_logs(self) -> bool:
        """Whether the batch in hand is one after which loggers get a row."""
        every = self._trainer.log_every_n_steps
        return bool(every) and (self._trainer.fit_loop.epoch_loop.log_step + 1) % every == 0

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write a row to every logger, on rank 0; at ``step``, else where the run is. Reads device values."""
        trainer = self._trainer
        if not trainer.loggers or not metrics or not trainer.is_global_zero:
            return
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        at = plain.pop("step", None) if step is None else step
        x = trainer.fit_loop.epoch_loop.log_step if at is None else int(at)
        for logger in trainer.loggers:
            reporter_of(trainer).pass_on(logger, plain, x)

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """``Trainer.callback_metrics``."""
        return self._trainer.callback_metrics


class CheckpointConnectorView:
    """``trainer._checkpoint_connector``."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a checkpoint of this moment, not written anywhere. Every rank must call it.

        Raises:
            MisconfigurationException: no model is attached yet.
        """
        session = self._trainer._session  # pyright: ignore[reportPrivateUsage]
        if session is None:
            raise MisconfigurationException(
                "dump_checkpoint() needs a model, and this trainer has none yet. Call fit, validate, test or predict "
                "first."
            )
        return _checkpointing.dump(self._trainer, session, weights_only=bool(weights_only))


class AcceleratorConnectorView:
    """``trainer._accelerator_connector``.

    Args:
        assembly: the backends of a run.
        strategy: what is seen as its strategy.
    """

    def __init__(self, assembly: Assembly, strategy: Any) -> None:
        self._assembly = assembly
        self.strategy: Any = strategy

    @property
    def is_distributed(self) -> bool:
        """Whether the run has several processes."""
        return self._assembly.world_size > 1

    @property
    def cluster_environment(self) -> Any:
        """What tells this process its ranks."""
        return self._assembly.environment

    @property
    def parallel_devices(self) -> list[Any]:
        """This node's devices."""
        return list(self._assembly.devices)

    @property
    def accelerator(self) -> Any:
        """``Trainer.accelerator``."""
        return self._assembly.accelerator

    @property
    def _accelerator_flag(self) -> str:
        """The accelerator's name, found out if it was "auto" or "gpu"."""
        return self._assembly.accelerator_name

    @property
    def _devices_flag(self) -> int | list[int]:
        """How many processes of the CPU, or which devices of what has several."""
        ids = self._assembly.device_ids
        return len(ids) if self._accelerator_flag == "cpu" else list(ids)
