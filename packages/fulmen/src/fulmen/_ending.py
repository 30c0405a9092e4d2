"""The end of one call of a Trainer: everything given back and told, whether it went well or failed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from fulmen import _callbacks, _layer_sync, _loader_advice, _preparation, _run_log, _whereabouts
from fulmen.exceptions import PreemptedException, SIGTERMException
from fulmen.states import TrainerFn, TrainerStatus

if TYPE_CHECKING:
    from fulmen._metering import Metering
    from fulmen._session import Session
    from fulmen.hooks import HookBinder
    from fulmen.progress import Progress
    from fulmen.trainer import Trainer

__all__ = ["fail", "tear_down"]


def tear_down(trainer: Trainer, session: Session, metering: Metering, binder: HookBinder, *, has_run: bool) -> None:
    """Close what ``session`` has opened, call the last hooks, and wait for what is still being written."""
    fn = session.fn
    session.close_loaders()
    metering.finish()
    trainer.strategy.saving.finish()
    _layer_sync.revert(session)
    _preparation.give_back(session)
    if fn is TrainerFn.FITTING and has_run:
        for hook in binder.both("on_fit_end"):
            hook()
    session.call_everybodys("teardown", binder)
    _note_data_wait(trainer, session, says=has_run)
    _run_log.end(trainer, "success")
    if session.measuring.is_on:
        trainer.profiler.describe()
        trainer.profiler.teardown(fn.value)
    trainer.strategy.saving.close()
    _whereabouts.leave()


def fail(trainer: Trainer, session: Session, progress: Progress, error: BaseException) -> None:
    """Tell everybody that the run failed. The error itself goes on to the caller, with a note of where it happened."""
    trainer.state.status = TrainerStatus.INTERRUPTED
    _note_data_wait(trainer, session, says=isinstance(error, (KeyboardInterrupt, SIGTERMException, PreemptedException)))
    where = f"rank {trainer.world.rank}, epoch {progress.epoch}, batch {progress.batch}"
    error.add_note(f"fulmen: in {session.fn.value}, {where}, optimizer step {progress.updates}")
    _whereabouts.fail(error)
    if session.measuring.is_on:
        session.measuring.close()
        trainer.profiler.teardown(session.fn.value)
    for module in session.logging_modules():
        module.__dict__["_metric_store"] = None
    with suppress(RuntimeError):  # a device that failed cannot be read; the run's own error is what matters
        _layer_sync.revert(session)
        _preparation.give_back(session)
    _callbacks.tell_exception(trainer.callbacks, trainer, session.module, error)
    session.close_loaders()  # not before: callbacks save the position in the data
    if session.datamodule is not None:
        session.datamodule.on_exception(error)
    if not isinstance(error, PreemptedException):  # that run is finalized already
        _run_log.end(trainer, "failed", error)
    trainer.strategy.saving.close_after(error)
    trainer.state.stage = None


def _note_data_wait(trainer: Trainer, session: Session, *, says: bool) -> None:
    """Keep what the fit knows of its waits for data, and say if they were long, unless it failed or was a trial."""
    waits = session.data_waits
    if waits is None or session.fn is not TrainerFn.FITTING:
        return
    waits.end()
    trainer._data_wait = wait = trainer.data_wait  # pyright: ignore[reportPrivateUsage]
    if says and wait is not None and session.train_loader is not None and not trainer.fast_dev_run:
        _loader_advice.data_wait(wait, session.train_loader.loader, session.world)
