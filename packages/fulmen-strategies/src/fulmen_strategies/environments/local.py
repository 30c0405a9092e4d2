"""The environment of a program that nobody but its user, or fulmen's own launcher, has started."""

from __future__ import annotations

import os
import socket
from functools import cache

import torch.distributed as dist

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._marks import LAUNCHED, process_exists
from fulmen_strategies.environments._table import TABLE, Row, attempt, contradictions, is_launched, number, port, refuse

__all__ = ["LightningEnvironment"]


class LightningEnvironment:
    """A plain program: ``python train.py``, on each node once.

    Several nodes need MASTER_ADDR, MASTER_PORT and NODE_RANK (or GROUP_RANK) on each; one node needs nothing.
    The name is Lightning's.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """Whether this process is one of several that have been started already."""
        return is_launched(os.environ, os.getppid(), process_exists)

    @property
    def main_address(self) -> str:
        """MASTER_ADDR, else this machine."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """MASTER_PORT, else STANDALONE_PORT, else a free port, the same one for every run of this process."""
        if "MASTER_PORT" in os.environ or "STANDALONE_PORT" in os.environ:
            return port(os.environ, "MASTER_PORT", "STANDALONE_PORT", default=0)
        return _free_port()

    @staticmethod
    def detect() -> bool:
        """True: it is the last resort, to be asked after every other."""
        return True

    def world_size(self) -> int:
        """WORLD_SIZE where the processes exist, else 1."""
        return number(os.environ, "WORLD_SIZE", default=1) if self.creates_processes_externally else 1

    def global_rank(self) -> int:
        """RANK where the processes exist, or what NODE_RANK and LOCAL_RANK amount to; 0 where they do not."""
        if not self.creates_processes_externally:
            return 0
        if "RANK" in os.environ:
            return number(os.environ, "RANK", default=0)
        if self.node_rank() == 0:
            return self.local_rank()
        if "LOCAL_WORLD_SIZE" not in os.environ:
            raise MisconfigurationException(
                f"the environment has NODE_RANK={self.node_rank()} and LOCAL_RANK={self.local_rank()}, from which no "
                "global rank follows: set RANK or LOCAL_WORLD_SIZE too."
            )
        return self.node_rank() * number(os.environ, "LOCAL_WORLD_SIZE", default=1) + self.local_rank()

    def local_rank(self) -> int:
        """LOCAL_RANK where the processes exist, else 0."""
        return number(os.environ, "LOCAL_RANK", default=0) if self.creates_processes_externally else 0

    def node_rank(self) -> int:
        """NODE_RANK, else GROUP_RANK, else 0."""
        return number(os.environ, "NODE_RANK", "GROUP_RANK", default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the user's settings with the environment.

        Raises:
            MisconfigurationException: they contradict each other, or a run of several nodes lacks what it needs.
        """
        processes = num_devices * num_nodes
        if LAUNCHED in os.environ and processes == 1:
            return  # each rank of a launched program may do something on its own, a test on one device say
        wrong: list[str] = []
        if self.creates_processes_externally or num_nodes > 1:
            row = TABLE["local"] if self.creates_processes_externally else TABLE["local"]._replace(local_rank=())
            wrong += contradictions(row, os.environ, num_devices, num_nodes)
        else:
            wrong += contradictions(_ONE_NODE, os.environ, num_devices, num_nodes)
        if self.creates_processes_externally and "RANK" not in os.environ:
            rank = attempt(self.global_rank, wrong)
            if rank is not None and rank >= processes:
                wrong.append(
                    f"the environment has LOCAL_RANK={self.local_rank()} and NODE_RANK={self.node_rank()}, which make "
                    f"RANK={rank}; it must be below WORLD_SIZE={processes}: make them agree."
                )
        # Of a process that has met the others already, whoever they are, the group tells the rank.
        left_over = "LOCAL_RANK" in os.environ and LAUNCHED not in os.environ and not _is_in_a_group()
        if left_over and not self.creates_processes_externally and processes > 1:
            wrong.append(
                f"devices={num_devices} and num_nodes={num_nodes} make {processes} processes, and the environment "
                f"has LOCAL_RANK={os.environ['LOCAL_RANK']!r} without WORLD_SIZE: unset LOCAL_RANK to have the "
                "processes started, or set WORLD_SIZE too if they exist already."
            )
        if num_nodes > 1:
            wrong += _missing_meeting_point(num_nodes)
        refuse(wrong)


def _is_in_a_group() -> bool:
    return dist.is_available() and dist.is_initialized()


_ONE_NODE = Row("the environment", (), (), (), TABLE["local"].node_rank)


def _missing_meeting_point(num_nodes: int) -> list[str]:
    """Without these every node would take itself for the first one and wait for others that never come."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not any(name in os.environ for name in TABLE["local"].node_rank):
        missing.append("NODE_RANK")
    if not missing:
        return []
    return [
        f"num_nodes={num_nodes}, but the environment lacks {', '.join(missing)}: set them on every node, or start "
        "the program by torchrun or fulmen run."
    ]


@cache
def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
