"""DataParallel: one process drives several GPUs; each forward pass copies the model to them and splits the batch.

Slower than DDP (one interpreter, a copy of the model in every step). For loops of one's own; the Trainer has no use
for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._module_init import created_on

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from fulmen_protocols.topology import Topology

__all__ = ["DataParallelStrategy"]


class DataParallelStrategy:
    """Splits each batch along its first dimension over the GPUs of this machine (``torch.nn.DataParallel``).

    There is one process, so there are no ranks: data are not split by a sampler, and collectives change nothing. What
    ``forward`` returns is gathered on the first device along its first dimension; a loss of shape ``()`` becomes one
    per device, to be averaged by the caller.
    """

    def __init__(self) -> None:
        self._devices: tuple[torch.device, ...] = ()
        self._device: torch.device | None = None

    @property
    def root_device(self) -> torch.device:
        """The first device, where batches go and outputs come from.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        if self._device is None:
            raise RuntimeError(
                "root_device of DataParallelStrategy is unknown until setup_environment has run: call it first."
            )
        return self._device

    def take_devices(self, devices: Sequence[torch.device]) -> None:
        """Take over all devices of this machine."""
        self._devices = tuple(devices)

    def setup_environment(self, topology: Topology) -> None:
        """Take the topology's device as the first.

        Raises:
            MisconfigurationException: the run has several processes, or a device is no GPU.
        """
        if topology.world_size > 1:
            raise MisconfigurationException(
                f"DataParallelStrategy runs in one process, but the run has {topology.world_size}: use strategy='ddp'."
            )
        devices = self._devices or (topology.device,)
        wrong = [str(device) for device in devices if device.type != "cuda"]
        if wrong:
            raise MisconfigurationException(
                f"DataParallelStrategy splits batches over GPUs, but the run has {', '.join(wrong)}: "
                "use strategy='ddp'."
            )
        self._devices, self._device = devices, topology.device

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Create modules on the first device."""
        return created_on(self.root_device, empty=empty)

    def place(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the first device in place and wrap it."""
        entry = _Entry(module.to(self.root_device))
        placed = nn.DataParallel(entry, device_ids=list(self._devices))
        placed.register_forward_pre_hook(entry.call.take_over_autocast)
        return placed

    def bind_method(self, placed: nn.Module, name: str) -> Callable[..., object]:
        """The original module's method ``name``, run on every device with its part of the arguments."""
        if not isinstance(placed, nn.DataParallel):
            return placed if name == "forward" else getattr(placed, name)
        call = cast("_Entry", placed.module).call

        def run_on_parts(*args: object, **kwargs: object) -> object:
            call.method = name
            try:
                return placed(*args, **kwargs)
            finally:
                call.method = "forward"

        return run_on_parts

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``."""
        return optimizers

    def teardown(self) -> None:
        """Forget the device."""
        self._device = None


class _Call:
    """What all copies of an entry have to do in one call of DataParallel."""

    def __init__(self) -> None:
        self.method = "forward"
        self.autocast_dtype = torch.float16

    def take_over_autocast(self, *_: object) -> None:
        """Note the caller's dtype. DataParallel's threads have their own, float16, whatever the caller's is."""
        self.autocast_dtype = torch.get_autocast_dtype("cuda")


class _Entry(nn.Module):
    """Runs a method of ``module`` by name: what DataParallel calls is a copy of this, with a copy of ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.call = _Call()  # one for all copies

    def forward(self, *args: object, **kwargs: object) -> object:
        name = self.call.method
        # Whether to cast at all DataParallel does tell its threads.
        with torch.autocast("cuda", self.call.autocast_dtype, torch.is_autocast_enabled("cuda")):
            return self.module(*args, **kwargs) if name == "forward" else getattr(self.module, name)(*args, **kwargs)
