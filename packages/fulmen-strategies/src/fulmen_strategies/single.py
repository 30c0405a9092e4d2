"""One process, one device: the base protocol and nothing else, so that a batch pays nothing for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._module_init import created_on

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.optim import Optimizer

    from fulmen_protocols.topology import Topology

__all__ = ["SingleDeviceStrategy"]


class SingleDeviceStrategy:
    """Trains on one device; the placed module is the module itself.

    Args:
        device: where to train. ``None``: the device that the run's topology names.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._asked = None if device is None else torch.device(device)
        self._device: torch.device | None = self._asked

    @property
    def root_device(self) -> torch.device:
        """The device of this process.

        Raises:
            RuntimeError: no device was given, and ``setup_environment`` has not run yet.
        """
        if self._device is None:
            raise RuntimeError(
                "the device of SingleDeviceStrategy() is unknown until setup_environment has run. "
                "Call it first, or name a device: SingleDeviceStrategy('cpu')."
            )
        return self._device

    def setup_environment(self, topology: Topology) -> None:
        """Take the topology's device unless one was given.

        Raises:
            MisconfigurationException: the run has more than one process.
        """
        if topology.world_size > 1:
            raise MisconfigurationException(
                f"SingleDeviceStrategy runs in one process, but the run has {topology.world_size}: "
                "use strategy='ddp', or devices=1 and num_nodes=1."
            )
        self._device = topology.device if self._asked is None else self._asked

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Create modules on the device; with ``empty`` without initialising them."""
        return created_on(self.root_device, empty=empty)

    def place(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the device in place and return it."""
        return module.to(self.root_device)

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``."""
        return optimizers

    def teardown(self) -> None:
        """Forget the topology's device."""
        self._device = self._asked
