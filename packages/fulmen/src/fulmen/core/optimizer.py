"""``LightningOptimizer``, where Lightning has it."""

from fulmen.optimizer import LightningOptimizer

__all__ = ["LightningOptimizer"]
