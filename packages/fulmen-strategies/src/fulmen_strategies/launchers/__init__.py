"""Launchers: how the processes of a run come to exist when no cluster has started them."""

from fulmen_strategies.launchers.local import LocalLauncher
from fulmen_strategies.launchers.processes import ProcessLauncher

__all__ = ["LocalLauncher", "ProcessLauncher"]
