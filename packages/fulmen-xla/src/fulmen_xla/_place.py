"""Where a strategy stands: the XLA device of this process, and the replicas that it is one of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from fulmen_protocols.errors import MisconfigurationException
from fulmen_xla._library import library, platform
from fulmen_xla._modes import require_no_spmd
from fulmen_xla._placing import Moves
from fulmen_xla._random import register, seed_like_torch
from fulmen_xla.collectives import XLACollectives
from fulmen_xla.loader import XLADeviceLoader

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import nn
    from torch.optim import Optimizer

    from fulmen_protocols.topology import Topology

__all__ = ["DevicePlace", "Replicas", "too_early"]

_REPORTS = "PT_XLA_DEBUG"


class DevicePlace:
    """A strategy's hold on its device, from ``take`` to ``leave``: what it moves there, and how batches get there.

    Args:
        owner: the strategy's class, for messages.
        reports: let torch-xla tell what it compiles, and why, as long as the place is taken.
    """

    def __init__(self, owner: str, *, reports: bool = False) -> None:
        self._owner = owner
        self._wants_reports = reports
        self._has_set_variable = False
        self._device: torch.device | None = None
        self._moves = Moves()

    @property
    def device(self) -> torch.device:
        """The device.

        Raises:
            RuntimeError: the place is not taken.
        """
        if self._device is None:
            raise too_early(self._owner, "root_device")
        return self._device

    def take(self, device: torch.device | None = None) -> None:
        """Stand on ``device``, or on the one that the runtime gives this process, which opens it."""
        register()
        if self._wants_reports and _REPORTS not in os.environ:  # the user's own value stays
            os.environ[_REPORTS] = "1"
            self._has_set_variable = True
        self._device = cast("torch.device", library().device()) if device is None else device
        seed_like_torch()

    def leave(self) -> None:
        """Let go of the device. May be called twice."""
        if self._has_set_variable:
            os.environ.pop(_REPORTS, None)
            self._has_set_variable = False
        self._device = None

    def move(self, module: nn.Module) -> nn.Module:
        """Move ``module`` to the device in place and return it; what shared a parameter still does."""
        return self._moves.move(module, self.device)

    def follow(self, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """Return ``optimizers``; those made from a module before it was moved now hold the parameters it has now."""
        self._moves.follow(optimizers)
        return optimizers

    def uploading(self, loader: Iterable[object], *, sharding: object = None) -> Iterable[object]:
        """``loader`` with its batches on the device, uploaded while that computes."""
        if isinstance(loader, XLADeviceLoader):
            return loader
        return XLADeviceLoader(loader, self.device, input_sharding=sharding)


class Replicas:
    """The replicas of a run, one a process, each on a device of its own.

    Args:
        owner: the strategy's class, for messages.
        strategy: its name, for messages.
        place: where this replica stands.
    """

    def __init__(self, owner: str, strategy: str, place: DevicePlace) -> None:
        self._owner = owner
        self._strategy = strategy
        self._place = place
        self._collectives: XLACollectives | None = None

    @property
    def collectives(self) -> XLACollectives:
        """Communication among them.

        Raises:
            RuntimeError: they have not met.
        """
        if self._collectives is None:
            raise too_early(self._owner, "collectives")
        return self._collectives

    def meet(self, topology: Topology) -> None:
        """Open this replica's device and see that the runtime counts as the run does.

        Raises:
            MisconfigurationException: it does not, or this process already drives its devices as one.
        """
        require_no_spmd(self._strategy)
        self._place.take()
        self._collectives = XLACollectives()
        if self._collectives.world_size != topology.world_size:
            raise MisconfigurationException(
                f"strategy {self._strategy!r} was asked to run in {topology.world_size} processes, but PJRT's "
                f"{platform()} runtime counts {self._collectives.world_size} replicas. Use devices='auto' and the "
                "right num_nodes."
            )

    def part(self) -> None:
        """Let go of the device. May be called twice."""
        self._place.leave()
        self._collectives = None


def too_early(owner: str, name: str) -> RuntimeError:
    """The error for whoever asks for ``name`` of a strategy that stands nowhere yet."""
    return RuntimeError(f"{name} of {owner} is unknown until setup_environment has run: call it first.")
