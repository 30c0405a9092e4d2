"""Strategies by the names people look for here; they live in other packages, and are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import not_here
from fulmen_protocols import MissingPackage

if TYPE_CHECKING:
    from fulmen_deepspeed import DeepSpeedStrategy as DeepSpeedStrategy
    from fulmen_protocols import Strategy as Strategy
    from fulmen_strategies import DDPStrategy as DDPStrategy
    from fulmen_strategies import FSDPStrategy as FSDPStrategy
    from fulmen_strategies import ModelParallelStrategy as ModelParallelStrategy
    from fulmen_strategies import SingleDeviceStrategy as SingleDeviceStrategy

_REFUSED = {
    "ParallelStrategy": "a strategy of several processes needs no base class; what it has besides a Strategy are its "
    "launcher and collectives (docs/guides/write-a-strategy.md). trainer.world_size > 1 tells if there are several",
    "StrategyRegistry": "names come from the entry points of installed packages (docs/guides/write-a-strategy.md). "
    "`fulmen plugins` lists them, and a strategy without a name is passed as an object",
}

_HOME = {"DeepSpeedStrategy": "fulmen_deepspeed", "Strategy": "fulmen_protocols"}
_EXTRAS = {"fulmen_deepspeed": "deepspeed"}

__all__ = [
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "SingleDeviceStrategy",
    "Strategy",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise not_here("fulmen.strategies", name, _REFUSED)
        from importlib import import_module

        home = _HOME.get(name, "fulmen_strategies")
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
