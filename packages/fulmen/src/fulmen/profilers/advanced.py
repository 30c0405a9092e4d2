"""AdvancedProfiler: which Python functions take the time of each action, by ``cProfile``."""

from __future__ import annotations

import cProfile
import io
import marshal
import pstats
from typing import TYPE_CHECKING, Any, cast

from fulmen import _files
from fulmen.profilers.profiler import Profiler
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["AdvancedProfiler"]

_Path = tuple[str, ...]


class AdvancedProfiler(Profiler):
    """Reports the functions called during each action, those of the actions nested in it included.

    Python has one function profiler at a time, so an inner action suspends the outer one's: a function that is running
    at that moment is counted up to there, and what it calls later is listed beside it.

    Args:
        dirpath: folder of the report; None: the Trainer's ``log_dir``.
        filename: part of the report's name; None: local rank 0 logs the report.
        line_count_restriction: functions to list per action: a number (int) or a fraction (float, 0 to 1).
        dump_stats: also write what was measured to ``{stage}-{filename}-{rank}-{action}.prof``, for ``pstats`` and
            viewers; needs ``dirpath`` or a Trainer that has a ``log_dir``.
    """

    def __init__(
        self,
        dirpath: str | PathLike[str] | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        number = cast("object", line_count_restriction)
        fraction_is_wrong = isinstance(number, float) and not 0.0 <= number <= 1.0
        if not isinstance(number, (int, float)) or isinstance(number, bool) or number < 0 or fraction_is_wrong:
            raise MisconfigurationException(
                f"line_count_restriction={number!r} is neither a number of lines (int) nor a fraction (float, 0 to 1)."
            )
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        # By the actions that run, outermost first: what an action did is the sum over all paths that it is on.
        self._measured: dict[_Path, cProfile.Profile] = {}
        self._running: _Path = ()

    def start(self, action_name: str) -> None:
        """Begin to measure."""
        self._switch_to((*self._running, action_name))

    def stop(self, action_name: str) -> None:
        """End to measure the innermost running action of that name.

        Raises:
            ValueError: the action was not started.
        """
        if action_name not in self._running:
            running = ", ".join(map(repr, self._running)) or "none"
            raise ValueError(
                f"profiler.stop({action_name!r}): that action was not started. Running: {running}. "
                "Start it first, or use `with profiler.profile(...)`."
            )
        path = list(self._running)
        del path[len(path) - 1 - path[::-1].index(action_name)]
        self._switch_to(tuple(path))

    def _switch_to(self, path: _Path) -> None:
        if self._running:
            self._measured[self._running].disable()
        self._running = path
        if path:
            measured = self._measured.get(path)
            if measured is None:
                measured = self._measured[path] = cProfile.Profile()
            measured.enable()

    def summary(self) -> str:
        """A table of functions for each action; writes the ``.prof`` files, if asked for."""
        running, reports = self._running, dict[str, str]()
        self._switch_to(())
        for action in dict.fromkeys(name for path in self._measured for name in path):
            text = io.StringIO()
            parts = [measured for path, measured in self._measured.items() if action in path]
            stats = pstats.Stats(*parts, stream=text)
            if self.dump_stats:
                self._dump(action, stats)
            stats.strip_dirs().sort_stats("cumulative").print_stats(self.line_count_restriction)
            reports[action] = text.getvalue()
        self._switch_to(running)
        return self._stats_to_str(reports) if reports else ""

    def _dump(self, action: str, stats: pstats.Stats) -> None:
        if not self.dirpath:
            raise MisconfigurationException(
                "AdvancedProfiler(dump_stats=True) has no folder to write to. Give dirpath=, or use it in a Trainer."
            )
        path = _files.join(str(self.dirpath), self._prepare_filename(action_name=action, extension=".prof"))
        _files.make_folder(str(self.dirpath))
        # The format of pstats.Stats.dump_stats, which writes to local files only.
        _files.write_bytes(path, marshal.dumps(cast("Any", stats).stats))

    def teardown(self, stage: str | None) -> None:
        """Forget what was measured: each call of a Trainer has its own report."""
        self._switch_to(())
        self._measured.clear()
