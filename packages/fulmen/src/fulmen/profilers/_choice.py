"""From what ``Trainer(profiler=...)`` was given to a profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fulmen import profilers
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationTypeError,
    Profiler,
    did_you_mean,
    missing_members,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["choose"]

_NAMES = {
    "simple": "SimpleProfiler",
    "advanced": "AdvancedProfiler",
    "pytorch": "PyTorchProfiler",
    "xla": "XLAProfiler",
    "ledger": "TimeLedger",
}


def choose(profiler: object, *, barebones: bool) -> Profiler:
    """The profiler of that name, the object itself, or one that measures nothing for None.

    Raises:
        MisconfigurationException: an unknown name, no profiler at all, or one together with ``barebones``.
    """
    if profiler is None:
        return profilers.PassThroughProfiler()
    if barebones:
        raise MisconfigurationException(
            f"barebones=True turns profiler off, but it was given as {profiler!r}; drop one of the two."
        )
    if isinstance(profiler, str):
        kind = _NAMES.get(profiler.lower())
        if kind is None:
            raise MisconfigurationException(
                f"profiler={profiler!r} is no name of a profiler.{did_you_mean(profiler, _NAMES)} "
                f"Allowed: {', '.join(map(repr, _NAMES))}, or an object."
            )
        return cast("Callable[[], Profiler]", getattr(profilers, kind))()
    missing = missing_members(Profiler, profiler)
    if isinstance(profiler, type) or missing:
        found = f"the class {profiler.__name__}" if isinstance(profiler, type) else f"a {type(profiler).__name__}"
        lacks = "" if isinstance(profiler, type) else f", which lacks {', '.join(missing)}"
        raise MisconfigurationTypeError(
            f"profiler is {found}{lacks}. Give a name ({', '.join(map(repr, _NAMES))}) or an object like those of "
            "fulmen.profilers."
        )
    return cast("Profiler", profiler)
