"""The environment of a pod of a Kubeflow PyTorchJob."""

from __future__ import annotations

import os

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies.environments._table import TABLE, contradictions, number, port, refuse

__all__ = ["KubeflowEnvironment"]

_NEEDED = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


class KubeflowEnvironment:
    """Reads what the operator tells each pod, which runs one process: ``devices=1, num_nodes=`` the number of pods.

    It is never detected, because other starters set the same variables: pass ``plugins=KubeflowEnvironment()``. Where a
    pod runs torchrun, nothing is needed.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """True: the operator has started a pod for each process."""
        return True

    @property
    def main_address(self) -> str:
        """MASTER_ADDR."""
        return _get("MASTER_ADDR")

    @property
    def main_port(self) -> int:
        """MASTER_PORT."""
        _get("MASTER_PORT")
        return port(os.environ, "MASTER_PORT", default=0)

    @staticmethod
    def detect() -> bool:
        """False: it has to be passed."""
        return False

    def world_size(self) -> int:
        """WORLD_SIZE."""
        _get("WORLD_SIZE")
        return number(os.environ, "WORLD_SIZE", default=1)

    def global_rank(self) -> int:
        """RANK."""
        _get("RANK")
        return number(os.environ, "RANK", default=0)

    def local_rank(self) -> int:
        """0: a pod runs one process."""
        return 0

    def node_rank(self) -> int:
        """RANK: every process has a pod of its own."""
        return self.global_rank()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the user's settings with the job's.

        Raises:
            MisconfigurationException: they contradict each other, or variables of the job are missing.
        """
        missing = [name for name in _NEEDED if name not in os.environ]
        wrong = [_missing(missing)] if missing else []
        if num_devices != 1:
            wrong.append(
                f"devices={num_devices}, but KubeflowEnvironment has one process in each pod: set devices=1 and "
                "num_nodes= the number of pods, or have each pod run torchrun and pass no environment."
            )
        refuse([*wrong, *contradictions(TABLE["kubeflow"], os.environ, num_devices, num_nodes)])


def _get(name: str) -> str:
    if name not in os.environ:
        raise MisconfigurationException(_missing([name]))
    return os.environ[name]


def _missing(names: list[str]) -> str:
    return f"the environment lacks {', '.join(names)}, which a PyTorchJob sets in each pod: run the program in one."
