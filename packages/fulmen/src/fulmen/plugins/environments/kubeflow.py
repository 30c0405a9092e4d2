"""``KubeflowEnvironment``, where Lightning has it."""

from fulmen_strategies import KubeflowEnvironment

__all__ = ["KubeflowEnvironment"]
