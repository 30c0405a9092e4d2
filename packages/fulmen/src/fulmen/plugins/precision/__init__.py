"""Precisions, where Lightning has them."""

from typing import TYPE_CHECKING

from fulmen._not_here import elsewhere
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

if TYPE_CHECKING:
    from fulmen_deepspeed import DeepSpeedPrecision as DeepSpeedPrecision
    from fulmen_xla import XLAPrecision as XLAPrecision

_ELSEWHERE = {
    "DeepSpeedPrecision": "fulmen.plugins",
    "FSDPPrecision": "fulmen.plugins",
    "XLAPrecision": "fulmen.plugins",
}

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


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return elsewhere("fulmen.plugins.precision", name, _ELSEWHERE, {})
