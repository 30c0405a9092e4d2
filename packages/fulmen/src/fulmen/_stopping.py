"""Ending a fit from outside: a signal on any rank, and the point at which all ranks stop together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen import _requeue
from fulmen.exceptions import SIGTERMException
from fulmen_fabric import StopSignal, rank_zero_info
from fulmen_fabric.abilities import supports
from fulmen_fabric.preemption import say_that_the_program_handles, watched_signals
from fulmen_fabric.voting import new_name
from fulmen_protocols import SupportsRequeue

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence

    from fulmen.progress import Progress
    from fulmen.trainer import Trainer
    from fulmen_fabric import StopAgreement, World
    from fulmen_protocols import ClusterEnvironment

__all__ = ["Stopping"]

_QUEUE_AGAIN = ", which announces the end of the job"


class Stopping:
    """Turns a signal into a request to stop.

    One process stops at the next batch. Several agree at the next declared point, so that none is left waiting. The
    loop is left between two batches, with the running epoch open, so that a resumed run goes on with the very next one.
    Outside of a fit signals do what they did before.
    """

    def __init__(self, progress: Progress, world: World, environment: ClusterEnvironment) -> None:
        self._progress, self._world = progress, world
        self._environment = environment if supports(environment, SupportsRequeue) else None
        self._agreement: StopAgreement | None = None
        self._has_said = False
        self._suffix = ""
        self.signals = StopSignal(())
        """A context that watches for them; a new one after each ``begin``."""
        self.run_name = ""
        """With several ranks: the same on all of them, and new for each call of the trainer."""

    def begin(self, *, fitting: bool) -> None:
        """Forget the call before this one. The processes have met; every rank must come here."""
        self._agreement = None
        watched, bypassed = self._choose() if fitting else ((), ())
        alone = self._world.world_size == 1
        # A handler may come anywhere: it only sets flags.
        self.signals = StopSignal(watched, bypassed=bypassed, on_stop=self._stop if alone else None)
        if not alone:
            self._agreement = self._world.stop_agreement()
            self.run_name = new_name("run")

    def _choose(self) -> tuple[Sequence[signal.Signals], Sequence[signal.Signals]]:
        """Signals that stop a fit, and those that it outlives."""
        watched = watched_signals(self._environment)
        self._suffix = _QUEUE_AGAIN if watched.announces else ""
        if watched.taken is not None and not self._has_said:
            rank_zero_info(say_that_the_program_handles(watched.taken))
            self._has_said = True
        return watched.stopping, watched.bypassed

    def _stop(self, reason: str) -> None:
        self._progress.stop(reason, now=True)
        self._progress.replan = True  # leaves the loop as it is, without ending the epoch

    def agree(self) -> None:
        """A declared point: all ranks stop here, or none."""
        if self._agreement is None:
            return
        wish = self.signals.poll()
        if self._agreement.point(None if wish is None else wish + self._suffix):  # all ranks learn what the one meant
            self._stop(str(self._agreement.reason))

    @property
    def received_sigterm(self) -> bool:
        """Whether SIGTERM was the reason, here or on another rank."""
        reason = self.signals.reason or (self._agreement.reason if self._agreement is not None else None)
        return reason is not None and "SIGTERM" in reason

    def leave(self, trainer: Trainer) -> None:
        """Leave a fit that a signal ended, after saving it where the scheduler will run it again.

        Raises:
            PreemptedException: the job was queued again.
            SIGTERMException: SIGTERM ended the fit.
        """
        # Not progress.stop_reason: somebody else may have asked before, and waits for min_epochs.
        reason = self.signals.reason if self._agreement is None else self._agreement.reason
        if reason is None or not self._progress.stop_now:
            return
        if self._agreement is None:
            reason += self._suffix
        if self._environment is not None and reason.endswith(_QUEUE_AGAIN):
            _requeue.save_and_requeue(trainer, self._environment, reason)
        raise SIGTERMException(reason)
