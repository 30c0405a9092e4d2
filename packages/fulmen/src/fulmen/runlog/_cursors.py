"""How far each sink of a run has got, beside the run's log: what ``fulmen log replay`` still has to deliver."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from fulmen.runlog._record import plain
from fulmen_fabric.abilities import supports
from fulmen_protocols import LOGGERS, Logger, SupportsReopening

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FILE", "Cursor", "key_of", "load", "options_of", "registered_name", "save"]

FILE = "run.sinks.json"


@dataclass
class Cursor:
    """One sink of a run: how it is opened again, and where in the log it stands."""

    logger: str
    """The name it is registered by; a class's name where it is not."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    delivered_to: int = 0
    refused: list[str] = field(default_factory=list[str])
    gaps: list[list[int]] = field(default_factory=list[list[int]])
    """Parts of the log, before ``delivered_to``, that earlier processes did not deliver."""
    can_reopen: bool = True
    is_due: bool = False
    """Whether a run has ended, or is running, without having delivered everything to it."""


def key_of(logger: str, options: Mapping[str, object]) -> str:
    """Under which a sink is known."""
    return f"{logger} {json.dumps(plain(options), sort_keys=True)}"


def registered_name(logger: Logger) -> str | None:
    """The name by which the logger's class can be asked for; None if no distribution registers it."""
    return _registered(f"{type(logger).__module__}:{type(logger).__qualname__}")


@cache
def _registered(place: str) -> str | None:
    from importlib.metadata import entry_points  # costs tens of milliseconds

    return next((point.name for point in entry_points(group=LOGGERS.group) if point.value == place), None)


def options_of(logger: Logger) -> dict[str, Any] | None:
    """What opens the logger's run again; None: it does not say."""
    if not supports(logger, SupportsReopening):
        return None
    return cast("dict[str, Any]", plain(logger.reopen_options()))


def load(log_path: str) -> dict[str, Cursor]:
    """The sinks of the run whose log is at ``log_path``, by key. A damaged file is as good as none."""
    try:
        with open(_path(log_path), encoding="utf-8") as stream:
            found = cast("dict[str, dict[str, Any]]", json.load(stream))
        return {key: Cursor(**value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(log_path: str, cursors: Mapping[str, Cursor]) -> None:
    """Write them in one step."""
    path = _path(log_path)
    staging = f"{path}.{os.getpid()}.partial"
    with open(staging, "w", encoding="utf-8") as stream:
        json.dump({key: asdict(cursor) for key, cursor in cursors.items()}, stream, indent=1)
    os.replace(staging, path)


def _path(log_path: str) -> str:
    return os.path.join(os.path.dirname(log_path), FILE)
