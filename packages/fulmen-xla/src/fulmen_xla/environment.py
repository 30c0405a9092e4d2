"""XLAEnvironment: what the PJRT runtime tells a process about its place."""

from __future__ import annotations

import os

from fulmen_protocols.errors import MisconfigurationException
from fulmen_xla import _replica
from fulmen_xla._library import library, require

__all__ = ["XLAEnvironment"]


class XLAEnvironment:
    """Asks torch-xla's runtime for ranks; before the launcher has started the replicas, there is one process, rank 0.

    It is used by the strategies of several replicas, and never detected: on a TPU host one may train on the CPU, too.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
    """

    def __init__(self) -> None:
        require("XLAEnvironment")

    @property
    def creates_processes_externally(self) -> bool:
        """False: the launcher does, on each host."""
        return False

    @property
    def main_address(self) -> str:
        """The host of rank 0: the runtime's own, MASTER_ADDR, or this one. The runtime itself needs none."""
        if _replica.is_running() and library("runtime").device_type() == "TPU":
            return str(library("runtime").get_master_ip())
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """MASTER_PORT, or 12355, which is where torch-xla's own process group meets.

        Raises:
            MisconfigurationException: MASTER_PORT is no number.
        """
        text = os.environ.get("MASTER_PORT", "12355")
        if not text.isdecimal():
            raise MisconfigurationException(f"MASTER_PORT={text!r} is not a port. Set a number, or nothing.")
        return int(text)

    @staticmethod
    def detect() -> bool:
        """False: the strategy that needs it brings it."""
        return False

    def world_size(self) -> int:
        """Number of replicas on all hosts; 1 before they have started."""
        return int(library("runtime").world_size()) if _replica.is_running() else 1

    def global_rank(self) -> int:
        """Index among all replicas."""
        return int(library("runtime").global_ordinal()) if _replica.is_running() else 0

    def local_rank(self) -> int:
        """Index among the replicas of this host."""
        return int(library("runtime").local_ordinal()) if _replica.is_running() else 0

    def node_rank(self) -> int:
        """Index of this host: the runtime's, or TPU_WORKER_ID, which tells before it has started."""
        if _replica.is_running():
            return int(library("runtime").host_index())
        text = os.environ.get("TPU_WORKER_ID", "0")
        return int(text) if text.isdecimal() else 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the number of hosts with the runtime's.

        Raises:
            MisconfigurationException: they differ.
        """
        hosts = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
        if len(hosts) > 1 and len(hosts) != num_nodes:
            raise MisconfigurationException(
                f"num_nodes={num_nodes}, but TPU_WORKER_HOSTNAMES names {len(hosts)} hosts: set num_nodes={len(hosts)}."
            )
