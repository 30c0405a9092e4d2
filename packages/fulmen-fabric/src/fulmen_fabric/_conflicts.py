"""Collecting everything that is wrong with a request before raising once."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from fulmen_protocols import FulmenError, MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Conflicts"]

T = TypeVar("T")

# What a backend may raise about a request. Anything else is a defect and keeps its own traceback.
_REFUSALS = (FulmenError, ValueError, TypeError, RuntimeError, ImportError, LookupError, OSError)


class Conflicts:
    """The conflicts found so far, in the order of the arguments."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Exception | None]] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, message: str, cause: Exception | None = None) -> None:
        """Note one conflict; ``cause`` is the backend's own error."""
        self._found.append((message, cause))

    def attempt(self, function: Callable[[], T], about: str = "") -> T | None:
        """``function()``, or None after noting why it refused; ``about`` leads where the refusal does not name it."""
        try:
            return function()
        except _REFUSALS as error:
            why = str(error) or type(error).__name__
            self.add(why if about in why else f"{about}: {why}", error)
            return None

    def raise_if_any(self) -> None:
        """Raises: MisconfigurationException: with every conflict noted, if there is one."""
        if not self._found:
            return
        cause = next((error for _, error in self._found if error is not None), None)
        if len(self._found) == 1:
            kind = MisconfigurationTypeError if isinstance(cause, TypeError) else MisconfigurationException
            raise kind(self._found[0][0]) from cause
        lines = "\n".join(f"  {number}. {message}" for number, (message, _) in enumerate(self._found, 1))
        raise MisconfigurationException(f"{len(self._found)} conflicts in what was asked:\n{lines}") from cause
