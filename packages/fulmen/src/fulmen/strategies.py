"""Strategies by the names people look for here; they live in fulmen-strategies, and are imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen_strategies import DDPStrategy as DDPStrategy
    from fulmen_strategies import FSDPStrategy as FSDPStrategy
    from fulmen_strategies import ModelParallelStrategy as ModelParallelStrategy
    from fulmen_strategies import SingleDeviceStrategy as SingleDeviceStrategy

__all__ = ["DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'fulmen.strategies' has no attribute {name!r}")
    import fulmen_strategies

    value: object = getattr(fulmen_strategies, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
