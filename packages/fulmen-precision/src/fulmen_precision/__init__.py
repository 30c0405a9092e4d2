"""True, mixed and quantized precision: 64, 32, 16, bf16, float8, 8 and 4 bits, with gradient scaling."""

from fulmen_precision.bitsandbytes import BitsandbytesPrecision
from fulmen_precision.float8 import Float8Precision
from fulmen_precision.mixed import MixedPrecision, ScaledMixedPrecision, autocast_cache_is_safe
from fulmen_precision.stochastic import StochasticHalfPrecision, round_stochastically, stochastic_rounding
from fulmen_precision.transformer_engine import TransformerEnginePrecision
from fulmen_precision.true import DoublePrecision, FullPrecision, HalfPrecision

__all__ = [
    "BitsandbytesPrecision",
    "DoublePrecision",
    "Float8Precision",
    "FullPrecision",
    "HalfPrecision",
    "MixedPrecision",
    "ScaledMixedPrecision",
    "StochasticHalfPrecision",
    "TransformerEnginePrecision",
    "autocast_cache_is_safe",
    "round_stochastically",
    "stochastic_rounding",
]
