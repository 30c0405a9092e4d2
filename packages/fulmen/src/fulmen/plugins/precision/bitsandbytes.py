"""``BitsandbytesPrecision``, where Lightning has it."""

from fulmen_precision import BitsandbytesPrecision

__all__ = ["BitsandbytesPrecision"]
