"""One fit: the parts that ``fit.py`` runs with, its plan, and what happens right before and after the loop."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from fulmen import _exact_state, _verify
from fulmen._batch_steps import compose_batch_steps
from fulmen._loader_advice import log_interval
from fulmen._planning import make_plan
from fulmen._raw_batches import hook_of_raw
from fulmen._run_loaders import train_loader
from fulmen._schedules import as_it_is, plain_schedule, watching_schedule
from fulmen._session import unchanged
from fulmen._uneven import Borrowing
from fulmen.fit import FitParts, end_epoch
from fulmen.plan import Plan
from fulmen.states import RunningStage
from fulmen_fabric import rank_zero_info

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen._evaluation import Evaluation
    from fulmen._metering import Metering
    from fulmen._session import Session
    from fulmen._stopping import Stopping
    from fulmen.fit import Batches
    from fulmen.hooks import FitHooks, HookBinder
    from fulmen.metrics import MetricStore
    from fulmen.progress import Progress
    from fulmen.settings import Settings
    from fulmen.states import TrainerState

__all__ = ["Training"]


class Training:
    """The training of one call.

    Args:
        session: what is trained.
        settings: asked for whenever they are needed, since users change them during a run.
        evaluation: validates when the loop says so.
        metering: where metrics go, and who knows what schedulers watch.
        progress: where the run is; changed by the loop, read here.
        state: told which stage is running.
        stopping: lets ranks agree to stop, at every row and at the end of every epoch.
    """

    def __init__(
        self,
        session: Session,
        settings: Callable[[], Settings],
        evaluation: Evaluation,
        metering: Metering,
        progress: Progress,
        state: TrainerState,
        stopping: Stopping,
    ) -> None:
        self._session, self._settings, self._evaluation = session, settings, evaluation
        self._metering, self._progress = metering, progress
        self._state, self._stopping = state, stopping
        self._loader = train_loader(session, settings())
        self._has_started = False
        self._plan = Plan()
        rounds = self._loader.rounds
        self._borrowing = None if rounds is None else Borrowing(session, rounds)

    def compose(self, binder: HookBinder) -> tuple[FitParts, FitHooks]:
        """The loop's parts and hooks, from what callbacks, module and user have set so far."""
        session, settings, progress, metering = self._session, self._settings(), self._progress, self._metering
        measuring = session.measuring
        self._evaluation.binder = binder
        hooks = binder.fit(before_watching=(metering.reduce_train,))
        raw = self._loader.raw is not None
        if raw:
            hooks = _told_of_fetched(hooks)
        own_schedule = next(iter(binder.of_module("lr_scheduler_step")), None)
        schedule = schedule_on_metric = None
        measured = as_it_is  # of_module measures the user's own
        if own_schedule is None:
            measured = partial(measuring.hook, session.module, "lr_scheduler_step")
        if session.module.automatic_optimization:
            schedule = plain_schedule(session.schedulers, progress, own_schedule, measured)
            schedule_on_metric = watching_schedule(
                session.schedulers, progress, own_schedule, lambda: metering.reporter.callback_metrics, measured
            )
        validates_by_time = isinstance(settings.val_check_interval, timedelta)
        steps = compose_batch_steps(
            session,
            binder,
            progress,
            accumulate=settings.accumulate_grad_batches,
            clip_val=settings.gradient_clip_val,
            clip_algorithm=settings.gradient_clip_algorithm,
            keep_outputs=bool(hooks.on_train_batch_end),
        )
        parts = FitParts(
            step=steps.step,
            accumulate=steps.accumulate,
            updates=steps.updates,
            transfer=unchanged_batch if raw else _starting(metering.train, session.transfer(), self._borrowing),
            schedule=schedule,
            schedule_on_metric=schedule_on_metric,
            log=measuring.part("logging", self._log_step if measuring.row is None else self._log_step_and_times),
            end_batch=self._sync_step if metering.train.may_sync_steps else None,
            end_epoch=self._end_epoch,
            log_epoch=measuring.part("logging", metering.log_train_epoch),
            close_epoch=self._close_epoch,
            validate=measuring.part("validation", self._evaluation.validate),
            last_validation_s=self._evaluation.last_validation_s if validates_by_time else None,
        )
        return parts, hooks

    def load(self) -> None:
        """Ask the user for the training loader; now its length is known."""
        self._session.measuring.action("setup_train_dataloader", self._loader.setup)(self._progress.epoch)

    def make_plan(self) -> Plan:
        """The plan, from what the user has set so far and the length of the loader.

        Raises:
            MisconfigurationException: validation would never run.
        """
        settings = self._settings()
        self._plan = make_plan(settings, batches=self._loader.batches, validates=self._evaluation.validates)
        if self._metering.reporter.loggers and not settings.fast_dev_run and self._loader.batches > 0:
            log_interval(self._loader.batches, settings.log_every_n_steps, self._session.said)
        if self._loader.rounds is not None:
            self._loader.rounds.window = settings.accumulate_grad_batches
        if self._session.forward_only:
            # The epoch's last batch counts as a step all the same: what it leaves is new, and gets its checkpoint.
            self._plan = replace(self._plan, accumulate=sys.maxsize)
        return self._plan

    def begin(self, binder: HookBinder, parts: FitParts, hooks: FitHooks) -> None:
        """Go back to where a resumed run was, and tell everybody that training starts, unless nothing is left to do.

        Of an epoch whose end was being told when the run was saved nobody hears again: the next one starts.
        """
        session = self._session
        self._state.stage = RunningStage.TRAINING
        if self._plan.validates and "val" not in session.eval_loaders:
            self._evaluation.loaders("val")
        if session.resumed is not None:
            _exact_state.restore_position(session, self._metering, self._progress)
        self._evaluation.start_clock()
        was_in_epoch = self._progress.epoch_started
        if self._progress.epoch_ended:
            end_epoch(parts, hooks, self._progress)
        if self._plan.finished(self._progress) and not was_in_epoch:
            self._say_that_all_is_done()
            return
        _verify.modules_in_eval_mode(session.module)
        for hook in binder.both("on_train_start"):
            hook()
        self._has_started = True
        session.measuring.enter("training")
        if session.data_waits is not None:
            session.data_waits.begin(self._progress.total_batches)
        if session.resumed is not None:
            if self._progress.epoch_started:
                self.batches()  # making the iterator draws random numbers that the saved run had drawn before
            _exact_state.restore_rng(session)

    def _say_that_all_is_done(self) -> None:
        done, plan = self._progress, self._plan
        reached = [
            f"{name}={limit}"
            for name, limit, count in (
                ("max_epochs", plan.max_epochs, done.epoch),
                ("max_steps", plan.max_steps, done.updates),
            )
            if 0 < limit <= count
        ]
        if reached:
            rank_zero_info(
                f"nothing is left to train: this run has {done.epoch} epochs and {done.updates} steps behind it, and "
                f"{' and '.join(reached)}. To go on, give a Trainer a higher limit and ckpt_path=, or set "
                "trainer.fit_loop.max_epochs."
            )

    def batches(self) -> Batches:
        """The rest of the running epoch."""
        if self._progress.epoch_is_whole and self._loader.begins_again:  # resumed behind its last batch
            return ()
        batches = self._loader.epoch_batches(self._progress.epoch, self._progress.batch)
        measuring = self._session.measuring
        if not self._has_started or self._progress.epoch_is_whole:  # nothing will be trained on
            return batches
        measuring.begin("run_training_epoch")
        return measuring.batches("[_TrainingEpochLoop].train_dataloader_next", batches)

    def end(self, hooks: FitHooks) -> None:
        """Tell everybody that training has ended, if it had started."""
        if self._session.data_waits is not None:
            self._session.data_waits.end()
        if self._has_started:
            self._session.measuring.leave("training")
            for hook in hooks.on_train_end:
                hook()

    # ------------------------------------------------------------------ what the loop calls

    def _end_epoch(self) -> None:
        session, progress = self._session, self._progress
        if self._borrowing is not None:
            self._borrowing.end()
        if session.measuring.is_on:
            session.measuring.end("run_training_epoch")
        session.cut_epoch = _exact_state.cut_epoch(self._loader, self._metering.train, progress, session.world.device)
        session.measuring.part("logging", self._metering.reduce_train)()

    def _sync_step(self) -> None:
        if self._borrowing is not None:
            self._borrowing.end()
        due = not self._progress.window_is_open and self._plan.logs(self._progress)
        self._metering.train.pending_sync(at_flush=due)

    def _log_step(self) -> None:
        """A declared point inside an epoch: a row to the loggers, and the ranks' agreement whether to stop."""
        self._metering.log_train_step()
        self._stopping.agree()

    def _log_step_and_times(self) -> None:
        row = self._session.measuring.row
        if row is not None:
            self._metering.reporter.log_metrics(row(), x=self._progress.log_step, epoch=self._progress.epoch)
        self._log_step()

    def _close_epoch(self) -> None:
        """After the hooks at the end of a training epoch."""
        self._metering.close_train_epoch()
        self._loader.end_epoch()
        self._stopping.agree()
        plan, progress = self._plan, self._progress
        if progress.stop_reason is not None and not plan.may_stop(replace(progress, epoch=progress.epoch + 1)):
            rank_zero_info(
                f"asked to stop ({progress.stop_reason}), but min_epochs={plan.min_epochs} or "
                f"min_steps={plan.min_steps} is not reached: training goes on."
            )


def _told_of_fetched(hooks: FitHooks) -> FitHooks:
    start, module_start = hooks.on_train_batch_start, hooks.module_on_train_batch_start
    return replace(
        hooks,
        on_train_batch_start=tuple(hook_of_raw(hook, outputs_first=False) for hook in start),
        module_on_train_batch_start=tuple(hook_of_raw(hook, outputs_first=False) for hook in module_start),
        on_train_batch_end=tuple(hook_of_raw(hook, outputs_first=True) for hook in hooks.on_train_batch_end),
    )


def unchanged_batch(batch: object) -> object:
    """What transfer is where a step moves its batches itself."""
    return batch


def _starting(
    store: MetricStore, transfer: Callable[[object, int], object], borrowing: Borrowing | None
) -> Callable[[object], object]:
    """``transfer`` that also tells the store which batch is being trained."""
    if borrowing is not None:
        begin = borrowing.begin

        def start_round(batch: object) -> object:
            begin()
            return store.start_batch(transfer(batch, 0))

        return start_round
    if transfer is unchanged:
        return store.start_batch

    def start(batch: object) -> object:
        return store.start_batch(transfer(batch, 0))

    return start
