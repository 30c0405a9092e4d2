"""PyTorch training without the engineering: Trainer, LightningModule and callbacks.

Importing this costs little more than ``import torch``: what a script does not name is not imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen.callbacks.callback import Callback as Callback
    from fulmen.datamodule import LightningDataModule as LightningDataModule
    from fulmen.module import LightningModule as LightningModule
    from fulmen.resume import Resume as Resume
    from fulmen.trainer import Trainer as Trainer
    from fulmen_fabric import Fabric as Fabric
    from fulmen_fabric import seed_everything as seed_everything

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
_MODULES = frozenset(
    {
        "accelerators",
        "callbacks",
        "cli",
        "demos",
        "loggers",
        "plugins",
        "profilers",
        "serve",
        "strategies",
        "tuner",
        "utilities",
    }
)


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"fulmen.{name}")
    raise AttributeError(f"module 'fulmen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
