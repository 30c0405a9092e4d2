"""XLALauncher: one process for each chip of this host, started by torch-xla."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from fulmen_protocols.errors import MisconfigurationException, RankFailure
from fulmen_xla import _replica
from fulmen_xla._library import library, platform, require, runtime_is_running
from fulmen_xla.accelerator import XLAAccelerator

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["XLALauncher"]

T = TypeVar("T")

# What a fork takes along, so that nothing of it has to be pickled: a number, and the function to run.
_carried: dict[int, Callable[[], object]] = {}


class XLALauncher:
    """Runs the function once on every device of this host, by ``torch_xla.launch``; rank 0's value comes back.

    torch-xla starts one process for each chip (on the CPU, and on TPUs up to v3, threads of one). They end with the
    function, and nothing else comes back. When one fails, its process ends at once, which makes torch-xla end the
    others, and the error carries its traceback.

    Args:
        start_method: ``"fork"`` copies this process, notebook and all, which must not have opened a device; ``"spawn"``
            starts new interpreters, which import the program and unpickle the function.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
        MisconfigurationException: this system has no such method.
    """

    def __init__(self, start_method: Literal["fork", "spawn"] = "fork") -> None:
        if start_method not in multiprocessing.get_all_start_methods():
            raise MisconfigurationException(
                f"start_method={start_method!r} of XLALauncher: on {sys.platform} Python can start processes by "
                f"{' and '.join(multiprocessing.get_all_start_methods())}. Use one of those."
            )
        require("XLALauncher")
        self._method = start_method

    @property
    def start_method(self) -> str:
        """How processes are made."""
        return self._method

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether it works in a notebook: fork does."""
        return self._method == "fork"

    def launch(
        self,
        function: Callable[[], T],
        *,
        num_processes: int,
        num_nodes: int,
        node_rank: int,
        main_address: str,
        main_port: int,
    ) -> T:
        """Run ``function`` on every device of this host and return its value on this host's first one.

        In a replica, a nested launch just runs the function; so does a launch of one process.

        Raises:
            RankFailure: a replica failed; the message carries its traceback.
            MisconfigurationException: another number of processes than the host has devices, or this process has opened
                a device already.
        """
        if _replica.is_running() or num_processes * num_nodes == 1:
            return function()
        _require_all(num_processes)
        _require_closed()
        home = tempfile.mkdtemp(prefix="fulmen-xla-")
        key = id(function)
        by_fork = self._method == "fork"
        if by_fork:
            _carried[key] = function
        try:
            library().launch(_run, args=(key, None if by_fork else function, home), start_method=self._method)
        except Exception as error:  # a dead process breaks the pool; why it died is in its file
            raise _told(home, error) from error
        finally:
            _carried.pop(key, None)
            value = Path(home, "value")
            content = value.read_bytes() if value.exists() else None
            failure = _first_failure(home)
            shutil.rmtree(home, ignore_errors=True)
        if failure is not None or content is None:
            raise RankFailure(failure or "no replica has brought back a value.")
        return cast("T", pickle.loads(content))  # written by our own rank 0

    def kill(self, signum: int) -> None:
        """Send ``signum`` to every process that Python has started for torch-xla's pool."""
        for process in multiprocessing.active_children():
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signum)


def _require_all(num_processes: int) -> None:
    count = XLAAccelerator().auto_device_count()
    if num_processes != count:
        raise MisconfigurationException(
            f"{num_processes} processes were asked for on a host with {count} XLA devices: torch-xla starts one for "
            f"each device, or a single one. Use devices={count}, or devices=1."
        )


def _require_closed() -> None:
    if runtime_is_running():
        raise MisconfigurationException(
            f"replicas cannot be started: this process has opened a device of PJRT's {platform()} runtime already. "
            "Move no tensor to an XLA device before the launch (in a notebook: restart the kernel)."
        )


def _run(_index: int, key: int, function: Callable[[], object] | None, home: str) -> None:
    """What each replica does: the function, then its value or its error into the folder."""
    runtime = library("runtime")
    local_rank = int(runtime.local_ordinal())
    threads = int(runtime.addressable_device_count())
    function = _carried[key] if function is None else function
    try:
        with _replica.running():
            # Replicas that are threads of one process must not share a model.
            value = (copy.deepcopy(function) if threads > 1 else function)()
            if local_rank == 0:
                _leave(home, "value", pickle.dumps(value))
    except BaseException as error:  # noqa: BLE001  # whatever it is, the starter tells it
        _leave(home, f"error-{runtime.global_ordinal()}", _described(error, int(runtime.global_ordinal())).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the pool ends the others, who may wait for this one


def _leave(home: str, name: str, content: bytes) -> None:
    part = Path(home, f"{name}.part")
    part.write_bytes(content)
    part.rename(Path(home, name))


def _described(error: BaseException, rank: int) -> str:
    text = "".join(traceback.format_exception(error)).rstrip()
    return f"rank {rank} of this run failed first:\n{text}"


def _first_failure(home: str) -> str | None:
    found = sorted(Path(home).glob("error-*[0-9]"), key=lambda file: file.stat().st_mtime_ns)
    return found[0].read_text() if found else None


def _told(home: str, error: Exception) -> RankFailure:
    return RankFailure(_first_failure(home) or f"torch-xla could not run the replicas: {type(error).__name__}: {error}")
