"""SimpleProfiler: how often each action ran and how long it took."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from fulmen.profilers._table import table
from fulmen.profilers.profiler import Profiler

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["SimpleProfiler"]


class SimpleProfiler(Profiler):
    """Keeps the duration of every action, in seconds of the host's clock, and reports mean and total.

    Nested actions count in each other. Work on a GPU that nobody waited for is not in the times: it runs on after an
    action has ended. Durations add up over the calls of one Trainer: fit, then test.

    Args:
        dirpath: folder of the report; None: the Trainer's ``log_dir``.
        filename: part of the report's name; None: local rank 0 logs the report.
        extended: also report the number of calls and the share of the time since this profiler was made, and put the
            largest share first; otherwise the longest mean comes first.
    """

    def __init__(
        self, dirpath: str | PathLike[str] | None = None, filename: str | None = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        """Running actions, with ``time.perf_counter()`` at their start."""
        self.recorded_durations: dict[str, list[float]] = defaultdict(list)
        """Durations in seconds of each action's calls."""
        self.start_time = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Begin to measure.

        Raises:
            ValueError: the action runs already.
        """
        if action_name in self.current_actions:
            raise ValueError(
                f"profiler.start({action_name!r}): that action has been started and not stopped. "
                "Stop it first, or give the inner one another name."
            )
        self.current_actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """End to measure.

        Raises:
            ValueError: the action was not started.
        """
        now = time.perf_counter()
        started = self.current_actions.pop(action_name, None)
        if started is None:
            running = ", ".join(map(repr, self.current_actions)) or "none"
            raise ValueError(
                f"profiler.stop({action_name!r}): that action was not started. Running: {running}. "
                "Start it first, or use `with profiler.profile(...)`."
            )
        self.recorded_durations[action_name].append(now - started)

    def summary(self) -> str:
        """A table of actions."""
        elapsed_s = time.perf_counter() - self.start_time
        rows = [(name, math.fsum(times), len(times)) for name, times in self.recorded_durations.items()]
        if self.extended:
            rows.sort(key=lambda row: row[1], reverse=True)
            header: tuple[str, ...] = ("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %")
            cells = [("Total", "-", str(sum(row[2] for row in rows)), f"{elapsed_s:.5}", "100 %")]
            cells += [
                (name, f"{total / calls:.5}", str(calls), f"{total:.5}", f"{100 * total / elapsed_s:.5}")
                for name, total, calls in rows
            ]
            text = table(header, cells, rule_after_first=True)
        else:
            rows.sort(key=lambda row: row[1] / row[2], reverse=True)
            header = ("Action", "Mean duration (s)", "Total time (s)")
            text = table(header, [(name, f"{total / calls:.5}", f"{total:.5}") for name, total, calls in rows])
        return f"{self._title()}Profiler Report\n\n{text}\n"
