"""``ClusterEnvironment``, where Lightning has it."""

from fulmen_protocols import ClusterEnvironment

__all__ = ["ClusterEnvironment"]
