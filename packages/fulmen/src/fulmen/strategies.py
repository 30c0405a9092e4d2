"""Strategies by the names people look for here; they live in fulmen-strategies."""

from fulmen_strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

__all__ = ["DDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"]
