"""``LightningEnvironment``, where Lightning has it."""

from fulmen_strategies import LightningEnvironment

__all__ = ["LightningEnvironment"]
