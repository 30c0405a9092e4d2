"""Precisions, where Lightning has them."""

from fulmen_precision import (
    BitsandbytesPrecision,
    DoublePrecision,
    Float8Precision,
    FullPrecision,
    HalfPrecision,
    MixedPrecision,
    StochasticHalfPrecision,
    TransformerEnginePrecision,
)
from fulmen_protocols import Precision

__all__ = [
    "BitsandbytesPrecision",
    "DoublePrecision",
    "Float8Precision",
    "FullPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "StochasticHalfPrecision",
    "TransformerEnginePrecision",
]
