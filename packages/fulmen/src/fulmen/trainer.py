"""The Trainer: settings, backends, callbacks and a module become one run.

``Trainer`` keeps what lives from call to call (settings, backends, processes, callbacks, progress); a ``Session`` holds
what belongs to one call. The loops (``fit.py``, ``evaluate.py``, ``predict.py``) know neither.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from fulmen import _callbacks, _checkpointing, _loggers, _verify
from fulmen._explain import explain_run
from fulmen._loaders import EvalLoaders, LoaderSource, Splitter, TrainLoader
from fulmen._metering import Metering
from fulmen._reporting import Reporter, print_results
from fulmen._schedules import plain_schedule, watching_schedule
from fulmen._session import ModelModes, Session, unchanged
from fulmen._silent import DummyLogger, MutedLogger
from fulmen._surface import TrainerSurface
from fulmen.datamodule import LightningDataModule
from fulmen.evaluate import EvalParts, evaluate
from fulmen.exceptions import SIGTERMException
from fulmen.fit import FitParts, fit
from fulmen.hooks import HookBinder
from fulmen.hparams import drop_unpicklable
from fulmen.module import LightningModule
from fulmen.optimizer import parse_optimizers
from fulmen.plan import Plan
from fulmen.predict import PredictParts, predict
from fulmen.progress import Progress
from fulmen.settings import BatchLimit, Interval, Settings
from fulmen.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from fulmen.strategy_facade import StrategyFacade
from fulmen_fabric import (
    Assembly,
    StopAgreement,
    StopSignal,
    World,
    assemble,
    isolate_rng,
    move_data_to_device,
    rank_zero_info,
    rank_zero_warn,
)
from fulmen_fabric.abilities import supports
from fulmen_fabric.stopping import group_store
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationTypeError,
    SupportsInferencePlacement,
    SupportsPatientBarrier,
    SupportsPrecisionPlan,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

    from fulmen.metrics import MetricStore
    from fulmen_protocols import Accelerator, Logger, Strategy

__all__ = ["Trainer"]

_STAGES = ("train", "val", "test", "predict")


class Trainer(TrainerSurface):
    """Trains, evaluates and predicts with a ``LightningModule``.

    Arguments are keyword-only and mean what they mean in Lightning; ``docs/differences.md`` lists where they do not.
    """

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
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | Literal["warn"] | None = None,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: object | Sequence[object] | None = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True,
    ) -> None:
        given = _callbacks.as_list(callbacks)
        self.settings = settings = Settings.parse(
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
        self.assembly: Assembly = assemble(
            accelerator=accelerator,
            strategy=strategy,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            plugins=plugins,
        )
        self.world = World(self.assembly)
        self.callbacks: list[Any] = _callbacks.complete(given, settings)
        self.loggers = _loggers.complete(logger, settings)
        self.state = TrainerState()
        self.strategy = StrategyFacade(self.assembly.strategy, self.world, self.assembly.checkpoint_io)
        self._progress = Progress()
        self._session: Session | None = None
        self._plan = Plan()
        self._ckpt_path: str | None = None
        self._last_validation_s = 0.0
        self._signals = StopSignal()
        self._agreement: StopAgreement | None = None
        self._calls = 0
        self._results: list[dict[str, float]] = []
        self._reporter = Reporter(
            loggers=self.loggers,
            log_every_n_steps=settings.log_every_n_steps,
            is_global_zero=self.world.is_global_zero,
        )
        self.fast_dev_run = settings.fast_dev_run
        if self.assembly.chosen:
            rank_zero_info(" ".join(self.assembly.chosen))
        if settings.max_epochs_is_default:
            rank_zero_warn("neither max_epochs nor max_steps was given: training ends after 1000 epochs.")

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
            ckpt_path: go on from this checkpoint: a path or URL, ``"last"`` or ``"best"``.
            weights_only: False lets code from the checkpoint run; None and True do not.

        Raises:
            MisconfigurationException: something needed is missing or contradicts itself; nothing has been started.
        """
        if isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        given = {"train": train_dataloaders, "val": val_dataloaders}
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
    ) -> list[Any] | list[list[Any]] | None:
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
        if not keep or outputs is None:
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
        self._run(fn, model, {stage: dataloaders}, datamodule, ckpt_path, weights_only, verbose=verbose)
        return self._results

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
    ) -> list[Any] | None:
        """Everything that happens in one call, in order. The loops are called from here, so that stacks stay short."""
        session = self._connect(fn, model, given, datamodule)
        self._resolve_ckpt_path(ckpt_path, model_given=model is not None)
        for owner in (session.module, session.datamodule):
            if owner is not None and owner.hparams:
                drop_unpicklable(owner)
        outputs: list[Any] | None = None
        try:
            if self.assembly.launcher is None:
                self.world.start()
            else:
                self.world.launch(_nothing)
            self._watch_signals()
            self._set_up(session, weights_only)
            with self._determinism(), self._signals:
                if fn is TrainerFn.FITTING:
                    parts, hooks = self._prepare_fit(session)
                    self._sanity_check(session)
                    self._begin_training(session)
                    with torch.autograd.set_detect_anomaly(True) if self.settings.detect_anomaly else nullcontext():
                        while True:
                            fit(parts, self._plan, hooks, self._progress, self._epoch_batches)
                            if not self._progress.replan:
                                break
                            parts, hooks = self._replan(session)
                    self._leave_if_signalled()
                    self._end_training(session, hooks)
                elif fn is TrainerFn.PREDICTING:
                    outputs = predict(*self._prepare_predict(session, keep=keep))
                else:
                    evaluate(*self._prepare_eval(session, fn, verbose=verbose))
            self._tear_down(session)
        except BaseException as error:
            self._fail(session, error)
            raise
        self.state.status = TrainerStatus.FINISHED
        self.state.stage = None
        return outputs

    def _connect(
        self, fn: TrainerFn, model: object, given: dict[str, object], datamodule: LightningDataModule | None
    ) -> Session:
        """Bring module, datamodule and loaders together and refuse what cannot work, before anything starts."""
        if model is None:
            model = self.lightning_module if self._session is not None else None
            if model is None:
                raise MisconfigurationTypeError(
                    f"trainer.{fn.value}() was called without a model, and this trainer has none yet. Pass the model."
                )
        if not isinstance(model, LightningModule):
            raise MisconfigurationTypeError(
                f"model is of type {type(model).__name__}; the Trainer needs a LightningModule. "
                "Put the model inside one, or keep your own loop with fulmen.Fabric."
            )
        _verify.loaders_or_datamodule(fn, given, datamodule)
        previous = self._session
        if datamodule is None and not any(value is not None for value in given.values()) and previous is not None:
            datamodule = previous.datamodule
        sources = {stage: LoaderSource(stage, given.get(stage), datamodule, model) for stage in _STAGES}
        model.trainer = self
        _callbacks.attach_to(self.callbacks, _callbacks.as_list(model.configure_callbacks()))
        _verify.run(fn, model, sources, self.callbacks, self.settings)
        session = Session(fn, model, datamodule, self.assembly, self.world, sources)
        self._session = session
        self.state.fn, self.state.status = fn, TrainerStatus.RUNNING
        self.state.stage = _FIRST_STAGE[fn]
        if fn is TrainerFn.FITTING:
            self._progress.stop_reason, self._progress.stop_now = None, False
        if datamodule is not None:
            datamodule.trainer = self
        _callbacks.let_log(self.callbacks, model)
        return session

    def _set_up(self, session: Session, weights_only: bool | None) -> None:
        """From prepared data to a placed module with its optimizers, restored if asked."""
        module, datamodule, fn = session.module, session.datamodule, session.fn
        self._share_log_dir()
        self._prepare_data(session)
        self._reporter.loggers = self.loggers
        self._metering = Metering(
            session,
            self._reporter,
            self._progress,
            self.world,
            enabled=not self.settings.barebones,
            stage=_STORE[fn],
        )
        self._binder = binder = HookBinder(self, module, self.callbacks, session.scoped)
        for each in session.logging_modules():
            each.__dict__["_target_device"] = self.world.device  # self.device is right in setup already
        if datamodule is not None:
            datamodule.setup(fn.value)
        for hook in binder.of_callbacks("setup"):
            hook(stage=fn.value)
        session.scoped("setup", module.setup)(fn.value)
        self.strategy.barrier("setup")

        with self._module_context(session):
            module.configure_model()
        checkpoint = None
        if self._ckpt_path is not None:
            checkpoint = _checkpointing.load(self, self._ckpt_path, weights_only)
            _checkpointing.restore_modules_and_callbacks(self, session, checkpoint)
        self._place(session)
        if fn is TrainerFn.FITTING:
            self._make_optimizers(session)
            for hook in binder.both("on_fit_start"):
                hook()
        if self.settings.enable_autolog_hparams:
            _loggers.log_hyperparameters(self, session)
        if checkpoint is not None:
            _checkpointing.restore_training(self, session, checkpoint)

    def _module_context(self, session: Session) -> Any:
        stack = ExitStack()
        stack.enter_context(self.assembly.precision.init_context())
        stack.enter_context(self.assembly.strategy.module_context(empty=False))
        return stack

    def _prepare_data(self, session: Session) -> None:
        for owner in (session.datamodule, session.module):
            if owner is None:
                continue
            per_node = getattr(owner, "prepare_data_per_node", True)
            if self.world.local_rank == 0 if per_node else self.world.is_global_zero:
                session.scoped("prepare_data", owner.prepare_data)()
        collectives = self.world.collectives
        if supports(collectives, SupportsPatientBarrier):  # one rank may be downloading for hours
            collectives.patient_barrier("prepare_data")
        else:
            collectives.barrier("prepare_data")

    def _place(self, session: Session) -> None:
        strategy, module = self.assembly.strategy, session.module
        if not supports(strategy, SupportsPrecisionPlan):
            self.assembly.precision.convert_module(module)
        if self.settings.sync_batchnorm and self.world.world_size > 1 and session.fn is TrainerFn.FITTING:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        if session.fn is not TrainerFn.FITTING and supports(strategy, SupportsInferencePlacement):
            session.placed = strategy.place_for_inference(module)
        else:
            session.placed = strategy.place(module)
        self.strategy.model = session.placed
        for each in session.logging_modules():
            each.__dict__["_target_device"] = None

    def _make_optimizers(self, session: Session) -> None:
        module = session.module
        returned = session.scoped("configure_optimizers", module.configure_optimizers)()
        optimizers, session.schedulers = parse_optimizers(
            returned,
            automatic_optimization=module.automatic_optimization,
            steps_own_schedulers=self._binder.overridden("lr_scheduler_step") is not None,
        )
        assert session.placed is not None
        session.optimizers = list(self.assembly.strategy.prepare_optimizers(session.placed, optimizers))

    @contextmanager
    def _determinism(self) -> Generator[None, None, None]:
        """The run's settings of torch's global switches, given back afterwards."""
        settings = self.settings
        benchmark = settings.benchmark
        if settings.deterministic and benchmark is None:
            benchmark = False
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
        )
        if settings.deterministic:
            # cuBLAS reads it when its first handle is made; without it torch refuses deterministic matrix products.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=settings.deterministic == "warn")
        if benchmark is not None:
            torch.backends.cudnn.benchmark = benchmark
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.benchmark = before[2]

    def _share_log_dir(self) -> None:
        """Rank 0 chooses each logger's version and the run's folder; the others take its word."""
        self._shared_log_dir = None
        if self.world.world_size == 1:
            return
        collectives = self.world.collectives
        versions = [logger.version for logger in self.loggers] if self.world.is_global_zero else []
        versions = collectives.broadcast_object(versions)
        if not self.world.is_global_zero:
            for logger, version in zip(self.loggers, versions, strict=True):
                if getattr(getattr(type(logger), "version", None), "fset", None) is not None:
                    logger.version = version  # type: ignore[misc]  # settable where the logger says so
            self.loggers = [one if isinstance(one, DummyLogger) else MutedLogger(one) for one in self.loggers]
        self._shared_log_dir = collectives.broadcast_object(self.log_dir if self.world.is_global_zero else None)

    def _resolve_ckpt_path(self, asked: str | os.PathLike[str] | None, *, model_given: bool) -> None:
        """Turn ``best``, ``last``, a path or None into the path to load, before anything starts."""
        fn = self.state.fn
        if asked is None:
            self._ckpt_path = None
            callback = self.checkpoint_callback
            best: str = getattr(callback, "best_model_path", "")
            if fn is not TrainerFn.FITTING and not model_given and best:
                self._ckpt_path = best
                rank_zero_info(
                    f"trainer.{fn}() without a model uses the best checkpoint, {best}. Pass the model to use its "
                    "weights as they are."
                )
            return
        text = os.fspath(asked)
        if text == "best":
            callback = self.checkpoint_callback
            if self.settings.fast_dev_run:
                raise MisconfigurationException(
                    "ckpt_path='best': fast_dev_run saves no checkpoint. Drop one of the two."
                )
            if callback is None:
                raise MisconfigurationException(
                    "ckpt_path='best', but there is no checkpoint callback. Add ModelCheckpoint."
                )
            if not getattr(callback, "best_model_path", ""):
                raise MisconfigurationException(
                    "ckpt_path='best', but the checkpoint callback has saved nothing yet. "
                    "Call fit first, or give a path."
                )
            self._ckpt_path = callback.best_model_path
        elif text == "last":
            self._ckpt_path = _checkpointing.find_last(self)
            if self._ckpt_path is None:
                rank_zero_warn("ckpt_path='last', but no checkpoint was found: nothing is loaded.")
        else:
            self._ckpt_path = text

    # ------------------------------------------------------------------ training

    def _prepare_fit(self, session: Session) -> tuple[FitParts, Any]:
        if session.train_loader is None:  # else configure_optimizers has asked for the number of steps
            session.train_loader = self._train_loader(session)
        return self._compose(session, first=True)

    def _train_loader(self, session: Session) -> TrainLoader:
        settings = self.settings
        return TrainLoader(
            session.sources["train"],
            limit=self.limit_train_batches,
            limit_name="limit_train_batches" if not settings.overfit_batches else "overfit_batches",
            split=self._splitter().train,
            process=session.process_loader(),
            reload_every_n_epochs=settings.reload_dataloaders_every_n_epochs,
            overfit=bool(settings.overfit_batches),
        )

    def _replan(self, session: Session) -> tuple[FitParts, Any]:
        self._progress.replan = False
        return self._compose(session, first=False)

    def _compose(self, session: Session, *, first: bool) -> tuple[FitParts, Any]:
        """Build the loop's parts and hooks from what the Trainer and the user have set so far."""
        progress, metering = self._progress, self._metering
        if not first:
            self._make_plan(session)
        self._binder = binder = HookBinder(self, session.module, self.callbacks, session.scoped)
        hooks = binder.fit(before_watching=(metering.reduce_train,))
        own_schedule = binder.overridden("lr_scheduler_step")
        parts = FitParts(
            **session.training_callables(
                binder,
                progress,
                accumulate=self.accumulate_grad_batches,
                clip_val=self.gradient_clip_val,
                clip_algorithm=self.gradient_clip_algorithm,
                keep_outputs=bool(hooks.on_train_batch_end),
            ),
            transfer=_starting(metering.train, session.transfer()),
            schedule=plain_schedule(session.schedulers, progress, own_schedule)
            if session.module.automatic_optimization
            else None,
            schedule_on_metric=watching_schedule(
                session.schedulers, progress, own_schedule, lambda: self.callback_metrics
            )
            if session.module.automatic_optimization
            else None,
            log=self._log_step,
            end_batch=self._sync_step if metering.train.may_sync_steps else None,
            end_epoch=metering.reduce_train,
            log_epoch=metering.log_train_epoch,
            close_epoch=self._close_epoch,
            validate=self._validate_in_fit,
            last_validation_s=self._last_validation_clock if self._plan.validate_every_s is not None else None,
        )
        self.strategy.gradients = session.gradients
        return parts, hooks

    def _make_plan(self, session: Session) -> None:
        settings, loader = self.settings, session.train_loader
        assert loader is not None
        batches = loader.batches
        interval = self.val_check_interval
        every: float = math.inf
        if isinstance(interval, int):
            if interval > batches and self.check_val_every_n_epoch is not None and self._validates(session):
                raise MisconfigurationException(
                    f"val_check_interval={interval} is longer than the epoch of {int(batches)} batches, so validation "
                    "would never run. Give at most that, or check_val_every_n_epoch=None to count across epochs."
                )
            every = interval
        elif isinstance(interval, float) and interval != 1.0:
            if batches == math.inf:
                raise MisconfigurationException(
                    f"val_check_interval={interval!r} is a fraction of the epoch, but the training loader does not "
                    "know its length. Give 1.0, a number of batches, or a duration."
                )
            every = max(1, int(batches * interval))
        self._plan = Plan(
            max_epochs=settings.max_epochs,
            min_epochs=settings.min_epochs,
            max_steps=settings.max_steps,
            min_steps=settings.min_steps,
            batches=batches,
            accumulate=self.accumulate_grad_batches,
            validates=self._validates(session),
            validate_every_batches=every,
            validate_every_epochs=self.check_val_every_n_epoch,
            validate_every_s=interval.total_seconds() if isinstance(interval, timedelta) else None,
            log_every=settings.log_every_n_steps,
            log_always=bool(settings.fast_dev_run),
        )

    def _validates(self, session: Session) -> bool:
        return (
            session.sources["val"].is_defined
            and self._binder.overridden("validation_step") is not None
            and self.limit_val_batches != 0
        )

    def _begin_training(self, session: Session) -> None:
        assert session.train_loader is not None
        session.train_loader.setup(self._progress.epoch)
        self._make_plan(session)
        self.state.stage = RunningStage.TRAINING
        if self._plan.validates and "val" not in session.eval_loaders:
            self._eval_loaders(session, "val")
        if session.resumed is not None:
            _checkpointing.restore_position(self, session)
        self._last_validation_s = time.monotonic()
        if self._plan.finished(self._progress):
            return
        _verify.modules_in_eval_mode(session.module)
        for hook in self._binder.both("on_train_start"):
            hook()
        self._trained = True
        if session.resumed is not None:
            if self._progress.epoch_started and not self._progress.epoch_ended:
                self._epoch_batches()  # making the iterator draws random numbers that the saved run had drawn before
            _checkpointing.restore_rng(self, session)

    _trained = False

    def _end_training(self, session: Session, hooks: Any) -> None:
        if self._trained:
            self._trained = False
            for hook in hooks.on_train_end:
                hook()

    def _epoch_batches(self) -> Any:
        session, progress = self._session, self._progress
        assert session is not None
        assert session.train_loader is not None
        return session.train_loader.epoch_batches(progress.epoch, progress.batch)

    def _sync_step(self) -> None:
        due = not self._progress.window_is_open and self._plan.logs(self._progress)
        self._metering.train.pending_sync(at_flush=due)

    def _log_step(self) -> None:
        """A declared point inside an epoch: a row to the loggers, and the ranks' agreement whether to stop."""
        self._metering.log_train_step()
        self._agree_to_stop()

    def _agree_to_stop(self) -> None:
        if self._agreement is not None and self._agreement.point(self._signals.poll()):
            self._progress.stop(str(self._agreement.reason), now=True)

    def _watch_signals(self) -> None:
        """One process stops at the next batch; several agree at the next declared point."""
        self._agreement = None
        if self.world.world_size > 1:
            self._calls += 1
            self._agreement = StopAgreement(
                group_store(), self.world.rank, self.world.world_size, name=f"fulmen/stop/{self._calls}"
            )
            self._signals = StopSignal()
        else:
            self._signals = StopSignal(on_stop=lambda reason: self._progress.stop(reason, now=True))

    def _leave_if_signalled(self) -> None:
        if self._progress.stop_now and self.received_sigterm:
            raise SIGTERMException(str(self._progress.stop_reason))

    @property
    def received_sigterm(self) -> bool:
        """Whether this run was asked to end by SIGTERM, here or on another rank."""
        reason = self._signals.reason or (self._agreement.reason if self._agreement is not None else None)
        return reason is not None and "SIGTERM" in reason

    def _close_epoch(self) -> None:
        """After the hooks at the end of a training epoch."""
        session = self._session
        assert session is not None
        assert session.train_loader is not None
        self._metering.close_train_epoch()
        session.train_loader.end_epoch()
        self._agree_to_stop()
        progress = self._progress
        if progress.stop_reason is not None and not self._plan.may_stop(replace(progress, epoch=progress.epoch + 1)):
            rank_zero_info(
                f"asked to stop ({progress.stop_reason}), but min_epochs={self._plan.min_epochs} or "
                f"min_steps={self._plan.min_steps} is not reached: training goes on."
            )

    def _early_train_loader(self, session: Session) -> None:
        session.train_loader = self._train_loader(session)
        session.train_loader.setup(self._progress.epoch)

    # ------------------------------------------------------------------ evaluation

    def _splitter(self) -> Splitter:
        return Splitter(
            rank=self.world.data_parallel_rank,
            world_size=self.world.data_parallel_size,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            enabled=self.settings.use_distributed_sampler,
            overfit=bool(self.settings.overfit_batches),
        )

    def _eval_loaders(self, session: Session, stage: str) -> EvalLoaders:
        """The loaders of ``stage``, asked for when first needed and when it is time to ask again."""
        loaders = session.eval_loaders.get(stage)
        if loaders is None:
            session.eval_loaders[stage] = loaders = EvalLoaders(
                session.sources[stage],
                limit=getattr(self, f"limit_{stage}_batches"),
                limit_name=f"limit_{stage}_batches",
                split=self._splitter().evaluation,
                process=session.process_loader(),
            )
            loaders.setup()
            _verify.step_takes_dataloader_idx(session.module, stage, several=loaders.several)
            self._val_loaded_in = self._progress.epoch
        elif stage == "val" and session.fn is TrainerFn.FITTING:
            every = self.settings.reload_dataloaders_every_n_epochs
            if every and self._progress.epoch - self._val_loaded_in >= every:
                loaders.setup(again=True)
                self._val_loaded_in = self._progress.epoch
        return loaders

    _val_loaded_in = 0

    def _eval_arguments(
        self, session: Session, stage: str, store: MetricStore, *, limit: float = math.inf, in_fit: bool
    ) -> tuple[EvalParts, Any, list[Any], list[float]]:
        loaders = self._eval_loaders(session, stage)
        name = "validation" if stage == "val" else stage
        hooks = self._binder.evaluation(name, several_loaders=loaders.several)
        modes = ModelModes(session.module)
        metering = self._metering
        # Where inference needs no wrapper, validation inside fit does without it too: ranks may have different numbers
        # of batches, and a wrapper's forward may be a collective.
        bare = supports(self.assembly.strategy, SupportsInferencePlacement)
        if in_fit and bare:
            session.share_buffers()
        step = session.step_method(f"{name}_step", several_loaders=loaders.several, bind=in_fit and not bare)
        context = session.forward_context()
        parts = EvalParts(
            step=step if context is None else _inside(context, step),
            transfer=_starting_eval(store, session.transfer(), several=loaders.several),
            no_grad=session.no_grad(inference_mode=not in_fit and self._uses_inference_mode()),
            model_eval=modes.eval,
            model_train=modes.restore,
            end_batch=metering.eval_end_batch(store, several=loaders.several),
            reduce=store.reduce_epoch,
            log=partial(metering.log_eval_epoch, store),
        )
        return parts, hooks, loaders.loaders, [min(limit, each) for each in loaders.limits]

    def _sanity_check(self, session: Session) -> None:
        limit = self.settings.num_sanity_val_steps
        if limit == 0 or not self._validates(session) or self._progress.batch > 0:
            return  # a run resumed inside an epoch has validated before
        self.state.stage = RunningStage.SANITY_CHECKING
        with isolate_rng():
            for hook in self._binder.both("on_sanity_check_start"):
                hook()
            store = self._metering.begin_eval("sanity_check")
            evaluate(*self._eval_arguments(session, "val", store, limit=limit, in_fit=True))
            for hook in self._binder.both("on_sanity_check_end"):
                hook()
        self._metering.end_eval_in_fit(sanity_check=True)
        self.state.stage = RunningStage.TRAINING

    def _validate_in_fit(self) -> None:
        """Validation inside ``fit``: between two training batches."""
        session = self._session
        assert session is not None
        self.state.stage = RunningStage.VALIDATING
        if not self._progress.window_is_open:
            session.module.on_validation_model_zero_grad()
        store = self._metering.begin_eval("validate")
        parts, hooks, loaders, limits = self._eval_arguments(session, "val", store, in_fit=True)
        hooks = replace(hooks, on_epoch_end=(*hooks.on_epoch_end, self._mark_validated))
        evaluate(parts, hooks, loaders, limits)
        self._metering.end_eval_in_fit(sanity_check=False)
        self._last_validation_s = time.monotonic()
        self.state.stage = RunningStage.TRAINING

    def _mark_validated(self) -> None:
        # Before on_validation_end: a checkpoint written there must not validate again when it is resumed.
        self._progress.validated_at = self._progress.total_batches

    def _last_validation_clock(self) -> float:
        return self._last_validation_s

    def _prepare_eval(self, session: Session, fn: TrainerFn, *, verbose: bool) -> Any:
        stage = "val" if fn is TrainerFn.VALIDATING else "test"
        parts, hooks, loaders, limits = self._eval_arguments(session, stage, self._metering.train, in_fit=False)
        return replace(parts, log=partial(self._conclude, parts, len(loaders), verbose)), hooks, loaders, limits

    def _conclude(self, parts: EvalParts, num_dataloaders: int, verbose: bool) -> None:
        """After the last batch of ``validate`` or ``test``: rows, the returned metrics, and their table."""
        parts.log()
        self._results = self._reporter.results(self._metering.train, num_dataloaders=num_dataloaders)
        if verbose and self.world.is_global_zero:
            assert self.state.stage is not None
            print_results(self._results, str(self.state.stage))

    def _prepare_predict(self, session: Session, *, keep: bool) -> Any:
        loaders = self._eval_loaders(session, "predict")
        modes = ModelModes(session.module)
        step = session.step_method("predict_step", several_loaders=loaders.several, bind=False)
        context = session.forward_context()
        parts = PredictParts(
            step=step if context is None else _inside(context, step),
            transfer=session.transfer(),
            no_grad=session.no_grad(inference_mode=self._uses_inference_mode()),
            model_eval=modes.eval,
            model_train=modes.restore,
            keep=(_as_it_is if self.world.device.type == "cpu" else _to_cpu) if keep else None,
        )
        hooks = self._binder.evaluation("predict", several_loaders=loaders.several)
        return parts, hooks, loaders.loaders, loaders.limits

    def _uses_inference_mode(self) -> bool:
        # gloo reduces tensors in place, which inference tensors refuse.
        return self.settings.inference_mode and not (self.world.world_size > 1 and self.world.device.type == "cpu")

    # ------------------------------------------------------------------ the end

    def _tear_down(self, session: Session) -> None:
        module, fn, binder = session.module, session.fn, self._binder
        session.close_loaders()
        self._metering.finish()
        if self.world.device.type != "cpu":
            module.cpu()
        if fn is TrainerFn.FITTING:
            for hook in binder.both("on_fit_end"):
                hook()
        if session.datamodule is not None:
            session.datamodule.teardown(fn.value)
        for hook in binder.of_callbacks("teardown"):
            hook(stage=fn.value)
        session.scoped("teardown", module.teardown)(fn.value)
        if self.world.is_global_zero:
            for logger in self.loggers:
                logger.finalize("success")

    def _fail(self, session: Session, error: BaseException) -> None:
        """Tell everybody that the run failed; the error itself goes on to the caller, with where it happened."""
        self.state.status = TrainerStatus.INTERRUPTED
        where = f"rank {self.world.rank}, epoch {self._progress.epoch}, batch {self._progress.batch}"
        error.add_note(f"fulmen: in {session.fn.value}, {where}, optimizer step {self._progress.updates}")
        session.close_loaders()
        for module in session.logging_modules():
            module.__dict__["_metric_store"] = None
        for callback in self.callbacks:
            handler = getattr(callback, "on_exception", None)
            if handler is not None:
                handler(self, session.module, error)
        if session.datamodule is not None:
            session.datamodule.on_exception(error)
        if self.world.is_global_zero:
            for logger in self.loggers:
                logger.finalize("failed")
        self.state.stage = None

    # ------------------------------------------------------------------ for users

    def save_checkpoint(
        self,
        filepath: str | os.PathLike[str],
        weights_only: bool | None = None,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write a checkpoint. Every rank must call it; rank 0 writes.

        Args:
            filepath: a path or any fsspec URL.
            weights_only: leave out optimizers, schedulers and callbacks.
            storage_options: for the storage behind the URL.

        Raises:
            MisconfigurationException: no model is attached yet.
        """
        if self._session is None:
            raise MisconfigurationException(
                "save_checkpoint() needs a model, and this trainer has none yet. "
                "Call fit, validate, test or predict first."
            )
        _checkpointing.save(self, self._session, os.fspath(filepath), bool(weights_only), storage_options)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on local rank 0, without breaking the progress bar."""
        if self.world.local_rank != 0:
            return
        bar = self.progress_bar_callback
        if bar is not None and hasattr(bar, "print"):
            bar.print(*args, **kwargs)
        else:
            print(*args, **kwargs)

    def explain(self, model: LightningModule | None = None) -> str:
        """Print, and return, what a fit does in order, and which distribution supplies each part."""
        text = explain_run(self, model)
        print(text)
        return text


_FIRST_STAGE = {
    TrainerFn.FITTING: RunningStage.TRAINING,
    TrainerFn.VALIDATING: RunningStage.VALIDATING,
    TrainerFn.TESTING: RunningStage.TESTING,
    TrainerFn.PREDICTING: RunningStage.PREDICTING,
}
_STORE = {
    TrainerFn.FITTING: "train",
    TrainerFn.VALIDATING: "validate",
    TrainerFn.TESTING: "test",
    TrainerFn.PREDICTING: "predict",
}


def _nothing() -> None:
    """What the launcher runs: this process goes on by itself."""


def _starting(store: MetricStore, transfer: Callable[[object, int], object]) -> Callable[[object], object]:
    """``transfer`` that also tells the store which batch is being trained."""
    if transfer is unchanged:
        return store.start_batch

    def start(batch: object) -> object:
        return store.start_batch(transfer(batch, 0))

    return start


def _starting_eval(
    store: MetricStore, transfer: Callable[[object, int], object], *, several: bool
) -> Callable[[object, int], object]:
    def start(batch: object, dataloader_idx: int) -> object:
        return store.start_batch(transfer(batch, dataloader_idx), 0, dataloader_idx if several else None)

    return start


def _inside(
    context: Callable[[], AbstractContextManager[object]], step: Callable[..., object]
) -> Callable[..., object]:
    def run(*args: object) -> object:
        with context():
            return step(*args)

    return run


def _as_it_is(outputs: object) -> object:
    return outputs


def _to_cpu(outputs: object) -> object:
    return move_data_to_device(outputs, torch.device("cpu"))
