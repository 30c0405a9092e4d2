"""Timer: how long each stage takes, and an end to training when its time is up."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from fulmen.callbacks._shared_clock import SharedClock
from fulmen.callbacks.callback import Callback
from fulmen.settings import parse_duration
from fulmen.utilities.enums import LightningEnum
from fulmen_fabric.rank_zero import rank_zero_info
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["Interval", "Timer"]

_STAGES = ("train", "validate", "test", "predict", "sanity_check")


class Interval(LightningEnum):
    """After what a ``Timer`` looks at the time; the plain strings do as well."""

    step = "step"
    epoch = "epoch"


class Timer(Callback):
    """Measures the time spent in training, validation, sanity check, test and prediction, and can end training.

    Validation inside of training counts for both. Rank 0's clock decides. On one process the time is looked at after
    every batch; on several the ranks hear of it ever more often towards the end, in messages that also say how many
    batches later the next one comes. What was spent before a checkpoint counts after resuming.

    Args:
        duration: when to end training: ``"DD:HH:MM:SS"``, a ``timedelta`` or its arguments. None: never.
        interval: look at the time after a ``"step"`` or at the end of an ``"epoch"``.
        verbose: say when the time is up.

    Raises:
        MisconfigurationException: ``duration`` is none, or ``interval`` is something else.
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise MisconfigurationException(f"Timer(interval={interval!r}): use 'step' or 'epoch'.")
        self._duration_s = None if duration is None else parse_duration("duration", duration).total_seconds()
        self._interval = str(interval)
        self._verbose = verbose
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._clock: SharedClock | None = None

    def start_time(self, stage: str = "train") -> float | None:
        """When ``stage`` last began, in seconds of ``time.monotonic``; None if it has not."""
        return self._start.get(_known(stage))

    def end_time(self, stage: str = "train") -> float | None:
        """When ``stage`` last ended, in seconds of ``time.monotonic``; None if it has not."""
        return self._end.get(_known(stage))

    def time_elapsed(self, stage: str = "train") -> float:
        """Seconds spent in ``stage``, in this run and in those it resumed from."""
        start, end = self.start_time(stage), self.end_time(stage)
        before = self._before.get(_known(stage), 0.0)
        if start is None:
            return before
        return before + ((end if end is not None else monotonic()) - start)

    def time_remaining(self, stage: str = "train") -> float | None:
        """Seconds until ``duration`` is up, negative afterwards; None without a duration."""
        return None if self._duration_s is None else self._duration_s - self.time_elapsed(stage)

    def _begin(self, stage: str) -> None:
        if stage in self._end:  # not the first time in this run
            self._before[stage] = self.time_elapsed(stage)
            del self._end[stage]
        self._start[stage] = monotonic()

    def _finish(self, stage: str) -> None:
        if stage in self._start:
            self._end[stage] = monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run may have no time left."""
        if self._duration_s is not None and self._before.get("train"):
            self._check(trainer, self._before["train"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of training."""
        self._begin("train")
        if self._duration_s is not None and self._interval == "step" and trainer.world_size > 1:
            self._clock = SharedClock(self._duration_s - self._before.get("train", 0.0))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self._finish("train")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the sanity check."""
        self._begin("sanity_check")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the sanity check."""
        self._finish("sanity_check")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of validation."""
        self._begin("validate")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of validation."""
        self._finish("validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a test."""
        self._begin("test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of a test."""
        self._finish("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of prediction."""
        self._begin("predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of prediction."""
        self._finish("predict")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End training if its time is up."""
        if self._duration_s is None or self._interval != "step":
            return
        clock = self._clock
        over = self.time_elapsed() >= self._duration_s if clock is None else clock.is_over(trainer.strategy.broadcast)
        if over:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End training if its time is up."""
        if self._duration_s is not None and self._interval == "epoch":
            self._check(trainer, self.time_elapsed())

    def _check(self, trainer: Trainer, elapsed_s: float) -> None:
        """Stop all ranks if rank 0's time is up. Every rank must come here."""
        if trainer.strategy.broadcast(elapsed_s >= (self._duration_s or 0.0)):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if trainer.should_stop:
            return
        trainer.should_stop = True
        if self._verbose:
            rank_zero_info(f"training ends: its duration of {timedelta(seconds=self._duration_s or 0.0)} is up")

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent in each stage."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in _STAGES}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._before = {str(stage): float(spent) for stage, spent in state_dict.get("time_elapsed", {}).items()}


def _known(stage: str) -> str:
    if stage not in _STAGES:
        raise MisconfigurationException(f"stage={stage!r} is not timed: use one of {', '.join(_STAGES)}.")
    return str(stage)
