"""Ending a fit from outside: a signal on any rank, and the point at which all ranks stop together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.exceptions import SIGTERMException
from fulmen_fabric import StopAgreement, StopSignal
from fulmen_fabric.stopping import group_store

if TYPE_CHECKING:
    from fulmen.progress import Progress
    from fulmen_fabric import World

__all__ = ["Stopping"]


class Stopping:
    """Turns a signal into a request to stop.

    One process stops at the next batch. Several agree at the next declared point, so that none is left waiting.
    """

    def __init__(self, progress: Progress, world: World) -> None:
        self._progress, self._world = progress, world
        self._agreement: StopAgreement | None = None
        self._calls = 0
        self.signals = StopSignal()
        """A context that watches for them; a new one after each ``begin``."""

    def begin(self) -> None:
        """Forget the call before this one. The processes have met; every rank must come here."""
        self._agreement = None
        if self._world.world_size == 1:
            self.signals = StopSignal(on_stop=lambda reason: self._progress.stop(reason, now=True))
            return
        self._calls += 1
        self._agreement = StopAgreement(
            group_store(), self._world.rank, self._world.world_size, name=f"fulmen/stop/{self._calls}"
        )
        self.signals = StopSignal()

    def agree(self) -> None:
        """A declared point: all ranks stop here, or none."""
        if self._agreement is not None and self._agreement.point(self.signals.poll()):
            self._progress.stop(str(self._agreement.reason), now=True)

    @property
    def received_sigterm(self) -> bool:
        """Whether SIGTERM was the reason, here or on another rank."""
        reason = self.signals.reason or (self._agreement.reason if self._agreement is not None else None)
        return reason is not None and "SIGTERM" in reason

    def raise_if_terminated(self) -> None:
        """Leave a fit that a signal ended.

        Raises:
            SIGTERMException: it did.
        """
        if self._progress.stop_now and self.received_sigterm:
            raise SIGTERMException(str(self._progress.stop_reason))
