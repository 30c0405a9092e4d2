"""``TransformerEnginePrecision``, where Lightning has it."""

from fulmen_precision import TransformerEnginePrecision

__all__ = ["TransformerEnginePrecision"]
