"""A job that ends early: which signals say so, when all ranks stop, and how the scheduler runs the job again."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NamedTuple

from fulmen_fabric.abilities import supports
from fulmen_fabric.rank_zero import rank_zero_info
from fulmen_fabric.stopping import StopSignal
from fulmen_protocols import MisconfigurationRuntimeError, SupportsRequeue

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from fulmen_fabric.stopping import StopAgreement
    from fulmen_fabric.world import World

__all__ = ["PreemptionWatch", "WatchedSignals", "say_that_the_program_handles", "watched_signals"]


class WatchedSignals(NamedTuple):
    """What ends a run early, and what does not."""

    stopping: tuple[signal.Signals, ...]
    """Each is a reason to stop."""
    bypassed: tuple[signal.Signals, ...]
    """The run outlives these: the scheduler sends them beside its announcement."""
    announces: bool
    """Whether a stop means that the scheduler has announced the end of the job, and can run it again."""
    taken: signal.Signals | None
    """The announcement, where the program handles it itself, so that nothing is queued again."""


def watched_signals(environment: object) -> WatchedSignals:
    """SIGTERM, or what the scheduler of ``environment`` announces the end of a job with."""
    term = signal.SIGTERM
    number = environment.requeue_signal if supports(environment, SupportsRequeue) and environment.auto_requeue else None
    if number is None:
        return WatchedSignals((term,), (), announces=False, taken=None)
    # None, which is not SIG_DFL: there is a handler that was not installed from Python.
    if signal.getsignal(number) is not signal.SIG_DFL:
        return WatchedSignals((term,), (), announces=False, taken=number)
    return WatchedSignals((number,), () if number is term else (term,), announces=True, taken=None)


class PreemptionWatch:
    """Tells a loop when to save and leave, on every rank at the same step. A context: within it signals are watched.

        with fabric.preemption_watch() as watch:
            for batch in loader:
                ...
                if watch.should_stop():
                    fabric.save(path, state)
                    watch.requeue()
                    break

    Nothing is raised in the middle of a step, and nothing is communicated between ranks while nobody wants to stop.
    """

    def __init__(
        self,
        world: World,
        environment: object,
        *,
        signals: Sequence[signal.Signals] | None = None,
        max_time: timedelta | None = None,
    ) -> None:
        """Watch nothing yet. Every rank must make one.

        Args:
            world: whose ranks stop together; they have met.
            environment: the cluster's; asked what it announces the end of a job with, and to queue the job again.
            signals: each is a reason to stop; None: what ``environment`` announces, or SIGTERM.
            max_time: after this long it is time to stop, too; counts from entering the context.
        """
        self._environment = environment if supports(environment, SupportsRequeue) else None
        self._is_rank_zero = world.is_global_zero
        watched = watched_signals(environment)
        if signals is not None:
            watched = WatchedSignals(tuple(signals), (), announces=False, taken=None)
        elif watched.taken is not None:
            rank_zero_info(say_that_the_program_handles(watched.taken))
        self._announced = frozenset(watched.stopping if watched.announces else ())
        self._signals = StopSignal(watched.stopping, bypassed=watched.bypassed, max_time=max_time)
        self._agreement: StopAgreement = world.stop_agreement()
        self._is_requeued = False

    @property
    def reason(self) -> str | None:
        """Why the run stops, the same text on every rank; None until it does."""
        return self._agreement.reason

    @property
    def is_preempted(self) -> bool:
        """Whether it stops because the scheduler has announced the end of the job."""
        reason = self.reason
        return reason is not None and any(reason.endswith(f" {number.name}") for number in self._announced)

    def __enter__(self) -> PreemptionWatch:
        self._signals.install()
        return self

    def __exit__(self, *_: object) -> None:
        self._signals.restore()

    def should_stop(self) -> bool:
        """Whether to stop here. Every rank must ask at the same places of the program; True at the same one on all.

        In several processes each call costs two requests to the store, some 0.1 ms: ask every few steps.

        Raises:
            RankFailure: a rank began to stop and then fell silent.
        """
        return self._agreement.point(self._signals.poll())

    def requeue(self) -> bool:
        """Ask the scheduler to run this job again, if it has announced its end; once everything is saved.

        The scheduler may end the job at once. Rank 0 asks; the others return.

        Returns:
            Whether the job is queued again, on rank 0; elsewhere whether rank 0 has been told to ask.

        Raises:
            MisconfigurationRuntimeError: ``should_stop`` has not said to stop.
            RuntimeError: the scheduler refuses; the message says how to do it by hand.
        """
        if self.reason is None:
            raise MisconfigurationRuntimeError(
                "requeue() was called, but should_stop() has not said to stop. Ask it first, and save."
            )
        if not self.is_preempted or self._environment is None:
            return False
        if self._is_rank_zero and not self._is_requeued:
            self._environment.requeue()
            self._is_requeued = True
        return True


def say_that_the_program_handles(number: signal.Signals) -> str:
    """Why no job will be queued again."""
    return (
        f"{number.name} announces the end of this job, but the program has a handler for it already: that one stays, "
        f"and the job is not queued again. Remove it, or choose another signal as requeue_signal."
    )
