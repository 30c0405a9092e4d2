"""The script that the launcher kit runs: one task, with a launcher made by the vendor's factory."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from fulmen_protocols import Launcher, LaunchesApart, missing_members

if TYPE_CHECKING:
    from collections.abc import Callable


def _import_callable(name: str) -> Callable[..., Any]:
    # By path: importing the package would import torch, which costs seconds in every process of every test.
    spec = spec_from_file_location("_importing", Path(__file__).with_name("_importing.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., Any] = module.import_callable(name)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Run:
    """This process's part of one task."""

    def __init__(self, factory: str, num_processes: int, folder: Path) -> None:
        self.folder, self.num_processes = folder, num_processes
        self.calls = 0
        # A process that was started by executing the script again is placed already and needs no launcher.
        self.launcher: Any = None if "LOCAL_RANK" in os.environ else _import_callable(factory)()
        self.port = _free_port()

    def launch(self, function: Callable[[], object]) -> object:
        if self.launcher is None:
            return function()
        return self.launcher.launch(
            function,
            num_processes=self.num_processes,
            num_nodes=1,
            node_rank=0,
            main_address="127.0.0.1",
            main_port=self.port,
        )

    def record(self) -> int:
        """Leave proof that the function ran here, and return the local rank."""
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        text = json.dumps({"pid": os.getpid(), "local_rank": rank})
        staging = self.folder / f"staging-{os.getpid()}"
        staging.write_text(text)
        staging.rename(self.folder / f"call-{os.getpid()}-{time.monotonic_ns()}.json")
        return rank

    def everyone_came(self, calls: int = 1) -> None:
        """Wait until the function has run ``calls`` times in every process."""
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("call-*.json"))) < calls * self.num_processes:
            if time.monotonic() > deadline:
                raise TimeoutError("a process that should run the function did not come")
            time.sleep(0.02)

    def value(self) -> object:
        rank = self.record()
        self.everyone_came()
        return {"local_rank": rank, "answer": [42, None, "text"]}

    def value_again(self) -> object:
        rank = self.record()
        self.everyone_came(calls=2)
        return {"local_rank": rank}

    def rank_1_fails(self) -> object:
        rank = self.record()
        self.everyone_came()
        if rank == 1:
            raise ValueError("this is rank 1's own error")
        time.sleep(40)
        print("rank 0 waited in vain", flush=True)
        return None

    def rank_0_fails(self) -> object:
        rank = self.record()
        self.everyone_came()
        if rank == 0:
            raise KeyError("this is rank 0's own error")
        time.sleep(600)
        return None

    def killed(self) -> object:
        value = self.launch(self.wait_for_the_signal)
        self.launcher.kill(signal.SIGTERM)
        return value

    def killed_from_outside(self) -> object:
        """While a launch waits for its processes, another thread ends them; the launch then ends with an error."""

        def end() -> None:
            self.everyone_came()
            self.launcher.kill(signal.SIGTERM)

        Thread(target=end, daemon=True).start()
        try:
            self.launch(self.sleep)
        except RuntimeError:
            return "the main process goes on"
        return "the launch did not notice"

    def sleep(self) -> object:
        self.record()
        time.sleep(600)
        return None

    def wait_for_the_signal(self) -> object:
        if self.record() != 0:
            time.sleep(600)
        self.everyone_came()
        return "the main process goes on"


def main(task: str, factory: str, num_processes: str, folder: str) -> None:
    """Run ``task`` and write what rank 0 got to ``value.json``."""
    run = _Run(factory, int(num_processes), Path(folder))
    value: object
    if task == "members":
        assert missing_members(Launcher, run.launcher) == [], missing_members(Launcher, run.launcher)
        value = None
    elif task == "interactive":
        value = run.launcher.is_interactive_compatible
    elif task == "twice":
        run.launch(run.value)
        value = run.launch(run.value_again)
    elif task == "kill":
        value = run.killed_from_outside() if isinstance(run.launcher, LaunchesApart) else run.killed()
    else:
        functions = {"value": run.value, "rank 1 fails": run.rank_1_fails, "rank 0 fails": run.rank_0_fails}
        value = run.launch(functions[task])
    if run.launcher is not None:
        (Path(folder) / "value.json").write_text(json.dumps(value))


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder: its modules must not stand in for a vendor's of the same name
    main(*sys.argv[1:])
