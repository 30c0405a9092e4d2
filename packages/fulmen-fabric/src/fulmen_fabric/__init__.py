"""Own your loop, keep the engineering: assembly of devices, precision, distribution and checkpoints.

Each name is imported when it is first used, so that a command can say what it does without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen_fabric.abilities import supports as supports
    from fulmen_fabric.assembly import Assembly as Assembly
    from fulmen_fabric.assembly import assemble as assemble
    from fulmen_fabric.capture import CapturedStep as CapturedStep
    from fulmen_fabric.fabric import Fabric as Fabric
    from fulmen_fabric.flops import get_available_flops as get_available_flops
    from fulmen_fabric.flops import measure_flops as measure_flops
    from fulmen_fabric.loaders import FabricDataLoader as FabricDataLoader
    from fulmen_fabric.loss_weights import LossWeights as LossWeights
    from fulmen_fabric.optimizers import FabricOptimizer as FabricOptimizer
    from fulmen_fabric.preemption import PreemptionWatch as PreemptionWatch
    from fulmen_fabric.rank_zero import LightningDeprecationWarning as LightningDeprecationWarning
    from fulmen_fabric.rank_zero import PossibleUserWarning as PossibleUserWarning
    from fulmen_fabric.rank_zero import WarningCache as WarningCache
    from fulmen_fabric.rank_zero import disable_possible_user_warnings as disable_possible_user_warnings
    from fulmen_fabric.rank_zero import rank_prefixed_message as rank_prefixed_message
    from fulmen_fabric.rank_zero import rank_zero_debug as rank_zero_debug
    from fulmen_fabric.rank_zero import rank_zero_deprecation as rank_zero_deprecation
    from fulmen_fabric.rank_zero import rank_zero_info as rank_zero_info
    from fulmen_fabric.rank_zero import rank_zero_only as rank_zero_only
    from fulmen_fabric.rank_zero import rank_zero_warn as rank_zero_warn
    from fulmen_fabric.run_state import RunState as RunState
    from fulmen_fabric.seed import collect_rng_state as collect_rng_state
    from fulmen_fabric.seed import isolate_rng as isolate_rng
    from fulmen_fabric.seed import reset_seed as reset_seed
    from fulmen_fabric.seed import restore_rng_state as restore_rng_state
    from fulmen_fabric.seed import seed_everything as seed_everything
    from fulmen_fabric.spike import SpikeDetection as SpikeDetection
    from fulmen_fabric.spike import TrainingSpikeException as TrainingSpikeException
    from fulmen_fabric.stopping import StopAgreement as StopAgreement
    from fulmen_fabric.stopping import StopSignal as StopSignal
    from fulmen_fabric.throughput import Throughput as Throughput
    from fulmen_fabric.throughput import ThroughputMonitor as ThroughputMonitor
    from fulmen_fabric.transfer import convert_tensors_to_scalars as convert_tensors_to_scalars
    from fulmen_fabric.transfer import map_leaves as map_leaves
    from fulmen_fabric.transfer import move_data_to_device as move_data_to_device
    from fulmen_fabric.transfer import mover as mover
    from fulmen_fabric.uneven import UnevenRounds as UnevenRounds
    from fulmen_fabric.world import LocalCollectives as LocalCollectives
    from fulmen_fabric.world import World as World
    from fulmen_fabric.wrappers import FabricModule as FabricModule
    from fulmen_fabric.wrappers import is_wrapped as is_wrapped

__all__ = [
    "Assembly",
    "CapturedStep",
    "Fabric",
    "FabricDataLoader",
    "FabricModule",
    "FabricOptimizer",
    "LightningDeprecationWarning",
    "LocalCollectives",
    "LossWeights",
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

_HOME = {
    "Assembly": "assembly",
    "CapturedStep": "capture",
    "Fabric": "fabric",
    "FabricDataLoader": "loaders",
    "FabricModule": "wrappers",
    "FabricOptimizer": "optimizers",
    "LightningDeprecationWarning": "rank_zero",
    "LocalCollectives": "world",
    "LossWeights": "loss_weights",
    "PossibleUserWarning": "rank_zero",
    "PreemptionWatch": "preemption",
    "RunState": "run_state",
    "SpikeDetection": "spike",
    "StopAgreement": "stopping",
    "StopSignal": "stopping",
    "Throughput": "throughput",
    "ThroughputMonitor": "throughput",
    "TrainingSpikeException": "spike",
    "UnevenRounds": "uneven",
    "WarningCache": "rank_zero",
    "World": "world",
    "assemble": "assembly",
    "collect_rng_state": "seed",
    "convert_tensors_to_scalars": "transfer",
    "disable_possible_user_warnings": "rank_zero",
    "get_available_flops": "flops",
    "is_wrapped": "wrappers",
    "isolate_rng": "seed",
    "map_leaves": "transfer",
    "measure_flops": "flops",
    "move_data_to_device": "transfer",
    "mover": "transfer",
    "rank_prefixed_message": "rank_zero",
    "rank_zero_debug": "rank_zero",
    "rank_zero_deprecation": "rank_zero",
    "rank_zero_info": "rank_zero",
    "rank_zero_only": "rank_zero",
    "rank_zero_warn": "rank_zero",
    "reset_seed": "seed",
    "restore_rng_state": "seed",
    "seed_everything": "seed",
    "supports": "abilities",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value: object = getattr(import_module(f"fulmen_fabric.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fulmen_fabric' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
