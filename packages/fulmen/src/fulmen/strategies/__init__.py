"""Strategies by the names people look for here; they live in fulmen-strategies, and are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import not_here
from fulmen._xla_names import from_xla

if TYPE_CHECKING:
    from fulmen_protocols import Strategy as Strategy
    from fulmen_strategies import DDPStrategy as DDPStrategy
    from fulmen_strategies import FSDPStrategy as FSDPStrategy
    from fulmen_strategies import ModelParallelStrategy as ModelParallelStrategy
    from fulmen_strategies import SingleDeviceStrategy as SingleDeviceStrategy
    from fulmen_xla import SingleDeviceXLAStrategy as SingleDeviceXLAStrategy
    from fulmen_xla import XLAFSDPStrategy as XLAFSDPStrategy
    from fulmen_xla import XLASPMDStrategy as XLASPMDStrategy
    from fulmen_xla import XLAStrategy as XLAStrategy

# Not in __all__, where a star import without fulmen-xla would end.
_OF_XLA = frozenset({"SingleDeviceXLAStrategy", "XLAFSDPStrategy", "XLASPMDStrategy", "XLAStrategy"})
_REFUSED = {
    "ParallelStrategy": "a strategy of several processes needs no base class; what it has besides a Strategy are its "
    "launcher and collectives (docs/guides/write-a-strategy.md). trainer.world_size > 1 tells if there are several",
    "StrategyRegistry": "names come from the entry points of installed packages (docs/guides/write-a-strategy.md). "
    "`fulmen plugins` lists them, and a strategy without a name is passed as an object",
}

__all__ = ["DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy", "Strategy"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name in _OF_XLA:
            return from_xla(__name__, name)
        if name not in __all__:
            raise not_here("fulmen.strategies", name, _REFUSED)
        from importlib import import_module

        value: object = getattr(import_module("fulmen_protocols" if name == "Strategy" else "fulmen_strategies"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
