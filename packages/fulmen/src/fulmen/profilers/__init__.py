"""Profilers: how long each action of a run takes, and what it does meanwhile.

Give one to ``Trainer(profiler=...)``, by name or as an object; a Trainer without one measures nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen.profilers.advanced import AdvancedProfiler as AdvancedProfiler
    from fulmen.profilers.base import PassThroughProfiler as PassThroughProfiler
    from fulmen.profilers.ledger import TimeLedger as TimeLedger
    from fulmen.profilers.profiler import Profiler as Profiler
    from fulmen.profilers.pytorch import PyTorchProfiler as PyTorchProfiler
    from fulmen.profilers.simple import SimpleProfiler as SimpleProfiler
    from fulmen.profilers.xla import XLAProfiler as XLAProfiler

_HOME = {
    "AdvancedProfiler": "advanced",
    "PassThroughProfiler": "base",
    "Profiler": "profiler",
    "PyTorchProfiler": "pytorch",
    "SimpleProfiler": "simple",
    "TimeLedger": "ledger",
    "XLAProfiler": "xla",
}

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "TimeLedger",
    "XLAProfiler",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOME:
            value: object = getattr(import_module(f"fulmen.profilers.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        return submodule("fulmen.profilers", name)


def __dir__() -> list[str]:
    return sorted(__all__)
