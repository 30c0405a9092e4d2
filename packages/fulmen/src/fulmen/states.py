"""What a Trainer is doing: status, entry point, stage. Names are Lightning's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["RunningStage", "TrainerFn", "TrainerState", "TrainerStatus"]


class TrainerStatus(StrEnum):
    """How the last call is going."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        """Whether no call is running any more."""
        return self in (self.FINISHED, self.INTERRUPTED)


class TrainerFn(StrEnum):
    """Which method was called."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def first_stage(self) -> RunningStage:
        """The stage in which a call of this method begins, and the only one unless it is ``fit``."""
        return {
            self.FITTING: RunningStage.TRAINING,
            self.VALIDATING: RunningStage.VALIDATING,
            self.TESTING: RunningStage.TESTING,
            self.PREDICTING: RunningStage.PREDICTING,
        }[self]


class RunningStage(StrEnum):
    """Which loop is running."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        """Whether this is an evaluation loop."""
        return self in (self.VALIDATING, self.TESTING, self.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str:
        """Prefix of this stage's dataloader hook: ``val`` for validation and sanity check."""
        return "val" if self in (self.VALIDATING, self.SANITY_CHECKING) else self.value


@dataclass
class TrainerState:
    """Status, entry point and stage of a Trainer."""

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """Whether the last call ended without an error."""
        return self.status == TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether no call is running."""
        return self.status.stopped
