"""How this process leaves word of its end: an exception, a ``sys.exit``, or the Python stack of a crash."""

from __future__ import annotations

import atexit
import faulthandler
import os
from typing import TYPE_CHECKING

from fulmen_strategies.launchers._failure import exit_of_a_run, record_exception, stack_file

if TYPE_CHECKING:
    from fulmen_strategies.launchers._failure import Failure

__all__ = ["OwnEnd"]


class OwnEnd:
    """Writes to the file that the starter of this process will read.

    Args:
        file: as torch's elastic agent names it in TORCHELASTIC_ERROR_FILE.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._pid = os.getpid()
        atexit.register(self.record_exit)
        if not faulthandler.is_enabled():
            # Kept open on purpose: the handler writes to it when the process crashes.
            self._stack = open(stack_file(file), "w", encoding="utf-8")  # noqa: SIM115
            faulthandler.enable(self._stack)

    @property
    def is_of_this_process(self) -> bool:
        """False in a fork, which has inherited it."""
        return os.getpid() == self._pid

    def record(self, error: BaseException, first: Failure | None = None) -> None:
        """Write down what ends this process, and the failure of another one of which that is a consequence."""
        record_exception(self._file, error, first)

    def record_exit(self) -> None:
        """Write down the ``sys.exit`` that ends this process, if there is one. Done at exit by itself."""
        error = exit_of_a_run()
        if error is not None and self.is_of_this_process and not os.path.exists(self._file):
            record_exception(self._file, error)
