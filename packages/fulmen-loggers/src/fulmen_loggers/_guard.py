"""A lock that a copied or pickled logger gets anew."""

from __future__ import annotations

import threading

__all__ = ["Guard"]


class Guard:
    """A re-entrant lock: a run calls a logger from a thread of its own, a user's hook from another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Guard], tuple[()]]:
        """Two processes share no lock."""
        return Guard, ()
