"""Strategies by the names people look for here; they live in fulmen-strategies, and are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._xla_names import from_xla

if TYPE_CHECKING:
    from fulmen_strategies import DDPStrategy as DDPStrategy
    from fulmen_strategies import FSDPStrategy as FSDPStrategy
    from fulmen_strategies import ModelParallelStrategy as ModelParallelStrategy
    from fulmen_strategies import SingleDeviceStrategy as SingleDeviceStrategy
    from fulmen_xla import SingleDeviceXLAStrategy as SingleDeviceXLAStrategy
    from fulmen_xla import XLAFSDPStrategy as XLAFSDPStrategy
    from fulmen_xla import XLASPMDStrategy as XLASPMDStrategy
    from fulmen_xla import XLAStrategy as XLAStrategy

__all__ = ["DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"]

# Not in __all__, where a star import without fulmen-xla would end.
_OF_XLA = frozenset({"SingleDeviceXLAStrategy", "XLAFSDPStrategy", "XLASPMDStrategy", "XLAStrategy"})


def __getattr__(name: str) -> object:
    if name not in __all__:
        return from_xla(__name__, name, _OF_XLA)
    import fulmen_strategies

    value: object = getattr(fulmen_strategies, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
