"""The states of a Trainer, where Lightning has them; they live in ``fulmen.states``."""

from fulmen.states import RunningStage, TrainerFn, TrainerState, TrainerStatus

__all__ = ["RunningStage", "TrainerFn", "TrainerState", "TrainerStatus"]
