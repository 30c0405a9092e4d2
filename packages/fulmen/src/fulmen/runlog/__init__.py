"""The run's own log: an append-only file that every logger is fed from, its replay, and the page made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen.runlog._reader import RunLog as RunLog
    from fulmen.runlog._reader import read_run as read_run
    from fulmen.runlog._replaying import replay as replay
    from fulmen.runlog._report import write_report as write_report
    from fulmen.runlog._settings import LogDelivery as LogDelivery

__all__ = ["LogDelivery", "RunLog", "read_run", "replay", "write_report"]

# A run needs a part of this only, and the page's generator not before its end.
_HOME = {
    "LogDelivery": "_settings",
    "RunLog": "_reader",
    "read_run": "_reader",
    "replay": "_replaying",
    "write_report": "_report",
}


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'fulmen.runlog' has no attribute {name!r}")
        from importlib import import_module

        value: object = getattr(import_module(f"fulmen.runlog.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
