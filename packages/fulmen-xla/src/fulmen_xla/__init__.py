"""TPUs and other XLA devices for fulmen, by torch-xla.

Each name is imported when it is first used; torch-xla itself, when a backend is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen_xla.accelerator import XLAAccelerator as XLAAccelerator
    from fulmen_xla.checkpoint_io import XLACheckpointIO as XLACheckpointIO
    from fulmen_xla.collectives import XLACollectives as XLACollectives
    from fulmen_xla.environment import XLAEnvironment as XLAEnvironment
    from fulmen_xla.fsdp import XLAFSDPStrategy as XLAFSDPStrategy
    from fulmen_xla.launcher import XLALauncher as XLALauncher
    from fulmen_xla.loader import XLADeviceLoader as XLADeviceLoader
    from fulmen_xla.parallel import XLAStrategy as XLAStrategy
    from fulmen_xla.precision import XLAPrecision as XLAPrecision
    from fulmen_xla.sharded_io import XLAShardedCheckpointIO as XLAShardedCheckpointIO
    from fulmen_xla.single import SingleDeviceXLAStrategy as SingleDeviceXLAStrategy
    from fulmen_xla.spmd import XLASPMDStrategy as XLASPMDStrategy

__all__ = [
    "SingleDeviceXLAStrategy",
    "XLAAccelerator",
    "XLACheckpointIO",
    "XLACollectives",
    "XLADeviceLoader",
    "XLAEnvironment",
    "XLAFSDPStrategy",
    "XLALauncher",
    "XLAPrecision",
    "XLASPMDStrategy",
    "XLAShardedCheckpointIO",
    "XLAStrategy",
]

_HOME = {
    "SingleDeviceXLAStrategy": "single",
    "XLAAccelerator": "accelerator",
    "XLACheckpointIO": "checkpoint_io",
    "XLACollectives": "collectives",
    "XLADeviceLoader": "loader",
    "XLAEnvironment": "environment",
    "XLAFSDPStrategy": "fsdp",
    "XLALauncher": "launcher",
    "XLAPrecision": "precision",
    "XLASPMDStrategy": "spmd",
    "XLAShardedCheckpointIO": "sharded_io",
    "XLAStrategy": "parallel",
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
