"""What the kits have that start processes of their own."""

from __future__ import annotations

import pytest
import torch

from fulmen_conformance._kit import Kit

__all__ = ["KitOfProcesses"]


class KitOfProcesses(Kit):
    """A kit some of whose tests run on every rank of a world."""

    @pytest.fixture
    def num_processes(self) -> int:
        """Number of processes to start."""
        return 2

    @pytest.fixture
    def device(self) -> torch.device:
        """Where the backend computes. Without an index, rank i gets device i (CPU: all share it)."""
        return torch.device("cpu")

    @pytest.fixture
    def timeout_s(self) -> float:
        """Seconds without any progress after which the processes count as hung."""
        return 60.0
