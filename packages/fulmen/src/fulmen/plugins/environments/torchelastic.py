"""``TorchElasticEnvironment``, where Lightning has it."""

from fulmen_strategies import TorchElasticEnvironment

__all__ = ["TorchElasticEnvironment"]
