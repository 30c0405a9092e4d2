"""pytest kits that prove a backend meets a fulmen protocol; ours and vendors' run the same ones."""

from fulmen_conformance.accelerator import AcceleratorConformance
from fulmen_conformance.callback import CallbackConformance
from fulmen_conformance.checkpoint_io import CheckpointIOConformance
from fulmen_conformance.cluster_environment import ClusterEnvironmentConformance, Place
from fulmen_conformance.collectives import CollectivesConformance
from fulmen_conformance.exporter import ExporterConformance
from fulmen_conformance.launcher import LauncherConformance
from fulmen_conformance.logger import LoggerConformance
from fulmen_conformance.precision import PrecisionConformance
from fulmen_conformance.storage import StorageConformance
from fulmen_conformance.strategy import StrategyConformance

__all__ = [
    "AcceleratorConformance",
    "CallbackConformance",
    "CheckpointIOConformance",
    "ClusterEnvironmentConformance",
    "CollectivesConformance",
    "ExporterConformance",
    "LauncherConformance",
    "LoggerConformance",
    "Place",
    "PrecisionConformance",
    "StorageConformance",
    "StrategyConformance",
]
