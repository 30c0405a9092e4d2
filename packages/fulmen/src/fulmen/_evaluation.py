"""Everything in one call that trains nothing: sanity check, validation inside ``fit``, validate, test, predict.

It composes the parts with which ``evaluate.py`` and ``predict.py`` run.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from fulmen import _whereabouts
from fulmen._predictions import PredictionRecord
from fulmen._raw_batches import RawLoader, fetches_itself, hook_of_raw
from fulmen._reporting import print_results
from fulmen._run_loaders import eval_loaders
from fulmen._session import ModelModes, unchanged
from fulmen._uneven import joined_loaders
from fulmen.callbacks.prediction_writer import BasePredictionWriter
from fulmen.evaluate import EvalParts, evaluate
from fulmen.predict import PredictParts
from fulmen.states import RunningStage, TrainerFn
from fulmen_fabric import collect_rng_state, isolate_rng, move_data_to_device
from fulmen_fabric.abilities import supports
from fulmen_protocols import LimitsInferenceMode, SupportsInferencePlacement, SupportsShardedState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from fulmen._loaders import EvalLoaders
    from fulmen._metering import Metering
    from fulmen._session import Session
    from fulmen.hooks import EvalHooks, HookBinder
    from fulmen.metrics import MetricStore
    from fulmen.progress import Progress
    from fulmen.settings import Settings
    from fulmen.states import TrainerState

    EvalArguments = tuple[EvalParts, EvalHooks, Sequence[Iterable[object]], list[float]]
    PredictArguments = tuple[PredictParts, EvalHooks, Sequence[Iterable[object]], list[float]]

__all__ = ["Evaluation"]


class Evaluation:
    """The evaluations of one call.

    Args:
        session: what is evaluated.
        settings: asked for whenever they are needed, since users change them during a run.
        binder: the hooks; replaced when the user has changed them.
        metering: where metrics go, and who knows the results.
        progress: read, but for the mark that a validation has been done.
        state: told which stage is running.
    """

    def __init__(
        self,
        session: Session,
        settings: Callable[[], Settings],
        binder: HookBinder,
        metering: Metering,
        progress: Progress,
        state: TrainerState,
    ) -> None:
        self._session, self._settings, self.binder = session, settings, binder
        self._metering, self._progress, self._state = metering, progress, state
        self._last_validation_s = 0.0
        self.results: list[dict[str, float]] = []
        """Of ``validate`` or ``test``: the logged metrics, one dict per loader."""

    # ------------------------------------------------------------------ inside fit

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate."""
        return (
            self._session.sources["val"].is_defined
            and self.binder.overridden("validation_step") is not None
            and self._settings().limit_val_batches != 0
        )

    def sanity_check(self) -> None:
        """Try a few validation batches before training; metrics and random states are as before afterwards."""
        limit = self._settings().num_sanity_val_steps
        inside_epoch = self._progress.batch > 0 and not self._progress.epoch_is_whole
        if limit == 0 or not self.validates or inside_epoch:
            return  # what goes on inside of an epoch is as before; after one, code may have changed
        self._state.stage = RunningStage.SANITY_CHECKING
        with isolate_rng():
            for hook in self.binder.of_callbacks("on_sanity_check_start"):
                hook()
            store = self._metering.begin_eval("sanity_check")
            arguments = self._arguments("val", store, limit=limit, in_fit=True)
            self._session.measuring.part("sanity check", evaluate)(*arguments)
            for hook in self.binder.of_callbacks("on_sanity_check_end"):
                hook()
        self._metering.end_eval_in_fit(sanity_check=True)
        self._state.stage = RunningStage.TRAINING

    def validate(self) -> None:
        """Validate between two training batches."""
        self._state.stage = RunningStage.VALIDATING
        began_s = time.perf_counter()
        # A checkpoint that is saved on the way resumes with the whole validation.
        self._session.rng_before_validation = collect_rng_state(self._session.world.device)
        if not self._progress.window_is_open:
            name = "on_validation_model_zero_grad"
            self._session.scoped(name, self._session.module.on_validation_model_zero_grad)()
        store = self._metering.begin_eval("validate")
        parts, hooks, loaders, limits = self._arguments("val", store, in_fit=True)
        hooks = replace(hooks, on_epoch_end=(*hooks.on_epoch_end, self._mark_validated))
        evaluate(parts, hooks, loaders, limits)
        self._metering.end_eval_in_fit(sanity_check=False)
        self.start_clock()
        if self._session.data_waits is not None:
            self._session.data_waits.validation_s += time.perf_counter() - began_s
        self._state.stage = RunningStage.TRAINING

    def _mark_validated(self) -> None:
        # Before on_validation_end: a checkpoint written there must not validate again when it is resumed.
        self._progress.validated_at = self._progress.total_batches
        self._session.rng_before_validation = None

    def start_clock(self) -> None:
        """Count the time to the next validation from now."""
        self._last_validation_s = time.monotonic()

    def last_validation_s(self) -> float:
        """``time.monotonic()`` when the clock was last started."""
        return self._last_validation_s

    # ------------------------------------------------------------------ a call of its own

    def prepare(self) -> EvalArguments:
        """What ``evaluate`` needs for ``trainer.validate`` or ``trainer.test``; it leaves ``results`` behind."""
        stage = "val" if self._session.fn is TrainerFn.VALIDATING else "test"
        parts, hooks, loaders, limits = self._arguments(stage, self._metering.train, in_fit=False)
        return replace(parts, log=partial(self._conclude, parts, len(loaders))), hooks, loaders, limits

    def _conclude(self, parts: EvalParts, num_dataloaders: int) -> None:
        """After the last batch of ``validate`` or ``test``: rows, and the returned metrics."""
        parts.log()
        self.results = self._metering.reporter.results(self._metering.train, num_dataloaders=num_dataloaders)

    def show_results(self) -> None:
        """Print the returned metrics as a table; for the end, when no progress bar is drawn any more."""
        if self._session.world.is_global_zero:
            assert self._state.stage is not None
            print_results(self.results, str(self._state.stage))

    def prepare_predict(self, *, keep: bool) -> PredictArguments:
        """What ``predict`` needs; ``keep``: the outputs are returned."""
        session = self._session
        measuring = session.measuring
        writers = [callback for callback in self.binder.callbacks if isinstance(callback, BasePredictionWriter)]
        loaders = self.loaders("predict", track_indices=bool(writers))
        session.predictions = record = PredictionRecord(len(loaders.loaders), loaders.trackers, returns=keep)
        copy = _as_it_is if session.world.device.type == "cpu" else _to_cpu
        keep = keep or any(writer.interval.on_epoch for writer in writers)
        modes = ModelModes(session.module)
        step = session.step_method("predict_step", several_loaders=loaders.several, bind=not self._runs_bare)
        context = session.forward_context()
        raw = fetches_itself(session.module.predict_step)
        parts = PredictParts(
            step=step if context is None else _inside(context, step),
            transfer=unchanged if raw else session.transfer(),
            no_grad=session.no_grad(inference_mode=self._uses_inference_mode()),
            model_eval=measuring.hook(session.module, "on_predict_model_eval", modes.eval),
            model_train=modes.restore,
            keep=copy if keep else None,
            predictions=record.kept,
        )
        hooks = self.binder.evaluation("predict", several_loaders=loaders.several)
        hooks = replace(
            hooks,
            on_model_eval=(modes.remember, *hooks.on_model_eval) if hooks.on_model_eval else (),
            on_batch_start=(
                *_whereabouts.evaluation("predict", self._progress),
                *((record.begin_batch,) if writers else ()),
                *hooks.on_batch_start,
            ),
            on_end=(record.release, *hooks.on_end),
        )
        given = loaders.loaders
        if raw:
            hooks, given = _told_of_fetched(hooks), _raw(loaders, loaders.limits, None)
        measured = measuring.loaders("[_PredictionLoop].predict_next", given, loaders.limits)
        return parts, hooks, measured, loaders.limits

    # ------------------------------------------------------------------ what they share

    def loaders(self, stage: str, *, track_indices: bool = False) -> EvalLoaders:
        """The loaders of ``stage``, asked for when first needed and when it is time to ask again.

        Args:
            stage: whose loaders.
            track_indices: whether somebody wants to know which samples a batch holds.
        """
        epoch = self._progress.epoch
        return eval_loaders(self._session, self._settings(), stage, epoch=epoch, track_indices=track_indices)

    def _arguments(self, stage: str, store: MetricStore, *, limit: float = math.inf, in_fit: bool) -> EvalArguments:
        session, metering, loaders = self._session, self._metering, self.loaders(stage)
        name = "validation" if stage == "val" else stage
        hooks = self.binder.evaluation(name, several_loaders=loaders.several)
        phase = "sanity_check" if self._state.stage is RunningStage.SANITY_CHECKING else name
        hooks = replace(hooks, on_batch_start=(*_whereabouts.evaluation(phase, self._progress), *hooks.on_batch_start))
        modes = ModelModes(session.module)
        if hooks.on_model_eval:
            hooks = replace(hooks, on_model_eval=(modes.remember, *hooks.on_model_eval))
        # Where inference needs no wrapper, validation inside fit does without it too: ranks may have different numbers
        # of batches, and a wrapper's forward may be a collective.
        bare = self._runs_bare
        if in_fit and bare:
            session.share_buffers()
        step = session.step_method(f"{name}_step", several_loaders=loaders.several, bind=not bare)
        raw = fetches_itself(getattr(session.module, f"{name}_step"))
        context = session.forward_context()
        parts = EvalParts(
            step=step if context is None else _inside(context, step),
            transfer=unchanged if raw else _starting(store, session.transfer(), several=loaders.several),
            no_grad=session.no_grad(inference_mode=not in_fit and self._uses_inference_mode()),
            model_eval=session.measuring.hook(session.module, f"on_{name}_model_eval", modes.eval),
            model_train=modes.restore,
            end_batch=metering.eval_end_batch(store, several=loaders.several),
            reduce=session.measuring.part("logging", store.reduce_epoch),
            log=session.measuring.part("logging", partial(metering.log_eval_epoch, store)),
        )
        # Without a limit of its own the loaders' own list: a tuner may change it when the evaluation starts.
        limits = loaders.limits if limit == math.inf else [min(limit, each) for each in loaders.limits]
        given = loaders.loaders
        if raw:
            hooks, given = _told_of_fetched(hooks), _raw(loaders, limits, store)
        if not bare and not raw and session.world.world_size > 1:
            # The forward pass is a collective: ranks that are through must join those that are not.
            given, limits = self._joined(parts, given, limits), [math.inf] * len(given)
        measured = session.measuring.loaders(f"[_EvaluationLoop].{stage}_next", given, limits)
        return parts, hooks, measured, limits

    def _joined(
        self, parts: EvalParts, loaders: Sequence[Iterable[object]], limits: Sequence[float]
    ) -> list[Iterable[object]]:
        several = len(loaders) > 1

        def step_of(index: int) -> Callable[[object], object]:
            def step(batch: object) -> object:
                batch = parts.transfer(batch, index)
                return parts.step(batch, 0, index) if several else parts.step(batch, 0)

            return step

        return joined_loaders(self._session, loaders, limits, [step_of(index) for index in range(len(loaders))])

    def _uses_inference_mode(self) -> bool:
        # gloo reduces tensors in place, which inference tensors refuse.
        world = self._session.world
        strategy = self._session.assembly.strategy
        if supports(strategy, SupportsShardedState):
            return False  # weights that are gathered then would be inference tensors in the next training step
        if supports(strategy, LimitsInferenceMode) and not strategy.allows_inference_mode:
            return False
        return self._settings().inference_mode and not (world.world_size > 1 and world.device.type == "cpu")

    @property
    def _runs_bare(self) -> bool:
        """Whether no forward pass of an evaluation needs the strategy's wrapper."""
        return supports(self._session.assembly.strategy, SupportsInferencePlacement)


