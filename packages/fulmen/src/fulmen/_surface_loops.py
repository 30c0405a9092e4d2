"""The Trainer's loops and connectors, as outside code reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fulmen._lightning_views import (
    AcceleratorConnectorView,
    CheckpointConnectorView,
    EvaluationLoopView,
    FitLoopView,
    LoggerConnectorView,
    PredictionLoopView,
)

if TYPE_CHECKING:
    from fulmen.progress import Progress
    from fulmen.trainer import Trainer

__all__ = ["LoopSurface"]


class LoopSurface:
    """Views of what a Trainer holds; see ``_lightning_views``."""

    _progress: Progress

    @property
    def fit_loop(self) -> FitLoopView:
        """Counters and limits of training, under the names of Lightning's loop."""
        return FitLoopView(self._as_trainer(), self._progress)

    @property
    def validate_loop(self) -> EvaluationLoopView:
        """The same of validation."""
        return EvaluationLoopView(self._as_trainer(), "val")

    @property
    def test_loop(self) -> EvaluationLoopView:
        """The same of a test."""
        return EvaluationLoopView(self._as_trainer(), "test")

    @property
    def predict_loop(self) -> PredictionLoopView:
        """The same of prediction, and what it returned."""
        return PredictionLoopView(self._as_trainer())

    @property
    def _logger_connector(self) -> LoggerConnectorView:
        return LoggerConnectorView(self._as_trainer())

    @property
    def _checkpoint_connector(self) -> CheckpointConnectorView:
        return CheckpointConnectorView(self._as_trainer())

    @property
    def _accelerator_connector(self) -> AcceleratorConnectorView:
        trainer = self._as_trainer()
        return AcceleratorConnectorView(trainer.assembly, trainer.strategy)

    def _as_trainer(self) -> Trainer:
        return cast("Trainer", self)  # the only class that has this surface
