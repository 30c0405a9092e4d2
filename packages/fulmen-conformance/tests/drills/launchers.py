"""Launchers for drill_launcher.py. Here, because each started process imports this file: it imports no torch."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Good:
    """Executes the script again for each further rank and watches them from a thread."""

    is_interactive_compatible = False

    def __init__(self) -> None:
        self.others: list[subprocess.Popen[bytes]] = []
        self.killed = False

    def launch(
        self,
        function: Callable[[], object],
        *,
        num_processes: int,
        num_nodes: int,
        node_rank: int,
        main_address: str,
        main_port: int,
    ) -> object:
        if not self.others:
            self.start(num_processes)
        return function()

    def start(self, num_processes: int) -> None:
        for rank in range(1, num_processes):
            self.others.append(
                subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"LOCAL_RANK": str(rank)})
            )
        atexit.register(self.kill, 15)
        for other in self.others:
            threading.Thread(target=self.watch, args=(other,), daemon=True).start()

    def watch(self, other: subprocess.Popen[bytes]) -> None:
        if other.wait() != 0 and not self.killed:
            self.kill(15)
            os._exit(1)

    def kill(self, signum: int) -> None:
        self.killed = True
        for other in self.others:
            other.send_signal(signum)


class NeverLooks(Good):
    """Starts the others and does not watch them."""

    def watch(self, other: subprocess.Popen[bytes]) -> None:
        other.wait()


class TextOfTheValue(Good):
    def launch(self, function: Callable[[], object], **place: object) -> object:
        return str(super().launch(function, **place))


class KillsNobody(Good):
    def kill(self, signum: int) -> None:
        self.killed = True
