"""Own your loop, keep the engineering: assembly of devices, precision, distribution and checkpoints."""

from fulmen_fabric.abilities import supports
from fulmen_fabric.assemble import Assembly, assemble
from fulmen_fabric.capture import CapturedStep
from fulmen_fabric.fabric import Fabric
from fulmen_fabric.flops import get_available_flops, measure_flops
from fulmen_fabric.preemption import PreemptionWatch
from fulmen_fabric.rank_zero import (
    LightningDeprecationWarning,
    PossibleUserWarning,
    WarningCache,
    disable_possible_user_warnings,
    rank_prefixed_message,
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from fulmen_fabric.run_state import RunState
from fulmen_fabric.seed import (
    collect_rng_state,
    isolate_rng,
    reset_seed,
    restore_rng_state,
    seed_everything,
)
from fulmen_fabric.spike import SpikeDetection, TrainingSpikeException
from fulmen_fabric.stopping import StopAgreement, StopSignal
from fulmen_fabric.throughput import Throughput, ThroughputMonitor
from fulmen_fabric.transfer import convert_tensors_to_scalars, map_leaves, move_data_to_device, mover
from fulmen_fabric.uneven import UnevenRounds
from fulmen_fabric.world import LocalCollectives, World
from fulmen_fabric.wrappers import is_wrapped

__all__ = [
    "Assembly",
    "CapturedStep",
    "Fabric",
    "LightningDeprecationWarning",
    "LocalCollectives",
    "PossibleUserWarning",
    "PreemptionWatch",
    "RunState",
    "SpikeDetection",
    "StopAgreement",
    "StopSignal",
    "Throughput",
    "ThroughputMonitor",
    "TrainingSpikeException",
    "UnevenRounds",
    "WarningCache",
    "World",
    "assemble",
    "collect_rng_state",
    "convert_tensors_to_scalars",
    "disable_possible_user_warnings",
    "get_available_flops",
    "is_wrapped",
    "isolate_rng",
    "map_leaves",
    "measure_flops",
    "move_data_to_device",
    "mover",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "reset_seed",
    "restore_rng_state",
    "seed_everything",
    "supports",
]
