"""What a Trainer is doing now, as callbacks and integrations ask it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.states import RunningStage, TrainerFn, TrainerStatus

if TYPE_CHECKING:
    from fulmen.states import TrainerState

__all__ = ["StageSurface"]


class StageSurface:
    """Properties over ``state``."""

    state: TrainerState

    @property
    def training(self) -> bool:
        """Whether a training batch is being run. Settable, as are its siblings."""
        return self.state.stage == RunningStage.TRAINING

    @training.setter
    def training(self, value: bool) -> None:
        self.state.stage = RunningStage.TRAINING if value else None

    @property
    def validating(self) -> bool:
        """Whether validation is running."""
        return self.state.stage == RunningStage.VALIDATING

    @validating.setter
    def validating(self, value: bool) -> None:
        self.state.stage = RunningStage.VALIDATING if value else None

    @property
    def testing(self) -> bool:
        """Whether a test is running."""
        return self.state.stage == RunningStage.TESTING

    @testing.setter
    def testing(self, value: bool) -> None:
        self.state.stage = RunningStage.TESTING if value else None

    @property
    def predicting(self) -> bool:
        """Whether prediction is running."""
        return self.state.stage == RunningStage.PREDICTING

    @predicting.setter
    def predicting(self, value: bool) -> None:
        self.state.stage = RunningStage.PREDICTING if value else None

    @property
    def sanity_checking(self) -> bool:
        """Whether validation batches are being tried before training."""
        return self.state.stage == RunningStage.SANITY_CHECKING

    @sanity_checking.setter
    def sanity_checking(self, value: bool) -> None:
        self.state.stage = RunningStage.SANITY_CHECKING if value else None

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation loop is running."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last call ended with an error."""
        return self.state.status == TrainerStatus.INTERRUPTED

    @property
    def _fitting(self) -> bool:
        return self.state.fn == TrainerFn.FITTING
