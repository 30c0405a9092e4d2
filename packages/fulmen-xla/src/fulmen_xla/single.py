"""One process, one XLA device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fulmen_protocols.errors import MisconfigurationException
from fulmen_xla import _limits
from fulmen_xla._arguments import parts_of
from fulmen_xla._library import require
from fulmen_xla._modes import require_no_spmd
from fulmen_xla._place import DevicePlace
from fulmen_xla._placing import created_on_host, step
from fulmen_xla.checkpoint_io import XLACheckpointIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.optim import Optimizer

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.precision import Precision, PrecisionPlan
    from fulmen_protocols.strategy import StrategyParts
    from fulmen_protocols.topology import Topology

__all__ = ["SingleDeviceXLAStrategy"]


class SingleDeviceXLAStrategy:
    """Trains on one XLA device; the placed module is the module itself.

    Forward, backward and update of a batch are recorded and run as one program, which is compiled when its shapes are
    first seen: batches of equal shape are fast, others compile again.

    Args:
        device: an index or a device; None: the one that the run's topology names.
        accelerator: as the Trainer's argument.
        checkpoint_io: writes checkpoints; None: ``XLACheckpointIO``.
        precision: an ``XLAPrecision``; ``precision_plugin`` is its other name.
        precision_plugin: see there.
        debug: let torch-xla report what it compiles, and why (PT_XLA_DEBUG).

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
    """

    drives = "xla"
    allows_inference_mode = False  # XLA tensors keep a version counter, which inference tensors have not

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        debug: bool = False,
    ) -> None:
        require("SingleDeviceXLAStrategy")
        asked = torch.device("xla", device) if isinstance(device, int) else device
        self._asked = None if asked is None else torch.device(asked)
        if self._asked is not None:
            _limits.check_devices("SingleDeviceXLAStrategy", [self._asked])
        self.debug = debug
        self._parts = parts_of("SingleDeviceXLAStrategy", accelerator, None, checkpoint_io, precision, precision_plugin)
        self._place = DevicePlace("SingleDeviceXLAStrategy", reports=debug)

    @property
    def parts(self) -> StrategyParts:
        """What the user gave."""
        return self._parts

    def own_environment(self) -> None:
        """Whatever is detected: there is one process."""

    def own_precision(self, name: str) -> Precision:
        """``XLAPrecision`` of that name."""
        return _limits.own_precision("single_xla", name)

    def own_checkpoint_io(self) -> CheckpointIO:
        """``XLACheckpointIO``."""
        return XLACheckpointIO()

    def check_precision(self, plan: PrecisionPlan) -> None:
        """Refuse a precision that scales losses, or is none of XLA's."""
        _limits.check_plan("single_xla", plan)

    def check_world(self, devices: Sequence[torch.device], num_nodes: int) -> None:
        """Refuse devices of another kind."""
        _limits.check_devices("single_xla", devices)

    @property
    def root_device(self) -> torch.device:
        """The device of this process.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._place.device

    def setup_environment(self, topology: Topology) -> None:
        """Take the topology's device unless one was given.

        Raises:
            MisconfigurationException: the run has several processes, or this process already drives its devices as one.
        """
        if topology.world_size > 1:
            raise MisconfigurationException(
                f"SingleDeviceXLAStrategy runs in one process, but the run has {topology.world_size}: use "
                "strategy='xla', or devices=1 and num_nodes=1."
            )
        require_no_spmd("single_xla")
        self._place.take(topology.device if self._asked is None else self._asked)

    def module_context(self, *, empty: bool) -> AbstractContextManager[object]:
        """Create modules on the host, from where ``place`` takes them; with ``empty`` without initialising them."""
        return created_on_host(empty=empty)

    def place(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the device in place and return it; what shared a parameter still does."""
        return self._place.move(module)

    def prepare_optimizers(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``; those made before ``place`` now hold the parameters on the device."""
        return self._place.follow(optimizers)

    def optimizer_step(
        self, optimizer: Optimizer, module: nn.Module | None, closure: Callable[[], object] | None = None
    ) -> object:
        """Step, and run what was recorded."""
        return step(optimizer, closure)

    def process_loader(self, loader: Iterable[object]) -> Iterable[object]:
        """Upload batches while the device computes."""
        return self._place.uploading(loader)

    def teardown(self) -> None:
        """Forget the topology's device."""
        self._place.leave()
