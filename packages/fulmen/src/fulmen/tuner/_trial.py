"""A short run inside a run, of which nothing is left afterwards.

A tuner's callback is called in the middle of a ``fit`` or an evaluation. It puts the run aside: the trainer has another
session, progress and settings, no callbacks but the tuner's own, and loggers that write nothing. The trial goes through
the same loops with the same parts as a run; then everything is put back in its place.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader

from fulmen import _preparation
from fulmen._evaluation import Evaluation
from fulmen._loaders import leaves
from fulmen._metering import Metering
from fulmen._reporting import Reporter
from fulmen._silent import DummyLogger
from fulmen._switches import anomaly_detection, determinism
from fulmen._training import Training
from fulmen.evaluate import evaluate
from fulmen.fit import fit
from fulmen.hooks import HookBinder
from fulmen.predict import predict
from fulmen.states import RunningStage, TrainerFn
from fulmen_data import LoaderPosition
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence, Sized

    from fulmen._session import Session
    from fulmen.fit import FitParts
    from fulmen.hooks import FitHooks
    from fulmen.optimizer import LRSchedulerConfig
    from fulmen.plan import Plan
    from fulmen.progress import Progress
    from fulmen.trainer import Trainer

__all__ = ["Trial", "progress_of", "refuse_within_epoch", "renew_optimizers", "session_of", "was_composed"]

# What a Trainer keeps of the run in hand. It has no other door to them, and needs none but for this.
_OF_A_RUN = (
    "_session",
    "_progress",
    "_plan",
    "_reporter",
    "_metering",
    "_binder",
    "settings",
    "_loggers",
    "_shared_log_dir",
)

# What a run keeps in a module.
_OF_METRICS = ("_metric_store", "_metric_stores_of_run")


def session_of(trainer: Trainer) -> Session:
    """The session of the running call."""
    session: Session | None = vars(trainer)["_session"]
    assert session is not None, "a tuner's callback is called during a run"
    return session


def progress_of(trainer: Trainer) -> Progress:
    """The counters of the running call."""
    progress: Progress = vars(trainer)["_progress"]
    return progress


def was_composed(trainer: Trainer) -> bool:
    """Whether the running fit has its parts already: then its optimizers can be changed but not replaced."""
    return session_of(trainer).gradients is not None


def refuse_within_epoch(trainer: Trainer, what: str) -> None:
    """A loader that is being read would be read twice.

    Raises:
        MisconfigurationException: the running fit is inside of a training epoch.
    """
    progress = progress_of(trainer)
    if trainer.state.fn is TrainerFn.FITTING and progress.epoch_started and not progress.epoch_ended:
        raise MisconfigurationException(
            f"{what} was called in epoch {progress.epoch} after its batch {progress.batch}. Call it between epochs: in "
            "on_fit_start, on_train_epoch_start or on_train_epoch_end."
        )


def renew_optimizers(trainer: Trainer) -> None:
    """Ask ``configure_optimizers`` again: schedules follow from the learning rate and from the number of batches."""
    binder: HookBinder = vars(trainer)["_binder"]
    own_schedule = binder.overridden("lr_scheduler_step")
    _preparation.make_optimizers(session_of(trainer), steps_own_schedulers=own_schedule is not None)


class Trial:
    """One trial of a running ``trainer``. Enter ``aside`` first; within it the trainer is the trial's."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._own = vars(trainer)
        self._outer = session_of(trainer)
        self._outer_progress = progress_of(trainer)
        self._loaders = _LoaderGuard()
        self.session = self._outer
        """The trial's own, once ``aside`` has been entered."""

    @contextmanager
    def aside(
        self,
        callbacks: Sequence[object] = (),
        schedulers: Sequence[LRSchedulerConfig] = (),
        **settings: Any,
    ) -> Generator[None, None, None]:
        """Within the block the trainer is the trial's.

        Args:
            callbacks: the only ones that the trial has.
            schedulers: those of the trial.
            settings: what differs from the run's.
        """
        trainer, own, outer = self._trainer, self._own, self._outer
        kept = {name: own[name] for name in _OF_A_RUN if name in own}
        others, stage, gradients = list(trainer.callbacks), trainer.state.stage, trainer.strategy.gradients
        attached = [
            (module, {name: vars(module).pop(name) for name in _OF_METRICS if name in vars(module)})
            for module in outer.logging_modules()
        ]
        self.session = replace(
            outer,
            store=None,
            wrapped=[],
            schedulers=list(schedulers),
            train_loader=None,
            eval_loaders={},
            manual=None,
            gradients=None,
            resumed=None,
            cut_epoch=None,
        )
        own["_session"] = self.session
        own["_progress"] = replace(
            self._outer_progress,
            batch=0,
            epoch_started=False,
            epoch_ended=False,
            epoch_is_whole=False,
            window_is_open=False,
            batch_is_open=False,
            stop_reason=None,
            stop_now=False,
            replan=False,
        )
        own["settings"] = replace(trainer.settings, **settings)
        own["_loggers"] = [DummyLogger()] if trainer.loggers else []
        own["_reporter"] = Reporter(log_every_n_steps=0, is_global_zero=trainer.is_global_zero)
        trainer.callbacks[:] = callbacks
        try:
            yield
        finally:
            self.session.close_loaders()
            self._loaders.restore()
            trainer.callbacks[:] = others
            trainer.state.stage, trainer.strategy.gradients = stage, gradients
            own.update(kept)
            for source in outer.sources.values():
                source.scoped = outer.scoped
            for module, found in attached:
                for name in _OF_METRICS:
                    vars(module).pop(name, None)
                vars(module).update(found)

    def train(self, steps: int, *, validation_batches: int = 0) -> None:
        """Train until an optimizer was stepped after ``steps`` batches, then validate.

        Less if the run itself was asked to end.
        """
        trainer = self._trainer
        settings, progress = trainer.settings, progress_of(trainer)
        metering, binder = self._meter()
        shared = (metering, progress, trainer.state)
        evaluation = Evaluation(self.session, lambda: trainer.settings, binder, *shared)
        training = Training(self.session, lambda: trainer.settings, evaluation, *shared, self._own["_stopping"])
        with (
            determinism(settings),
            anomaly_detection(settings),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            parts, hooks = self._compose(training, steps)
            training.load()
            train_loader = self.session.train_loader
            assert train_loader is not None
            self._loaders.guard(train_loader.user_loader)
            self._own["_plan"] = _without_validation(training.make_plan())
            training.begin(binder, parts, hooks)
            while True:
                fit(parts, self._own["_plan"], hooks, progress, training.batches)
                if not progress.replan:
                    break
                progress.replan = False
                self._own["_plan"] = _without_validation(training.make_plan())
                parts, hooks = self._compose(training, steps)
            training.end(hooks)
            if validation_batches and evaluation.validates:
                self._loaders.guard(evaluation.loaders("val").user_loaders)
                evaluation.validate()
        metering.finish()

    def evaluate(self) -> None:
        """Validate, test or predict, as the run does."""
        trainer, fn = self._trainer, self.session.fn
        metering, binder = self._meter(trainer.state.stage)
        evaluation = Evaluation(
            self.session, lambda: trainer.settings, binder, metering, progress_of(trainer), trainer.state
        )
        with determinism(trainer.settings):
            self._loaders.guard(evaluation.loaders(fn.first_stage.dataloader_prefix).user_loaders)
            if fn is TrainerFn.PREDICTING:
                predict(*evaluation.prepare_predict(keep=False))
            else:
                evaluate(*evaluation.prepare())
        metering.finish()

    @property
    def samples(self) -> float:
        """Of the largest data set that this trial reads; ``inf`` where one does not know its length."""
        loader = self.session.train_loader
        loaders = self.session.eval_loaders.get(self.session.fn.first_stage.dataloader_prefix)
        given = loader.user_loader if loader is not None else None if loaders is None else loaders.user_loaders
        return math.inf if given is None else max((_samples(leaf) for leaf in leaves(given)), default=math.inf)

    def _meter(self, stage: RunningStage | None = RunningStage.TRAINING) -> tuple[Metering, HookBinder]:
        trainer = self._trainer
        assert stage is not None
        metering = self._own["_metering"] = Metering(
            self.session,
            self._own["_reporter"],
            progress_of(trainer),
            trainer.world,
            enabled=not trainer.settings.barebones,
            stage=stage.value,
        )
        binder = self._own["_binder"] = HookBinder(trainer, self.session.module, trainer.callbacks, self.session.scoped)
        return metering, binder

    def _compose(self, training: Training, steps: int) -> tuple[FitParts, FitHooks]:
        trainer, progress, run = self._trainer, progress_of(self._trainer), self._outer_progress
        end = run.stepped_batches + steps

        def stop_in_time(outputs: object, batch: object, batch_idx: int) -> None:
            if progress.stepped_batches >= end:
                progress.stop("the trial is over", now=True)
            elif run.stop_now:
                progress.stop(str(run.stop_reason), now=True)

        binder = HookBinder(trainer, self.session.module, trainer.callbacks, self.session.scoped)
        parts, hooks = training.compose(binder)
        trainer.strategy.gradients = self.session.gradients
        return parts, replace(hooks, on_train_batch_end=(*hooks.on_train_batch_end, stop_in_time))


class _LoaderGuard:
    """Gives loaders back as they were found: the generators that they draw from, and whether they had workers."""

    def __init__(self) -> None:
        self._found: list[tuple[LoaderPosition[object], Any, Any, bool]] = []

    def guard(self, loaders: object) -> None:
        for each in leaves(loaders):
            leaf: Any = each
            position = LoaderPosition(cast("Iterable[object]", leaf))
            idle = isinstance(each, DataLoader) and leaf._iterator is None
            self._found.append((position, position.generator_states(), leaf, idle))

    def restore(self) -> None:
        for position, generators, loader, idle in reversed(self._found):
            position.set_generator_states(generators)
            if idle:
                loader._iterator = None  # workers that stay would go on with random numbers of the trial
        self._found = []


def _without_validation(plan: Plan) -> Plan:
    return replace(plan, validates=False)


def _samples(loader: object) -> float:
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(cast("type[object]", type(dataset)), "__len__"):
        return math.inf
    try:
        return len(cast("Sized", dataset))
    except (TypeError, NotImplementedError):
        return math.inf
