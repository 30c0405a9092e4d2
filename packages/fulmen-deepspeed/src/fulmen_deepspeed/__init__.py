"""DeepSpeed's engine for fulmen: strategies with ZeRO's stages, a precision, and checkpoints that consolidate."""

from fulmen_deepspeed.checkpoint_io import DeepSpeedCheckpointIO
from fulmen_deepspeed.collectives import EngineCollectives
from fulmen_deepspeed.consolidation import convert_zero_checkpoint_to_fp32_state_dict
from fulmen_deepspeed.precision import DeepSpeedPrecision
from fulmen_deepspeed.strategy import DeepSpeedStrategy

__all__ = [
    "DeepSpeedCheckpointIO",
    "DeepSpeedPrecision",
    "DeepSpeedStrategy",
    "EngineCollectives",
    "convert_zero_checkpoint_to_fp32_state_dict",
]
