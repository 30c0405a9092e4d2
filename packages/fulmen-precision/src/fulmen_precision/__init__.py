"""True and mixed precision (64, 32, 16, bf16) with gradient scaling."""

from fulmen_precision.mixed import MixedPrecision, ScaledMixedPrecision, autocast_cache_is_safe
from fulmen_precision.true import DoublePrecision, FullPrecision, HalfPrecision

__all__ = [
    "DoublePrecision",
    "FullPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "ScaledMixedPrecision",
    "autocast_cache_is_safe",
]