def _told_of_fetched(hooks: EvalHooks) -> EvalHooks:
    return replace(
        hooks,
        on_batch_start=tuple(hook_of_raw(hook, outputs_first=False) for hook in hooks.on_batch_start),
        on_batch_end=tuple(hook_of_raw(hook, outputs_first=True) for hook in hooks.on_batch_end),
    )


def _raw(loaders: EvalLoaders, limits: list[float], store: MetricStore | None) -> list[Iterable[object]]:
    """``loaders`` for a step that fetches its batches itself."""

    def told(index: int) -> Callable[[object], object]:
        def start(batch: object) -> object:
            if store is None:
                return batch
            return store.start_batch(batch, 0, index if loaders.several else None)

        return start

    pairs = zip(loaders.loaders, limits, strict=True)
    return [RawLoader(loader, limit, index, told(index)) for index, (loader, limit) in enumerate(pairs)]


def _starting(
    store: MetricStore, transfer: Callable[[object, int], object], *, several: bool
) -> Callable[[object, int], object]:
    """``transfer`` that also tells the store which batch is being evaluated."""

    def start(batch: object, dataloader_idx: int) -> object:
        return store.start_batch(transfer(batch, dataloader_idx), 0, dataloader_idx if several else None)

    return start


def _inside(
    context: Callable[[], AbstractContextManager[object]], step: Callable[..., object]
) -> Callable[..., object]:
    """``step``, run inside a new ``context`` each time."""

    def run(*args: object) -> object:
        with context():
            return step(*args)

    return run


def _as_it_is(outputs: object) -> object:
    return outputs


def _to_cpu(outputs: object) -> object:
    return move_data_to_device(outputs, torch.device("cpu"))
