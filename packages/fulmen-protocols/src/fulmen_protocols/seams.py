"""The table of seams: protocol, entry-point group, and the distribution that holds fulmen's own backends."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from fulmen_protocols.accelerator import Accelerator
from fulmen_protocols.callback import Callback
from fulmen_protocols.checkpoint_io import CheckpointIO
from fulmen_protocols.cluster_environment import ClusterEnvironment
from fulmen_protocols.command import Command
from fulmen_protocols.exporter import Exporter
from fulmen_protocols.launcher import Launcher
from fulmen_protocols.logger import Logger
from fulmen_protocols.precision import Precision
from fulmen_protocols.strategy import Strategy

__all__ = [
    "ACCELERATORS",
    "CALLBACKS",
    "CHECKPOINT_IOS",
    "CLUSTER_ENVIRONMENTS",
    "COMMANDS",
    "EXPORTERS",
    "LAUNCHERS",
    "LOGGERS",
    "PRECISIONS",
    "SEAMS",
    "STRATEGIES",
    "Seam",
]

T_co = TypeVar("T_co", covariant=True)


# No dataclass: importing that module costs a quarter of this package's import time.
class Seam(NamedTuple, Generic[T_co]):
    """One kind of backend."""

    protocol: type[T_co]
    """What a backend must look like."""
    group: str
    """Entry-point group in which backends register; its last part is the seam's major version."""
    home: str
    """Distribution that holds fulmen's own backends."""
    noun: str
    """How messages call such a backend."""


# mypy refuses a Protocol as type[T] (type-abstract); these rows are the only place that needs it.
ACCELERATORS = Seam(Accelerator, "fulmen.accelerators.v1", "fulmen-accelerators", "accelerator")  # type: ignore[type-abstract]
STRATEGIES = Seam(Strategy, "fulmen.strategies.v1", "fulmen-strategies", "strategy")  # type: ignore[type-abstract]
PRECISIONS = Seam(Precision, "fulmen.precisions.v1", "fulmen-precision", "precision")  # type: ignore[type-abstract]
LOGGERS = Seam(Logger, "fulmen.loggers.v1", "fulmen-loggers", "logger")  # type: ignore[type-abstract]
CHECKPOINT_IOS = Seam(CheckpointIO, "fulmen.checkpoint_ios.v1", "fulmen-checkpoint", "checkpoint IO")  # type: ignore[type-abstract]
EXPORTERS = Seam(Exporter, "fulmen.exporters.v1", "fulmen-export", "exporter")  # type: ignore[type-abstract]
CLUSTER_ENVIRONMENTS = Seam(
    ClusterEnvironment,  # type: ignore[type-abstract]
    "fulmen.cluster_environments.v1",
    "fulmen-strategies",
    "cluster environment",
)
LAUNCHERS = Seam(Launcher, "fulmen.launchers.v1", "fulmen-strategies", "launcher")  # type: ignore[type-abstract]
CALLBACKS = Seam(Callback, "fulmen.callbacks.v1", "fulmen", "callback")  # type: ignore[type-abstract]
COMMANDS = Seam(Command, "fulmen.commands.v1", "fulmen", "command")  # type: ignore[type-abstract]

SEAMS: tuple[Seam[object], ...] = (
    ACCELERATORS,
    STRATEGIES,
    PRECISIONS,
    LAUNCHERS,
    CLUSTER_ENVIRONMENTS,
    CHECKPOINT_IOS,
    LOGGERS,
    EXPORTERS,
    CALLBACKS,
)
"""The seams of a run, in the order in which they are listed. ``COMMANDS`` are no backends and not among them."""
