"""The environment of a task that LSF's jsrun has started."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies.environments._table import TABLE, contradictions, number, port, refuse

__all__ = ["LSFEnvironment"]

_NEEDED = ("LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK")


class LSFEnvironment:
    """Reads what LSF's Job Step Manager tells each task; start one task for each device, with ``jsrun``.

    The hosts of the job are the lines of the file that LSB_DJOB_RANKFILE names, but for the first one: that is the node
    from which jobs are started. The port follows from the job's id: 10000 and its last three digits.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """True: jsrun does."""
        return True

    @property
    def main_address(self) -> str:
        """The first host of the rank file."""
        return _hosts()[0]

    @property
    def main_port(self) -> int:
        """MASTER_PORT, else 10000 and the last three digits of LSB_JOBID."""
        if "MASTER_PORT" in os.environ:
            return port(os.environ, "MASTER_PORT", default=0)
        return 10000 + number(os.environ, "LSB_JOBID", default=0) % 1000

    @staticmethod
    def detect() -> bool:
        """Whether jsrun has started this process."""
        return all(name in os.environ for name in _NEEDED if name != "JSM_NAMESPACE_RANK")

    def world_size(self) -> int:
        """JSM_NAMESPACE_SIZE."""
        return _number("JSM_NAMESPACE_SIZE")

    def global_rank(self) -> int:
        """JSM_NAMESPACE_RANK."""
        return _number("JSM_NAMESPACE_RANK")

    def local_rank(self) -> int:
        """JSM_NAMESPACE_LOCAL_RANK."""
        return _number("JSM_NAMESPACE_LOCAL_RANK")

    def node_rank(self) -> int:
        """The place of this host among those of the rank file, in the order of their first lines.

        Raises:
            MisconfigurationException: it is not among them.
        """
        hosts = list(dict.fromkeys(_hosts()))
        name = socket.gethostname()
        for candidate in (hosts, [host.split(".")[0] for host in hosts]):
            for known in (name, name.split(".")[0]):
                if known in candidate:
                    return candidate.index(known)
        raise MisconfigurationException(
            f"this host is {name!r}, which the file of LSB_DJOB_RANKFILE={os.environ.get('LSB_DJOB_RANKFILE')!r} does "
            f"not name among {', '.join(hosts)}: start the program with jsrun inside the job."
        )

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the user's settings with what jsrun has started.

        Raises:
            MisconfigurationException: they contradict each other, or jsrun's variables are missing.
        """
        missing = [name for name in _NEEDED if name not in os.environ]
        wrong = [_missing(missing)] if missing else []
        refuse([*wrong, *contradictions(TABLE["lsf"], os.environ, num_devices, num_nodes)])


def _number(name: str) -> int:
    if name not in os.environ:
        raise MisconfigurationException(_missing([name]))
    return number(os.environ, name, default=0)


def _missing(names: list[str]) -> str:
    return f"the environment lacks {', '.join(names)}: start the program with jsrun, which sets them."


def _hosts() -> list[str]:
    """One line for each slot, without that of the launching node."""
    path = os.environ.get("LSB_DJOB_RANKFILE", "")
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except OSError as error:
        raise MisconfigurationException(
            f"LSB_DJOB_RANKFILE={path!r} names the file with the hosts of the job, which cannot be read: {error}. "
            "Start the program with jsrun, on a file system that the hosts share."
        ) from error
    if len(lines) < 2:
        raise MisconfigurationException(
            f"LSB_DJOB_RANKFILE={path!r} holds {lines!r}: it should name the launching node and, after it, the hosts."
        )
    return lines[1:]
