"""Callbacks: what happens beside training, at named moments of a run.

Each is imported when it is first named, so that a run pays only for those it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen.callbacks.batch_size_finder import BatchSizeFinder as BatchSizeFinder
    from fulmen.callbacks.callback import Callback as Callback
    from fulmen.callbacks.checkpoint import Checkpoint as Checkpoint
    from fulmen.callbacks.device_stats_monitor import DeviceStatsMonitor as DeviceStatsMonitor
    from fulmen.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from fulmen.callbacks.early_stopping import EarlyStoppingReason as EarlyStoppingReason
    from fulmen.callbacks.finetuning import BackboneFinetuning as BackboneFinetuning
    from fulmen.callbacks.finetuning import BaseFinetuning as BaseFinetuning
    from fulmen.callbacks.gradient_accumulation_scheduler import (
        GradientAccumulationScheduler as GradientAccumulationScheduler,
    )
    from fulmen.callbacks.lambda_function import LambdaCallback as LambdaCallback
    from fulmen.callbacks.lr_finder import LearningRateFinder as LearningRateFinder
    from fulmen.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
    from fulmen.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from fulmen.callbacks.model_summary import ModelSummary as ModelSummary
    from fulmen.callbacks.on_exception_checkpoint import OnExceptionCheckpoint as OnExceptionCheckpoint
    from fulmen.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
    from fulmen.callbacks.progress import ProgressBar as ProgressBar
    from fulmen.callbacks.progress import RichProgressBar as RichProgressBar
    from fulmen.callbacks.progress import TQDMProgressBar as TQDMProgressBar
    from fulmen.callbacks.pruning import ModelPruning as ModelPruning
    from fulmen.callbacks.recompile_check import RecompileCheck as RecompileCheck
    from fulmen.callbacks.replica_check import ReplicaCheck as ReplicaCheck
    from fulmen.callbacks.replica_check import ReplicasDriftedError as ReplicasDriftedError
    from fulmen.callbacks.rich_model_summary import RichModelSummary as RichModelSummary
    from fulmen.callbacks.spike import SpikeDetection as SpikeDetection
    from fulmen.callbacks.spike_rewind import Rewind as Rewind
    from fulmen.callbacks.spike_rewind import SpikeRewind as SpikeRewind
    from fulmen.callbacks.spike_rewind import TooManyRewindsError as TooManyRewindsError
    from fulmen.callbacks.stochastic_weight_avg import StochasticWeightAveraging as StochasticWeightAveraging
    from fulmen.callbacks.straggler_monitor import Straggler as Straggler
    from fulmen.callbacks.straggler_monitor import StragglerMonitor as StragglerMonitor
    from fulmen.callbacks.throughput_monitor import ThroughputMonitor as ThroughputMonitor
    from fulmen.callbacks.timer import Timer as Timer
    from fulmen.callbacks.weight_averaging import EMAWeightAveraging as EMAWeightAveraging
    from fulmen.callbacks.weight_averaging import WeightAveraging as WeightAveraging

_HOME = {
    "BackboneFinetuning": "finetuning",
    "BaseFinetuning": "finetuning",
    "BasePredictionWriter": "prediction_writer",
    "BatchSizeFinder": "batch_size_finder",
    "Callback": "callback",
    "Checkpoint": "checkpoint",
    "DeviceStatsMonitor": "device_stats_monitor",
    "EMAWeightAveraging": "weight_averaging",
    "EarlyStopping": "early_stopping",
    "EarlyStoppingReason": "early_stopping",
    "GradientAccumulationScheduler": "gradient_accumulation_scheduler",
    "LambdaCallback": "lambda_function",
    "LearningRateFinder": "lr_finder",
    "LearningRateMonitor": "lr_monitor",
    "ModelCheckpoint": "model_checkpoint",
    "ModelPruning": "pruning",
    "ModelSummary": "model_summary",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "ProgressBar": "progress",
    "RecompileCheck": "recompile_check",
    "ReplicaCheck": "replica_check",
    "ReplicasDriftedError": "replica_check",
    "Rewind": "spike_rewind",
    "RichModelSummary": "rich_model_summary",
    "RichProgressBar": "progress",
    "SpikeDetection": "spike",
    "SpikeRewind": "spike_rewind",
    "StochasticWeightAveraging": "stochastic_weight_avg",
    "Straggler": "straggler_monitor",
    "StragglerMonitor": "straggler_monitor",
    "TQDMProgressBar": "progress",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
    "TooManyRewindsError": "spike_rewind",
    "WeightAveraging": "weight_averaging",
}

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EarlyStoppingReason",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelPruning",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RecompileCheck",
    "ReplicaCheck",
    "ReplicasDriftedError",
    "Rewind",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "SpikeRewind",
    "StochasticWeightAveraging",
    "Straggler",
    "StragglerMonitor",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "TooManyRewindsError",
    "WeightAveraging",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOME:
            value: object = getattr(import_module(f"fulmen.callbacks.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        return submodule("fulmen.callbacks", name)


def __dir__() -> list[str]:
    return sorted(__all__)
