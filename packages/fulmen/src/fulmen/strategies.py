"""Strategies by the names people look for here; they live in other packages, and are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_protocols import MissingPackage

if TYPE_CHECKING:
    from fulmen_deepspeed import DeepSpeedStrategy as DeepSpeedStrategy
    from fulmen_strategies import DDPStrategy as DDPStrategy
    from fulmen_strategies import FSDPStrategy as FSDPStrategy
    from fulmen_strategies import ModelParallelStrategy as ModelParallelStrategy
    from fulmen_strategies import SingleDeviceStrategy as SingleDeviceStrategy

_HOME = {
    "DDPStrategy": "fulmen_strategies",
    "DeepSpeedStrategy": "fulmen_deepspeed",
    "FSDPStrategy": "fulmen_strategies",
    "ModelParallelStrategy": "fulmen_strategies",
    "SingleDeviceStrategy": "fulmen_strategies",
}
_EXTRAS = {"fulmen_deepspeed": "deepspeed"}

__all__ = ["DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'fulmen.strategies' has no attribute {name!r}")
    home = _HOME[name]
    try:
        value: object = getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        if error.name != home or home not in _EXTRAS:
            raise
        raise MissingPackage(
            f"{name} needs a package that is not installed. Run: pip install 'fulmen[{_EXTRAS[home]}]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
