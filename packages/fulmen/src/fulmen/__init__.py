"""PyTorch training without the engineering: Trainer, LightningModule and callbacks.

Importing this costs little more than ``import torch``: what a script does not name is not imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import fulmen
    import fulmen_fabric
    from fulmen import accelerators as accelerators
    from fulmen import callbacks as callbacks
    from fulmen import cli as cli
    from fulmen import core as core
    from fulmen import demos as demos
    from fulmen import loggers as loggers
    from fulmen import overrides as overrides
    from fulmen import plugins as plugins
    from fulmen import profilers as profilers
    from fulmen import serve as serve
    from fulmen import strategies as strategies
    from fulmen import trainer as trainer
    from fulmen import tuner as tuner
    from fulmen import utilities as utilities
    from fulmen.callbacks.callback import Callback as Callback
    from fulmen.datamodule import LightningDataModule as LightningDataModule
    from fulmen.module import LightningModule as LightningModule
    from fulmen.resume import Resume as Resume
    from fulmen.trainer import Trainer as Trainer
    from fulmen_fabric import Fabric as Fabric
    from fulmen_fabric import seed_everything as seed_everything

    fabric = fulmen_fabric
    pytorch = fulmen
    __lightning_version__: str
    __version__: str

__all__ = ["Callback", "Fabric", "LightningDataModule", "LightningModule", "Resume", "Trainer", "seed_everything"]

_HOME = {
    "Callback": "fulmen.callbacks.callback",
    "Fabric": "fulmen_fabric",
    "LightningDataModule": "fulmen.datamodule",
    "LightningModule": "fulmen.module",
    "Resume": "fulmen.resume",
    "Trainer": "fulmen.trainer",
    "seed_everything": "fulmen_fabric",
}
_PACKAGES = {"pytorch": "fulmen", "fabric": "fulmen_fabric"}
"""What ``L.pytorch`` and ``L.fabric`` stand for, in programs that had ``import lightning as L``."""
_MODULES = frozenset(
    {
        "accelerators",
        "callbacks",
        "cli",
        "core",
        "demos",
        "loggers",
        "overrides",
        "plugins",
        "profilers",
        "serve",
        "strategies",
        "trainer",
        "tuner",
        "utilities",
    }
)


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOME:
            value = getattr(import_module(_HOME[name]), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return import_module(f"fulmen.{name}")
        if name in _PACKAGES:
            return import_module(_PACKAGES[name])
        if name == "__version__":
            from importlib.metadata import version

            return version("fulmen")
        if name == "__lightning_version__":
            from fulmen._checkpoint_layout import LIGHTNING_VERSION

            return LIGHTNING_VERSION
        if name == "loops":  # which says what to do instead
            return import_module("fulmen.loops")
        raise AttributeError(f"module 'fulmen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, *_PACKAGES, "__lightning_version__", "__version__"])
