"""PassThroughProfiler: what ``trainer.profiler`` is when nobody asked for one."""

from __future__ import annotations

from fulmen.profilers.profiler import Profiler

__all__ = ["PassThroughProfiler"]


class PassThroughProfiler(Profiler):
    """Measures nothing, so that ``self.trainer.profiler.profile("...")`` may stay in a module's code."""

    def start(self, action_name: str) -> None:
        """Do nothing."""

    def stop(self, action_name: str) -> None:
        """Do nothing."""
