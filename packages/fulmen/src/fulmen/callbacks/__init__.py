"""Callbacks: what happens beside training, at named moments of a run.

Each is imported when it is first named, so that a run pays only for those it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen.callbacks.batch_size_finder import BatchSizeFinder as BatchSizeFinder
    from fulmen.callbacks.callback import Callback as Callback
    from fulmen.callbacks.checkpoint import Checkpoint as Checkpoint
    from fulmen.callbacks.device_stats_monitor import DeviceStatsMonitor as DeviceStatsMonitor
    from fulmen.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from fulmen.callbacks.early_stopping import EarlyStoppingReason as EarlyStoppingReason
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
    from fulmen.callbacks.rich_model_summary import RichModelSummary as RichModelSummary
    from fulmen.callbacks.spike import SpikeDetection as SpikeDetection
    from fulmen.callbacks.throughput_monitor import ThroughputMonitor as ThroughputMonitor
    from fulmen.callbacks.timer import Timer as Timer

_HOME = {
    "BatchSizeFinder": "batch_size_finder",
    "BasePredictionWriter": "prediction_writer",
    "Callback": "callback",
    "Checkpoint": "checkpoint",
    "DeviceStatsMonitor": "device_stats_monitor",
    "EarlyStopping": "early_stopping",
    "EarlyStoppingReason": "early_stopping",
    "LambdaCallback": "lambda_function",
    "LearningRateFinder": "lr_finder",
    "LearningRateMonitor": "lr_monitor",
    "ModelCheckpoint": "model_checkpoint",
    "ModelSummary": "model_summary",
    "OnExceptionCheckpoint": "on_exception_checkpoint",
    "ProgressBar": "progress",
    "RichModelSummary": "rich_model_summary",
    "RichProgressBar": "progress",
    "SpikeDetection": "spike",
    "TQDMProgressBar": "progress",
    "ThroughputMonitor": "throughput_monitor",
    "Timer": "timer",
}

__all__ = [
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "Checkpoint",
    "DeviceStatsMonitor",
    "EarlyStopping",
    "EarlyStoppingReason",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RichModelSummary",
    "RichProgressBar",
    "SpikeDetection",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value: object = getattr(import_module(f"fulmen.callbacks.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fulmen.callbacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
