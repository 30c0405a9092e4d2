"""Strategies by the names people look for here; they live in other packages, and are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import elsewhere

if TYPE_CHECKING:
    from fulmen_deepspeed import DeepSpeedStrategy as DeepSpeedStrategy
    from fulmen_fabric.registry import STRATEGY_REGISTRY as STRATEGY_REGISTRY
    from fulmen_protocols import Strategy as Strategy
    from fulmen_strategies import DataParallelStrategy as DataParallelStrategy
    from fulmen_strategies import DDPStrategy as DDPStrategy
    from fulmen_strategies import FSDPStrategy as FSDPStrategy
    from fulmen_strategies import ModelParallelStrategy as ModelParallelStrategy
    from fulmen_strategies import SingleDeviceStrategy as SingleDeviceStrategy
    from fulmen_xla import SingleDeviceXLAStrategy as SingleDeviceXLAStrategy
    from fulmen_xla import XLAFSDPStrategy as XLAFSDPStrategy
    from fulmen_xla import XLASPMDStrategy as XLASPMDStrategy
    from fulmen_xla import XLAStrategy as XLAStrategy

    StrategyRegistry = STRATEGY_REGISTRY

_HOME = {
    "DDPStrategy": "fulmen_strategies",
    "DataParallelStrategy": "fulmen_strategies",
    "DeepSpeedStrategy": "fulmen_deepspeed",
    "FSDPStrategy": "fulmen_strategies",
    "ModelParallelStrategy": "fulmen_strategies",
    "SingleDeviceStrategy": "fulmen_strategies",
    "SingleDeviceXLAStrategy": "fulmen_xla",
    "Strategy": "fulmen_protocols",
    "XLAFSDPStrategy": "fulmen_xla",
    "XLASPMDStrategy": "fulmen_xla",
    "XLAStrategy": "fulmen_xla",
}
_REFUSED = {
    "ParallelStrategy": "a strategy of several processes needs no base class; what it has besides a Strategy are its "
    "launcher and collectives (docs/guides/write-a-strategy.md). trainer.world_size > 1 tells if there are several",
}

_REGISTRY = {"STRATEGY_REGISTRY", "StrategyRegistry"}
"""Names of Lightning and of its Fabric for one thing."""

# Not in it: what another package has to be installed for, where a star import would end, and what no Trainer takes.
__all__ = ["DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy", "Strategy"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name in _REGISTRY:
            from fulmen_fabric.registry import STRATEGY_REGISTRY

            return STRATEGY_REGISTRY
        globals()[name] = value = elsewhere("fulmen.strategies", name, _HOME, _REFUSED)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
