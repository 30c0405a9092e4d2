"""A bar as the callbacks see it, and the plain lines that stand in for one where there is no terminal."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from multiprocessing import parent_process
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Bar", "PlainBar", "format_metric", "in_notebook", "is_drawable", "shows_widgets"]

PLAIN_INTERVAL_S = 10.0
"""Between two plain lines of one epoch."""

PLAIN_EPOCH_INTERVAL_S = 1.0
"""Between the lines of two epochs, so that thousands of short ones do not flood a log file."""


class Bar(Protocol):
    """What is used of a ``tqdm.tqdm``. Setting ``n`` or ``total`` shows at the next ``refresh``."""

    n: Any
    total: Any

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """What stands before the bar."""
        ...

    def set_postfix(self, ordered_dict: Any = None, refresh: bool | None = True) -> None:
        """What stands behind the bar."""
        ...

    def reset(self, total: Any = None) -> None:
        """Start anew."""
        ...

    def refresh(self) -> Any:
        """Draw."""
        ...

    def close(self) -> None:
        """Draw no more."""
        ...


def is_drawable(file: TextIO | None = None) -> bool:
    """Whether a bar can be redrawn in place: on a terminal or in a notebook."""
    file = file or sys.stdout
    return in_notebook() or bool(getattr(file, "isatty", lambda: False)())


def in_notebook() -> bool:
    """Whether this runs in Jupyter or Colab. Looks only at what is imported already."""
    if "google.colab" in sys.modules:
        return True
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def shows_widgets() -> bool:
    """Whether this process can draw in a notebook by itself: it is the kernel, and ipywidgets is installed.

    Without ipywidgets there is only text. Processes that the kernel has forked have its text stream, but what they
    display otherwise is dropped.
    """
    if not in_notebook() or parent_process() is not None:
        return False
    try:
        import_module("ipywidgets")
    except ImportError:
        return False
    return True


def format_metric(value: object) -> str:
    """Three significant digits for floats, everything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class PlainBar:
    """Progress as lines: one at the end, and one every 10 seconds before. No control characters.

    Has what subclasses of ``TQDMProgressBar`` use of a tqdm bar, so that they work without a terminal.

    Args:
        description: what stands before the numbers.
        total: batches; None when unknown.
        speaks_at_end: print when it ends even if that is sooner than 10 seconds.
    """

    def __init__(self, description: str = "", total: float | None = None, *, speaks_at_end: bool = True) -> None:
        self.description = description
        self.total = total
        self.n: float = 0
        self._speaks_at_end = speaks_at_end
        self._postfix = ""
        self._started = self._spoken = monotonic()
        self._ended = -math.inf
        self._unsaid = False

    disable = False
    """Whether nothing is printed."""
    leave = True
    """Whether what was printed stays."""

    @property
    def desc(self) -> str:
        """``description``, under tqdm's name."""
        return self.description

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """What stands before the numbers."""
        self.description = (desc or "").removesuffix(": ")

    set_description_str = set_description

    def set_postfix(
        self, ordered_dict: Mapping[str, object] | None = None, refresh: bool | None = True, **more: object
    ) -> None:
        """What stands behind the numbers."""
        shown: Mapping[str, object] = {**({} if ordered_dict is None else ordered_dict), **more}
        self._postfix = "".join(f", {name}={format_metric(value)}" for name, value in shown.items())

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """The same as a text."""
        self._postfix = f", {s}" if s else ""

    def update(self, n: float = 1) -> None:
        """Count ``n`` more."""
        self.n += n
        self.refresh()

    def clear(self) -> None:
        """Nothing: a line that was printed stays."""

    def reset(self, total: float | None = None) -> None:
        """Start anew, for the next epoch."""
        self.n = 0
        self.total = total
        self._started = self._spoken = monotonic()
        self._unsaid = False

    def refresh(self) -> None:
        """Print a line if the last one is 10 seconds old."""
        self._unsaid = True
        now = monotonic()
        if now - self._spoken >= PLAIN_INTERVAL_S:
            self._speak(now)

    def end_epoch(self) -> None:
        """Print a line for the epoch, unless the last one did so less than a second ago."""
        now = monotonic()
        if now - self._ended >= PLAIN_EPOCH_INTERVAL_S:
            self._ended = now
            self._speak(now)
        else:
            self._unsaid = True

    def close(self) -> None:
        """Print what has not been said."""
        if self._unsaid and self._speaks_at_end:
            self._speak(monotonic())

    def _speak(self, now: float) -> None:
        self._spoken = now
        self._unsaid = False
        elapsed = now - self._started
        total = "?" if self.total is None or math.isinf(self.total) else f"{self.total:g}"
        rate = f", {self.n / elapsed:.3g} it/s" if elapsed > 0 and self.n else ""
        minutes, seconds = divmod(int(elapsed), 60)
        line = f"{self.description}: {self.n:g}/{total} [{minutes:02d}:{seconds:02d}{rate}{self._postfix}]"
        print(line, flush=True)
