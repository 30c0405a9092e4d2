"""Where this process stands in a run of several: its device and its group, for every strategy that has ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from fulmen_strategies._process_group import ProcessGroupMembership
from fulmen_strategies.collectives import TorchCollectives
from fulmen_strategies.launchers._rank import become_rank

if TYPE_CHECKING:
    import torch

    from fulmen_protocols.topology import Topology

__all__ = ["DEFAULT_TIMEOUT", "OnRanks", "RankPlace"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""After which a rank that waits for others in a collective gives up, unless the user says otherwise."""


class RankPlace:
    """A strategy's part in the process group: taken in ``setup_environment``, given up in ``teardown``.

    Args:
        owner: the strategy's name, for messages.
        backend: of the process group; ``None``: torch's default for the device.
        timeout: of its collectives; ``None``: ``DEFAULT_TIMEOUT``.
        hint: what messages add for users who come too early.
    """

    def __init__(self, owner: str, backend: str | None, timeout: timedelta | None, *, hint: str = "") -> None:
        self._owner = owner
        self._backend = backend
        self._timeout = DEFAULT_TIMEOUT if timeout is None else timeout
        self._hint = hint
        self._membership = ProcessGroupMembership()
        self._device: torch.device | None = None
        self._collectives: TorchCollectives | None = None

    @property
    def device(self) -> torch.device:
        """The device of this process.

        Raises:
            RuntimeError: the place is not taken.
        """
        if self._device is None:
            raise self.too_early("root_device")
        return self._device

    @property
    def collectives(self) -> TorchCollectives:
        """Communication among all ranks of the run.

        Raises:
            RuntimeError: the place is not taken.
        """
        if self._collectives is None:
            raise self.too_early("collectives")
        return self._collectives

    def too_early(self, name: str) -> RuntimeError:
        """The error for whoever asks for ``name`` of the strategy before there are processes."""
        return RuntimeError(
            f"{name} of {self._owner} is unknown until setup_environment has run: call it first.{self._hint}"
        )

    def take(self, topology: Topology) -> None:
        """Join the process group, or take over the one that exists. Calling it again changes nothing.

        Raises:
            MisconfigurationException: an existing group has another rank or size than ``topology``.
            BackendUnavailable: this build of torch lacks the backend.
        """
        become_rank()  # a run may leave the launcher out where the processes exist already
        self._membership.join(topology, self._backend, self._timeout)
        self._device = topology.device
        self._collectives = TorchCollectives(topology.device)

    def meet(self) -> None:
        """Wait for all ranks when groups of some of them have been made; see ``ProcessGroupMembership.meet``."""
        self._membership.meet()

    def leave(self) -> None:
        """Leave the process group if this place has made it. May be called twice."""
        self._membership.leave()
        self._collectives = None
        self._device = None


class OnRanks:
    """What a strategy that has ranks shows of its place among them."""

    _rank: RankPlace

    @property
    def root_device(self) -> torch.device:
        """The device of this process.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._rank.device

    @property
    def collectives(self) -> TorchCollectives:
        """Communication among all ranks of the run, whatever their place on a mesh.

        Raises:
            RuntimeError: ``setup_environment`` has not run yet.
        """
        return self._rank.collectives
