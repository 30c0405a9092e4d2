"""The Trainer: settings, backends, callbacks and a module become one run.

``Trainer`` keeps what lives from call to call (settings, backends, processes, callbacks, progress); a ``Session`` holds
what belongs to one call, ``Training`` and ``Evaluation`` compose its loops. The loops themselves (``fit.py``,
``evaluate.py``, ``predict.py``) know none of them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fulmen import (
    _callbacks,
    _checkpointing,
    _ending,
    _engine,
    _foreign_methods,
    _layer_sync,
    _loggers,
    _measuring,
    _preparation,
    _run_log,
    _switches,
    _verify,
    _whereabouts,
)
from fulmen._actions import TrainerActions
from fulmen._apart import Call, run_apart
from fulmen._environment import defaults_from_environment
from fulmen._evaluation import Evaluation
from fulmen._first_line import first_line
from fulmen._loaders import EvalLoaders, LoaderSource
from fulmen._metering import Metering
from fulmen._reporting import Reporter
from fulmen._run_loaders import tell_batch_size
from fulmen._session import Session
from fulmen._stopping import Stopping
from fulmen._storable import leave_out_unstorable
from fulmen._training import Training
from fulmen._watched_parts import watched
from fulmen.datamodule import LightningDataModule
from fulmen.evaluate import evaluate
from fulmen.exceptions import _TunerExitException  # pyright: ignore[reportPrivateUsage]  # Lightning's name
from fulmen.fit import FitParts, fit
from fulmen.hooks import FitHooks, HookBinder
from fulmen.plan import Plan
from fulmen.predict import predict
from fulmen.profilers._choice import choose as choose_profiler
from fulmen.progress import Progress
from fulmen.resume import Resume
from fulmen.runlog._settings import LogDelivery
from fulmen.settings import BatchLimit, Interval, Settings
from fulmen.states import TrainerFn, TrainerState, TrainerStatus
from fulmen.strategy_facade import StrategyFacade
from fulmen_fabric import Assembly, World, assemble, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import timedelta

    from fulmen.module import LightningModule
    from fulmen_protocols import Accelerator, Logger, MisconfigurationException, Profiler, Strategy

__all__ = ["Trainer"]

_STAGES = ("train", "val", "test", "predict")


class Trainer(TrainerActions):
    """Trains, evaluates and predicts with a ``LightningModule``.

    Arguments are keyword-only and mean what they mean in Lightning; ``docs/differences.md`` lists where they do not.
    One that is left out is taken from the environment, if ``FULMEN_TRAINER_<ARG>`` or ``PL_TRAINER_<ARG>`` is set.

    With ``accumulate_grad_batches=n`` the loss of every batch is divided by n and the optimizer steps after every n-th
    batch and after the last batch of an epoch. So each sample weighs the same in every update of the run, and the
    update of a last, shorter window is smaller in proportion; no batch is dropped, none is carried into the next epoch.

    With ``loss_weighting="weights"`` it is not: ``training_step`` returns ``{"loss": <a sum>, "weight": <over how
    many>}``, and the gradient of all sums of a window, on all ranks, is divided by the sum of their weights.
    """

    @defaults_from_environment
    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        logger: Logger | Iterable[Logger] | bool | None = None,
        callbacks: Sequence[object] | object | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | Mapping[str, int] | None = None,
        limit_train_batches: BatchLimit | None = None,
        limit_val_batches: BatchLimit | None = None,
        limit_test_batches: BatchLimit | None = None,
        limit_predict_batches: BatchLimit | None = None,
        overfit_batches: BatchLimit = 0.0,
        val_check_interval: Interval | None = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        loss_weighting: Literal["mean", "weights"] | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: object | Sequence[object] | None = None,
        profiler: Profiler | str | None = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
        model_registry: str | None = None,
        suggest_integrations: bool = True,
    ) -> None:
        given = _callbacks.as_list(callbacks)
        wrong: list[MisconfigurationException] = []
        with _verify.collected(wrong):
            self.settings = Settings.parse(
                fast_dev_run=fast_dev_run,
                max_epochs=max_epochs,
                min_epochs=min_epochs,
                max_steps=max_steps,
                min_steps=min_steps,
                max_time=max_time,
                limit_train_batches=limit_train_batches,
                limit_val_batches=limit_val_batches,
                limit_test_batches=limit_test_batches,
                limit_predict_batches=limit_predict_batches,
                overfit_batches=overfit_batches,
                val_check_interval=val_check_interval,
                check_val_every_n_epoch=check_val_every_n_epoch,
                num_sanity_val_steps=num_sanity_val_steps,
                log_every_n_steps=log_every_n_steps,
                enable_checkpointing=enable_checkpointing,
                enable_progress_bar=enable_progress_bar,
                enable_model_summary=enable_model_summary,
                accumulate_grad_batches=accumulate_grad_batches,
                loss_weighting=loss_weighting,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
                deterministic=deterministic,
                benchmark=benchmark,
                inference_mode=inference_mode,
                use_distributed_sampler=use_distributed_sampler,
                detect_anomaly=detect_anomaly,
                barebones=barebones,
                sync_batchnorm=sync_batchnorm,
                reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
                default_root_dir=default_root_dir,
                enable_autolog_hparams=enable_autolog_hparams,
                logger_is_on=None if logger in (None, False) else True,
                has_timer=_callbacks.has_timer(given),
            )
        with _verify.collected(wrong):
            self.profiler: Profiler = choose_profiler(profiler, barebones=barebones)
        usable: str | Strategy = "auto"  # so that the other backends are checked where the strategy is wrong
        with _verify.collected(wrong):
            usable = _verify.strategy(strategy)
        with _verify.collected(wrong):
            self.assembly: Assembly = assemble(
                accelerator=accelerator,
                strategy=usable,
                devices=devices,
                num_nodes=num_nodes,
                precision=precision,
                plugins=plugins,
                takes_layer_sync=True,
            )
        with _verify.collected(wrong):
            _verify.vendors_flags(model_registry, suggest_integrations)
        _verify.raise_all(wrong)
        _verify.loss_weighting(self.assembly, self.settings)
        _foreign_methods.check_backends(self.assembly)
        self._begin_life(given, logger)
        rank_zero_info(first_line(self.assembly))

    def _begin_life(self, callbacks: list[Any], logger: Logger | Iterable[Logger] | bool | None) -> None:
        """Make what lives from call to call: settings and backends are known to fit together."""
        settings = self.settings
        self.world = self._world = World(self.assembly)
        self.callbacks: list[Any] = _callbacks.complete(callbacks, settings)
        self.loggers = _loggers.complete(logger, settings)
        self.state = TrainerState()
        self.strategy = StrategyFacade(self)
        self._progress = Progress()
        self._stopping = Stopping(self._progress, self.world, self.assembly.environment)
        self._session: Session | None = None
        self._plan = Plan()
        self._ckpt_path: str | None = None
        self._said: set[str] = set()
        self._loaders_before: dict[str, EvalLoaders] = {}
        self.log_delivery = LogDelivery()
        self._reporter = Reporter(
            loggers=self.loggers, log_every_n_steps=settings.log_every_n_steps, is_global_zero=self.world.is_global_zero
        )
        self.fast_dev_run = settings.fast_dev_run

    def __getstate__(self) -> dict[str, Any]:
        # A call that has ended belongs to this process: its loaders and hooks stay.
        gone: dict[str, object] = {"_session": None, "_loaders_before": {}}
        return {
            name: value for name, value in {**self.__dict__, **gone}.items() if name not in ("_metering", "_binder")
        }

    # ------------------------------------------------------------------ the four calls

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: object = None,
        val_dataloaders: object = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train ``model``.

        Args:
            model: what to train.
            train_dataloaders: any iterable of batches, a collection of them, or a datamodule.
            val_dataloaders: the same for validation; several run one after the other.
            datamodule: supplies loaders instead.
            ckpt_path: go on from this checkpoint: a path or URL, ``"last"``, ``"best"``, or a ``Resume`` of a part.
            weights_only: False lets code from the checkpoint run; None and True do not.

        Raises:
            MisconfigurationException: something needed is missing or contradicts itself; nothing has been started.
        """
        if isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        given = {"train": train_dataloaders, "val": val_dataloaders}
        if self.settings.max_epochs_is_default:
            rank_zero_warn(
                f"neither max_epochs nor max_steps was given: training ends after {self.max_epochs} epochs. "
                "Give one of them, or max_epochs=-1 to train until something stops it."
            )
        self._run(TrainerFn.FITTING, model, given, datamodule, ckpt_path, weights_only)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: object = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run one validation epoch and return the logged metrics, one dict per loader."""
        return self._evaluate(
            TrainerFn.VALIDATING, "val", model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: object = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run one test epoch and return the logged metrics, one dict per loader."""
        return self._evaluate(
            TrainerFn.TESTING, "test", model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: object = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """Run the model over the loaders.

        Returns:
            The outputs of every batch on the CPU; one list per loader where there are several. None if
            ``return_predictions`` is False.
        """
        if isinstance(dataloaders, LightningDataModule):
            dataloaders, datamodule = None, dataloaders
        keep = return_predictions is not False
        given = {"predict": dataloaders}
        outputs = self._run(TrainerFn.PREDICTING, model, given, datamodule, ckpt_path, weights_only, keep=keep)
        if not keep:
            return None
        return outputs[0] if len(outputs) == 1 else outputs

    def _evaluate(
        self,
        fn: TrainerFn,
        stage: str,
        model: LightningModule | None,
        dataloaders: object,
        ckpt_path: str | os.PathLike[str] | None,
        verbose: bool,
        datamodule: LightningDataModule | None,
        weights_only: bool | None,
    ) -> list[dict[str, float]]:
        if isinstance(dataloaders, LightningDataModule):
            dataloaders, datamodule = None, dataloaders
        return self._run(fn, model, {stage: dataloaders}, datamodule, ckpt_path, weights_only, verbose=verbose)

    # ------------------------------------------------------------------ one run

    def _run(
        self,
        fn: TrainerFn,
        model: LightningModule | None,
        given: dict[str, object],
        datamodule: LightningDataModule | None,
        ckpt_path: str | os.PathLike[str] | None,
        weights_only: bool | None,
        *,
        verbose: bool = False,
        keep: bool = False,
    ) -> list[Any]:
        """Everything that happens in one call, in order; returns what ``predict``, ``validate`` or ``test`` found.

        The loops are called from here, so that stacks stay short.
        """
        session = self._connect(fn, model, given, datamodule)
        if isinstance(ckpt_path, Resume):
            session.resume = ckpt_path
        self._ckpt_path = _checkpointing.resolve_path(self, ckpt_path, model_given=model is not None)
        leave_out_unstorable(session, self.strategy.checkpoint_io)
        if self.world.runs_apart:
            options = {"ckpt_path": self._ckpt_path, "weights_only": weights_only, "verbose": verbose, "keep": keep}
            return run_apart(self, Call(fn, session.module, given, session.datamodule, options))
        outputs: list[Any] = []
        try:
            self.world.launch(_nothing)
            _whereabouts.begin()
            self._stopping.begin(fitting=fn is TrainerFn.FITTING)
            self._set_up(session, weights_only)
            with _switches.determinism(self.settings), self._stopping.signals:
                shared = (self._metering, self._progress, self.state)
                evaluation = Evaluation(session, lambda: self.settings, self._binder, *shared)
                if fn is TrainerFn.FITTING:
                    training = Training(session, lambda: self.settings, evaluation, *shared, self._stopping)
                    parts, hooks = self._compose(session, training)
                    evaluation.sanity_check()
                    training.load()
                    self._plan = training.make_plan()
                    self._reporter.goes_on()
                    training.begin(self._binder, parts, hooks)
                    with _switches.anomaly_detection(self.settings):
                        while True:
                            if self._progress.replan:  # on_train_start may have changed something already
                                self._progress.replan = False
                                self._plan = training.make_plan()
                                parts, hooks = self._compose(session, training)
                            fit(parts, self._plan, hooks, self._progress, training.batches)
                            if not self._progress.replan:
                                break
                    self._stopping.leave(self)
                    training.end(hooks)
                elif fn is TrainerFn.PREDICTING:
                    outputs = predict(*evaluation.prepare_predict(keep=keep))
                else:
                    evaluate(*evaluation.prepare())
                    outputs = evaluation.results
                    if verbose:
                        evaluation.show_results()
            _ending.tear_down(self, session, self._metering, self._binder, has_run=True)
        except _TunerExitException:
            _ending.tear_down(self, session, self._metering, self._binder, has_run=False)
        except BaseException as error:
            _ending.fail(self, session, self._progress, error)
            raise
        self.state.status = TrainerStatus.FINISHED
        self.state.stage = None
        return outputs

    # ------------------------------------------------------------------ the beginning

    def _connect(
        self, fn: TrainerFn, model: object, given: dict[str, object], datamodule: LightningDataModule | None
    ) -> Session:
        """Bring module, datamodule and loaders together and refuse what cannot work, before anything starts."""
        module = _verify.lightning_module(fn, self.lightning_module if model is None else model)
        _verify.loaders_or_datamodule(fn, given, datamodule)
        previous = self._session
        if previous is not None:
            self._loaders_before.update(previous.eval_loaders)
        if datamodule is None and not any(value is not None for value in given.values()) and previous is not None:
            datamodule = previous.datamodule
        _verify.compiled_module(module, self.assembly)
        _verify.placeable_module(module, self.assembly)
        if fn is TrainerFn.FITTING:
            _verify.sync_batchnorm(module, self.assembly, self.settings)
        measuring = _measuring.Measuring(self.profiler, self.strategy.backend)
        sources = {stage: LoaderSource(stage, given.get(stage), datamodule, module) for stage in _STAGES}
        module.trainer = self
        own_callbacks = measuring.hook(module, "configure_callbacks", module.configure_callbacks)()
        _callbacks.attach_to(self.callbacks, _callbacks.as_list(own_callbacks))
        made_by_engine = _engine.makes_optimizers(self.assembly.strategy)
        _verify.run(fn, module, sources, self.callbacks, self.settings, engine_makes_optimizers=made_by_engine)
        self._session = session = Session(
            fn, module, datamodule, self.assembly, self.world, sources, said=self._said, measuring=measuring
        )
        session.weighs_losses = self.settings.loss_weighting == "weights"
        if fn is TrainerFn.FITTING:
            session.told_engine = _engine.hand_over(module, self.assembly, self.settings, None)
        self.state.fn, self.state.status = fn, TrainerStatus.RUNNING
        self.state.stage = fn.first_stage
        if fn is TrainerFn.FITTING:
            self._progress.begin_again()
        else:
            session.keep_training_of(previous)
        if datamodule is not None:
            datamodule.trainer = self
        _callbacks.let_log(self.callbacks, module)
        return session

    def _set_up(self, session: Session, weights_only: bool | None) -> None:
        """From prepared data to a placed module with its optimizers, restored if asked."""
        module, fn = session.module, session.fn
        self._share_loggers()
        if session.measuring.is_on:
            _measuring.prepare(self.profiler, self)
        _preparation.prepare_data(session)
        self._reporter.loggers = self.loggers
        _run_log.begin(self, session)
        self._metering = Metering(
            session,
            self._reporter,
            self._progress,
            self.world,
            enabled=not self.settings.barebones,
            stage=fn.first_stage.value,
        )
        self._binder = binder = HookBinder(self, module, self.callbacks, session.scoped)
        _preparation.tell_place(session)
        session.call_everybodys("setup", binder)
        self.strategy.barrier("setup")

        _preparation.configure_model(session)
        _layer_sync.apply(session)
        _preparation.convert(session, sync_batchnorm=self.settings.sync_batchnorm and self.assembly.layer_sync is None)
        _callbacks.tell_configured(self.callbacks, self, module)
        checkpoint = None
        if self.world.world_size > 1:  # each rank has looked for "last" by itself
            self._ckpt_path = self.world.collectives.broadcast_object(self._ckpt_path)
        if self._ckpt_path is not None:
            checkpoint = _checkpointing.load(self, session, self._ckpt_path, weights_only)
            if not _checkpointing.is_sharded(session):
                _checkpointing.restore_modules_and_callbacks(self, session, checkpoint)
        _preparation.place(session)
        self.strategy.model = session.placed
        if checkpoint is not None and _checkpointing.is_sharded(session):  # no rank may have had room for the whole
            _checkpointing.restore_modules_and_callbacks(self, session, checkpoint)
        if fn is TrainerFn.FITTING:
            own_schedule = binder.overridden("lr_scheduler_step")
            tell_batch_size(session, self.settings, self._progress.epoch)
            _preparation.make_optimizers(session, steps_own_schedulers=own_schedule is not None)
            for hook in binder.both("on_fit_start"):
                hook()
        if self.settings.enable_autolog_hparams:
            _loggers.log_hyperparameters(self, session)
        if checkpoint is not None:
            _checkpointing.restore_training(self, session, checkpoint)

    def _share_loggers(self) -> None:
        """Loggers agree on a version and ranks on the run's folder."""
        self._shared_log_dir = None
        if self.world.world_size > 1:
            self.loggers = _loggers.follow_rank_zero(self.loggers, self.world)
            self._shared_log_dir = self.world.collectives.broadcast_object(
                self.log_dir if self.world.is_global_zero else None
            )

    def _compose(self, session: Session, training: Training) -> tuple[FitParts, FitHooks]:
        """The training loop's parts and hooks, with the callbacks of this moment."""
        self._binder = HookBinder(self, session.module, self.callbacks, session.scoped)
        _engine.hand_over(session.module, self.assembly, self.settings, session.told_engine)
        parts, hooks = training.compose(self._binder)
        self.strategy.gradients = session.gradients
        self.strategy.wrapped_optimizers = session.wrapped
        first = (
            *_whereabouts.training(self._progress),
            *self.strategy.saving.step_hooks(),
            *self._reporter.step_hooks(self.world.device),
        )
        parts = watched(self.callbacks, self, parts)
        return parts, replace(hooks, on_train_batch_start=(*first, *hooks.on_train_batch_start))


def _nothing() -> None:
    """What the launcher runs: this process goes on by itself."""
