"""The environment of a process that torchrun (torch.distributed.run) has started."""

from __future__ import annotations

import os

from fulmen_strategies.environments._table import TABLE, contradictions, number, port, refuse

__all__ = ["TorchElasticEnvironment"]


class TorchElasticEnvironment:
    """Reads what torchrun's agent tells each worker.

    For restarts over several nodes start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: otherwise the agents'
    store still holds the dead workers' addresses, and about half of the restarts fail or hang
    (pytorch/pytorch#135712). On one node fulmen's strategies keep the attempts apart by themselves.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """True."""
        return True

    @property
    def main_address(self) -> str:
        """MASTER_ADDR."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """MASTER_PORT."""
        return port(os.environ, "MASTER_PORT", default=12910)

    @staticmethod
    def detect() -> bool:
        """Whether torchrun has started this process, by the test of ``torch.distributed.is_torchelastic_launched``."""
        return "TORCHELASTIC_RUN_ID" in os.environ

    def world_size(self) -> int:
        """WORLD_SIZE."""
        return number(os.environ, "WORLD_SIZE", default=1)

    def global_rank(self) -> int:
        """RANK."""
        return number(os.environ, "RANK", default=0)

    def local_rank(self) -> int:
        """LOCAL_RANK."""
        return number(os.environ, "LOCAL_RANK", default=0)

    def node_rank(self) -> int:
        """GROUP_RANK: the index of this worker's agent."""
        return number(os.environ, "GROUP_RANK", default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the user's settings with what torchrun has started.

        Raises:
            MisconfigurationException: they contradict each other; the message has all contradictions.
        """
        refuse(contradictions(TABLE["torchrun"], os.environ, num_devices, num_nodes))
