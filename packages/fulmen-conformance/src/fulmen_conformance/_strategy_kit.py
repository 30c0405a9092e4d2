"""What the tests of a strategy start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch

from fulmen_conformance._processes import KitOfProcesses
from fulmen_conformance._reference import free_port
from fulmen_protocols import Strategy, Topology

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["StrategyKit"]


class StrategyKit(KitOfProcesses):
    """A strategy, and the place of its only process."""

    @pytest.fixture
    def strategy(self) -> Strategy:
        """The strategy under test, new for each test, before ``setup_environment``."""
        raise NotImplementedError("define a fixture `strategy` that returns the strategy under test")

    @pytest.fixture
    def tolerance(self) -> float:
        """How far weights may be from those of plain PyTorch on this device, absolute (relative above 1).

        0.0: not at all. More is for a device whose compiler fuses the steps of a loop, and so rounds plain PyTorch's in
        another way than those of a run that starts a program for each.
        """
        return 0.0

    @pytest.fixture
    def kit_topology(self, device: torch.device) -> Topology:
        """The place of the only process of a run. Not to be replaced."""
        if device.type != "cpu" and cast("int | None", device.index) is None:
            device = torch.device(device.type, 0)
        return Topology(devices=(device,), main_port=free_port())

    @pytest.fixture
    def kit_ready(self, strategy: Strategy, kit_topology: Topology) -> Iterator[Strategy]:
        """The strategy between ``setup_environment`` and ``teardown``. Not to be replaced."""
        strategy.setup_environment(kit_topology)
        yield strategy
        strategy.teardown()
