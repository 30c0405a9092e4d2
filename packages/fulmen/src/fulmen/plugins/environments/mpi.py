"""``MPIEnvironment``, where Lightning has it."""

from fulmen_strategies import MPIEnvironment

__all__ = ["MPIEnvironment"]
