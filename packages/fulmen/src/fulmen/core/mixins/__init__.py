"""``HyperparametersMixin``, where Lightning has it."""

from fulmen.hparams import HyperparametersMixin

__all__ = ["HyperparametersMixin"]
