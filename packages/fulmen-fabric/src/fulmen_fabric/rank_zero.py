"""Doing things once per run: decorators, log lines and warnings for rank 0 only.

The rank is known from ``World.start`` on; before that it is read from the variables that launchers set, when it is
asked for. Importing this module changes nothing.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, ParamSpec, TypeVar, overload

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "LightningDeprecationWarning",
    "PossibleUserWarning",
    "WarningCache",
    "disable_possible_user_warnings",
    "rank_prefixed_message",
    "rank_zero_debug",
    "rank_zero_deprecation",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]

P = ParamSpec("P")
T = TypeVar("T")
D = TypeVar("D")

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
_log = logging.getLogger("fulmen")


class PossibleUserWarning(UserWarning):
    """A warning that may be wrong about the user's intent. ``POSSIBLE_USER_WARNINGS=off`` silences all of them."""


class LightningDeprecationWarning(DeprecationWarning):
    """Something will be removed. The name is Lightning's."""


class _RankZeroOnly:
    """Callable with a settable ``rank``, so that ``rank_zero_only.rank`` and ``@rank_zero_only`` both work."""

    def __init__(self) -> None:
        self._rank: int | None = None

    @property
    def rank(self) -> int:
        """This process's global rank: what was set, else what a launcher's variables say, else 0."""
        if self._rank is not None:
            return self._rank
        for variable in _RANK_VARIABLES:
            value = os.environ.get(variable, "")
            if value.isdigit():
                return int(value)
        return 0

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._rank = value

    @overload
    def __call__(self, fn: Callable[P, T]) -> Callable[P, T | None]: ...
    @overload
    def __call__(self, fn: Callable[P, T], default: D) -> Callable[P, T | D]: ...
    def __call__(self, fn: Callable[P, T], default: D | None = None) -> Callable[P, T | D | None]:
        """Wrap ``fn``: it runs on rank 0 only; elsewhere the call returns ``default``."""

        @functools.wraps(fn)
        def call(*args: P.args, **kwargs: P.kwargs) -> T | D | None:
            return fn(*args, **kwargs) if self.rank == 0 else default

        return call


rank_zero_only = _RankZeroOnly()
"""Decorator: run a function on rank 0 only. ``rank_zero_only.rank`` is this process's global rank."""


def rank_zero_info(message: object, *args: object) -> None:
    """Log at level INFO on logger ``"fulmen"``, on rank 0.

    Where logging has no handler at all, the line goes to standard error, unless the logger's level hides it.
    """
    if rank_zero_only.rank != 0:
        return
    if _log.hasHandlers():
        _log.info(message, *args)
    elif _log.level <= logging.INFO:
        print(str(message) % args if args else message, file=sys.stderr)


def rank_zero_debug(message: object, *args: object) -> None:
    """Log at level DEBUG on logger ``"fulmen"``, on rank 0."""
    if rank_zero_only.rank == 0:
        _log.debug(message, *args)


def rank_zero_warn(
    message: Warning | str, category: type[Warning] = UserWarning, stacklevel: int | None = None
) -> None:
    """Warn on rank 0.

    Args:
        message: as for ``warnings.warn``.
        category: ``PossibleUserWarning`` is dropped while the environment has ``POSSIBLE_USER_WARNINGS=off``.
        stacklevel: frames above this call to blame. None: the first one that is not part of fulmen.
    """
    if rank_zero_only.rank != 0:
        return
    if issubclass(category, PossibleUserWarning) and os.environ.get("POSSIBLE_USER_WARNINGS", "").lower() in {
        "off",
        "0",
    }:
        return
    warnings.warn(message, category, stacklevel=_users_frame() if stacklevel is None else stacklevel + 1)


def rank_zero_deprecation(message: Warning | str, stacklevel: int | None = None) -> None:
    """Warn of a removal on rank 0."""
    rank_zero_warn(message, LightningDeprecationWarning, None if stacklevel is None else stacklevel + 1)


def disable_possible_user_warnings(module: str = "") -> None:
    """Ignore ``PossibleUserWarning`` from now on, or only those blamed on modules whose name starts with ``module``."""
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """``"[rank: 3] message"``; without a rank the message alone."""
    return message if rank is None else f"[rank: {rank}] {message}"


class WarningCache(set[str]):
    """Says each message once per process: the set of those that were said."""

    def _first(self, message: str) -> bool:
        if message in self:
            return False
        self.add(message)
        return True

    def warn(self, message: str, category: type[Warning] = UserWarning, stacklevel: int | None = None) -> None:
        """``rank_zero_warn``, the first time."""
        if self._first(message):
            rank_zero_warn(message, category, None if stacklevel is None else stacklevel + 1)

    def deprecation(self, message: str, stacklevel: int | None = None) -> None:
        """``rank_zero_deprecation``, the first time."""
        if self._first(message):
            rank_zero_deprecation(message, None if stacklevel is None else stacklevel + 1)

    def info(self, message: str) -> None:
        """``rank_zero_info``, the first time."""
        if self._first(message):
            rank_zero_info(message)


def _users_frame() -> int:
    """``stacklevel``, counted from our caller, of the nearest frame outside fulmen."""
    level = 1
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] -- the documented way to walk up without cost
    while frame.f_back is not None:
        root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if root != "fulmen" and not root.startswith("fulmen_"):
            return level
        frame = frame.f_back
        level += 1
    return level
