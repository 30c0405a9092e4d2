"""ModelCheckpoint: saves the model at set moments and keeps the best, the newest or all of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fulmen import _files
from fulmen.callbacks import _checkpoint_retention as retention
from fulmen.callbacks._checkpoint_arguments import check_arguments
from fulmen.callbacks._checkpoint_name import default_dirpath, fill_in, name_fields, pattern_of
from fulmen.callbacks._checkpoint_plan import describe_plan, epochs_end_with_validation
from fulmen.callbacks._checkpoint_report import tell_loggers, write_scores
from fulmen.callbacks._failing_together import all_ranks_fail, saves_when
from fulmen.callbacks._monitor import Moment, MonitoredValue
from fulmen.callbacks._pickled import plain_state, restore
from fulmen.callbacks._shared_clock import SharedClock
from fulmen.callbacks.checkpoint import Checkpoint
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from datetime import timedelta
    from os import PathLike

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["ModelCheckpoint"]

_RANKING = ("best_model_path", "best_model_score", "kth_best_model_path", "kth_value", "current_score")


class ModelCheckpoint(Checkpoint):
    """Save checkpoints by a schedule, and delete those of its own that are no longer among the best.

    One of three triggers says when: every so many epochs (the default, 1), optimizer steps, or a time. With ``monitor``
    the best are kept, judged only by values that were produced at the moment of saving: a save that falls due while the
    value is an old one waits for the end of the validation (or epoch) that produces it.

    It never deletes a file that it did not write, nor the one that the run was resumed from, nor anything outside of
    ``dirpath``; and it deletes only after the new file is complete.

    Args:
        dirpath: folder or URL; by default the first logger's ``save_dir/name/version_N/checkpoints``, without loggers
            ``default_root_dir/checkpoints``.
        filename: without extension, with fields such as ``{epoch}``, ``{step}`` and ``{val_loss:.2f}``; by default
            ``{epoch}-{step}``.
        monitor: name of the logged value that decides which are best; None: the newest are.
        verbose: whether to print what was saved.
        save_last: True also keeps a copy named ``last``; ``"link"`` a symbolic link to the newest file.
        save_top_k: how many of the best to keep: -1 all, 0 none; without ``monitor`` only -1, 0 and 1.
        save_on_exception: whether to save when a fit fails. On several ranks that takes all of them failing at the same
            step; the exception's notes say so where one failed alone. A fit that SIGTERM ends is saved without it, too,
            by the first checkpoint callback, unless that keeps no file or another one saves on exceptions.
        save_weights_only: whether to leave out what only resuming needs.
        mode: ``"min"`` or ``"max"``: which values of ``monitor`` are better. NaN is worst.
        auto_insert_metric_name: whether a field becomes ``name=value``, or the value alone.
        every_n_train_steps: trigger, in optimizer steps.
        train_time_interval: trigger, in time since the last save.
        every_n_epochs: trigger, in epochs; 0 turns any trigger off.
        save_on_train_epoch_end: whether epochs are saved when training's part ends, or when validation does; by default
            when validation does, unless it runs once at the end of every epoch or not at all.
        enable_version_counter: whether a name that is taken gets ``-v1``, ``-v2``, ...; otherwise it is overwritten.

    Raises:
        MisconfigurationException: arguments contradict each other or are out of range.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        check_arguments(monitor, mode, save_top_k, every_n_train_steps, every_n_epochs, train_time_interval)
        self.dirpath = None if dirpath is None else _files.real(_files.absolute(dirpath))
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        none_given = every_n_train_steps is None and every_n_epochs is None and train_time_interval is None
        self._every_n_epochs = 1 if none_given else (every_n_epochs or 0)
        self._every_n_train_steps = every_n_train_steps or 0
        self._train_time_interval = train_time_interval
        self._clock = SharedClock(train_time_interval.total_seconds()) if train_time_interval else None

        self.best_model_path = ""
        self.best_model_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.kth_best_model_path = ""
        self.kth_value = retention.worst_value(mode)
        self.last_model_path = ""
        self.current_score: Tensor | None = None

        # What this run has written and not yet deleted; retention looks nowhere else.
        self._written: dict[str, None] = {}
        self._value = MonitoredValue(monitor)
        self._save_is_pending = False
        self._last_checkpoint_saved = ""
        self._last_global_step_saved = 0
        self._step_of_last = -1
        self._failures = 0
        self._next_step_due = 0
        self._first_batch = True

    # -- moments ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out the folder, the same on every rank."""
        self.dirpath = trainer.strategy.broadcast(self._resolve_dirpath(trainer))
        if self.save_last == "link" and not _files.is_local(self.dirpath):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_last='link') cannot link in {self.dirpath!r}. Use save_last=True there."
            )
        new = stage == "fit" and trainer.ckpt_path is None and self.save_top_k != 0
        if new and trainer.is_global_zero and _files.list_folder(self.dirpath):
            rank_zero_warn(f"the checkpoint folder {self.dirpath!r} is not empty; what is there is kept.")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a monitored name that looks like a slip."""
        self._value.warn_if_misspelt("ModelCheckpoint", trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps and time from here."""
        self._value.start()
        self._save_is_pending = False
        self._last_global_step_saved = trainer.global_step
        self._set_next_step(trainer.global_step)
        self._first_batch = self.monitor is not None
        if self._clock is not None:
            self._clock.restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a number of steps or a time is over."""
        if self._first_batch:
            self._first_batch = False
            self._value.after_first_batch(trainer.callback_metrics)
        if self._every_n_train_steps:
            step = trainer.global_step
            if step < self._next_step_due:
                return
            self._set_next_step(step)
        elif self._clock is None or trainer._progress.window_is_open:  # pyright: ignore[reportPrivateUsage]
            return  # inside an accumulation window a save waits for the update that ends it
        elif not self._clock.is_over(trainer.strategy.broadcast):
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        self._save_if_fresh(trainer, "step")
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _set_next_step(self, step: int) -> None:
        # Several optimizers advance the count by more than one: a multiple that is passed over counts as well.
        every = self._every_n_train_steps
        self._next_step_due = (step // every + 1) * every if every else 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether validation is what produces the monitored value."""
        if self.monitor is not None and not self._is_inert(trainer):
            self._value.before_validation(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if validation's end is the moment, or a save waits for it."""
        if self._is_inert(trainer):
            return
        if self.monitor is not None:
            self._value.after_validation(trainer.callback_metrics, trainer.global_step)
        self._end_of("validation", trainer, is_moment=not self._should_save_on_train_epoch_end(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the epoch's end is the moment, or a save waits for it."""
        if self._is_inert(trainer):
            return
        if self.monitor is not None:
            self._value.after_epoch(trainer.callback_metrics)
        self._end_of("epoch", trainer, is_moment=self._should_save_on_train_epoch_end(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a last checkpoint if none was ever saved."""
        if self._save_is_pending:
            rank_zero_warn(
                f"ModelCheckpoint(monitor={self.monitor!r}): a save was due, and training ended before the value was "
                "produced again. Validate more often, or save without monitor."
            )
        if self.save_last and not self._last_checkpoint_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what there is, if that was asked for, or if SIGTERM ends a fit that nobody else saves."""
        if not saves_when(exception, self, trainer) or self.dirpath is None:
            return
        if self._should_skip_saving_checkpoint(trainer):
            return
        self._failures += 1
        if all_ranks_fail(trainer, f"{self.state_key} #{self._failures}", exception):
            candidates = self._monitor_candidates(trainer)
            filepath = self._get_metric_interpolated_filepath_name(candidates, trainer)
            self._save_checkpoint(trainer, filepath)
            self._save_last_checkpoint(trainer, candidates)
            rank_zero_info(f"saved {filepath} because of {type(exception).__name__}")

    def _end_of(self, moment: Moment, trainer: Trainer, *, is_moment: bool) -> None:
        if self._save_is_pending:
            self._save_if_fresh(trainer, moment)
        elif is_moment and not self._should_skip_saving_checkpoint(trainer):
            if self._every_n_epochs and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
                self._save_if_fresh(trainer, moment)
        else:
            return
        if self._last_global_step_saved == trainer.global_step and not self._save_is_pending:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _is_inert(self, trainer: Trainer) -> bool:
        return bool(trainer.fast_dev_run) or trainer.state.fn != "fit" or trainer.sanity_checking

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return self._is_inert(trainer) or self._last_global_step_saved == trainer.global_step

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        if self._save_on_train_epoch_end is not None:
            return self._save_on_train_epoch_end
        return epochs_end_with_validation(trainer)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save_if_fresh(self, trainer: Trainer, moment: Moment) -> None:
        """Save the top k now, or note that it waits for a value of ``monitor`` that belongs to the saved weights."""
        if self.monitor is not None and self.save_top_k != 0:
            metrics = trainer.callback_metrics
            fresh, known = self._value.is_fresh(metrics, moment, trainer.global_step), self.monitor in metrics
            if not known and self.monitor in self._monitor_candidates(trainer):
                fresh = known = True  # "step", "epoch", or what a subclass computes: made now, not logged
            if trainer.world_size > 1:  # rank 0's word counts, for others may not log the value
                fresh, known = trainer.strategy.broadcast((fresh, known))
            if not fresh:
                if not known and (moment == "epoch" or (not self._save_is_pending and moment != "step")):
                    is_over = self._value.validated_at is not None and moment == "epoch"
                    error = MisconfigurationException if is_over else None
                    self._value.miss(
                        "ModelCheckpoint", metrics, error, meanwhile=" Until then nothing is ranked or kept."
                    )
                self._save_is_pending = True
                return
        self._save_is_pending = False
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            self._save_none_monitor_checkpoint(trainer, monitor_candidates)
            return
        own = monitor_candidates.get(self.monitor)
        current = None if own is None else own.cpu()  # the one wait for the device of a save
        if trainer.world_size > 1:
            of_rank_zero = trainer.strategy.broadcast(current)
            current = of_rank_zero if current is None else current
        assert current is not None
        if self.check_monitor_top_k(trainer, current):
            self._update_best_and_save(current, trainer, monitor_candidates)
        elif self.verbose and trainer.is_global_zero:
            trainer.print(f"Step {trainer.global_step}: {self.monitor} was not in the top {self.save_top_k}.")

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        previous = self.best_model_path
        # A name that does not change is overwritten, unless all are kept.
        replaced = previous if self.save_top_k == 1 else None
        filepath = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, replaced)
        with self._taken_back_on_failure(trainer):
            self.best_model_path = filepath
            self._save_checkpoint(trainer, filepath)
        if self.save_top_k == 1 and previous and self._should_remove_checkpoint(trainer, previous, filepath):
            self._remove_checkpoint(trainer, previous)

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if torch.isnan(current):
            current = retention.worst_value(self.mode)
        with self._taken_back_on_failure(trainer):
            room = self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k
            evicted = "" if room else self.kth_best_model_path
            self.best_k_models.pop(evicted, None)
            filepath = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, evicted)
            self.current_score = self.best_k_models[filepath] = current
            self._rank_models()
            self._save_checkpoint(trainer, filepath)
        if self.verbose and trainer.is_global_zero:
            trainer.print(f"Step {trainer.global_step}: {self.monitor}={current.item():.5f}, saved to {filepath!r}.")
        if evicted and self._should_remove_checkpoint(trainer, evicted, filepath):
            self._remove_checkpoint(trainer, evicted)

    def _rank_no_more_than_asked(self) -> None:
        """A resumed run may have ranked more models than are kept now: the worst are forgotten, their files stay."""
        ranked, surplus = self.best_k_models, len(self.best_k_models) - self.save_top_k
        if self.save_top_k < 1 or surplus < 1:
            return
        worst_first = sorted(ranked, key=lambda path: ranked[path], reverse=self.mode == "min")
        for path in worst_first[:surplus]:
            del ranked[path]
        self._rank_models()

    def _rank_models(self) -> None:
        ranked = self.best_k_models
        self.best_model_path = retention.best_of(ranked, self.mode)
        self.best_model_score = ranked[self.best_model_path]
        self.kth_best_model_path = ""
        if self.save_top_k in (-1, len(ranked)):
            self.kth_best_model_path = retention.worst_of(ranked, self.mode)
            self.kth_value = ranked[self.kth_best_model_path]

    def _taken_back_on_failure(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Ranking and journal change before saving, since the checkpoint holds them; a failed save undoes it."""
        before = {name: getattr(self, name) for name in _RANKING}
        before |= {"best_k_models": dict(self.best_k_models), "_written": dict(self._written)}
        return trainer.strategy.saving.taken_back(partial(vars(self).update, before))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        step = trainer.global_step
        if not self.save_last or (
            self._step_of_last == step == self._last_global_step_saved and self.save_last != "link"
        ):
            return
        previous, saved = self.last_model_path, self._last_checkpoint_saved
        filepath = self._free_path(trainer, monitor_candidates, self.CHECKPOINT_NAME_LAST, keep=previous)
        if self.save_last == "link" and saved and saved != filepath and self.save_top_k != 0:
            self._link_checkpoint(trainer, saved, filepath)
        else:
            self._save_checkpoint(trainer, filepath)
        self.last_model_path, self._step_of_last = filepath, step
        if previous and self._should_remove_checkpoint(trainer, previous, filepath):
            self._remove_checkpoint(trainer, previous)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with self._taken_back_on_failure(trainer):
            self._written[filepath] = None
            trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if self._clock is not None:
            self._clock.restart()
        tell_loggers(self, trainer)

    def _link_checkpoint(self, trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            trainer.strategy.saving.after(partial(_files.link, filepath, linkpath))
        self._written[linkpath] = None
        trainer.strategy.barrier()

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        if previous == current or previous not in self._written or self.dirpath is None:
            return False
        return retention.may_delete(previous, self.dirpath, trainer.ckpt_path)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        trainer.strategy.remove_checkpoint(filepath)
        self._written.pop(filepath, None)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether a checkpoint with the value ``current`` would be kept; all ranks must agree on it."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        better = retention.is_better(current, self.best_k_models[self.kth_best_model_path], self.mode)
        return bool(trainer.strategy.reduce_boolean_decision(better, all=True))

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        return name_fields(trainer)

    def describe_plan(self, trainer: Trainer) -> str:
        """When it will save, what it keeps and where: what ``trainer.explain()`` prints."""
        when = (self._every_n_train_steps, self._train_time_interval, self._every_n_epochs)
        return describe_plan(self, trainer, *when, self._save_on_train_epoch_end, self._resolve_dirpath(trainer))

    @property
    def every_n_epochs(self) -> int | None:
        """The trigger in epochs, 0 when another one is used."""
        return self._every_n_epochs

    # -- names --------------------------------------------------------------------------------------------------------

    def format_checkpoint_name(
        self,
        metrics: Mapping[str, Tensor],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """The path of a checkpoint with these metrics, from ``filename`` or the callback's own template.

        ``ver`` is a version to append, ``prefix`` text to put in front.
        """
        join = self.CHECKPOINT_JOIN_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        equals = self.CHECKPOINT_EQUALS_CHAR if self.auto_insert_metric_name else None
        name = fill_in(template, metrics, equals)
        name = join.join([*([prefix] if prefix else []), name, *([f"v{ver}"] if ver is not None else [])])
        name += self.FILE_EXTENSION
        return _files.join(self.dirpath, name) if self.dirpath else name

    def file_exists(self, filepath: str | PathLike[str], trainer: Trainer) -> bool:
        """Whether rank 0 sees a file or folder there; every rank must call this."""
        return bool(
            trainer.strategy.broadcast(
                trainer.strategy.saving.exists(str(filepath)) if trainer.is_global_zero else False
            )
        )

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: Trainer, del_filepath: str | None = None
    ) -> str:
        return self._free_path(trainer, monitor_candidates, None, keep=del_filepath or "")

    def _free_path(self, trainer: Trainer, metrics: dict[str, Tensor], filename: str | None, *, keep: str) -> str:
        """A path that is not taken (``keep`` does not count as taken), chosen by rank 0, whose metrics name it."""
        path = self.format_checkpoint_name(metrics, filename)
        if trainer.is_global_zero and self._enable_version_counter:
            version = self.STARTING_VERSION
            while path != keep and (path in self.best_k_models or trainer.strategy.saving.exists(path)):
                path = self.format_checkpoint_name(metrics, filename, ver=version)
                version += 1
        return str(trainer.strategy.broadcast(path))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """The files in ``dirpath`` that ``ckpt_path="last"`` may mean."""
        folder = self._resolve_dirpath(trainer)
        equals = self.CHECKPOINT_EQUALS_CHAR if self.auto_insert_metric_name else None
        is_last = pattern_of(self.CHECKPOINT_NAME_LAST, equals, self.CHECKPOINT_JOIN_CHAR, self.FILE_EXTENSION)
        return {_files.join(folder, name) for name in _files.list_folder(folder) if is_last.fullmatch(name)}

    def _resolve_dirpath(self, trainer: Trainer) -> str:
        return self.dirpath or default_dirpath(trainer)

    # -- state --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return plain_state(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)

    @property
    def state_key(self) -> str:
        """The class's name with its trigger and monitor, so that several can be used together."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
        )

    def state_dict(self) -> dict[str, Any]:
        """The ranking and the journal of written files."""
        names = ("monitor", "dirpath", "last_model_path", *_RANKING)
        state: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**state, "best_k_models": dict(self.best_k_models), "written": list(self._written)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the ranking of the resumed run; in another folder, only its best path is kept."""
        self.best_model_path = state_dict["best_model_path"]
        if self.dirpath != state_dict.get("dirpath", self.dirpath):
            rank_zero_warn(
                f"checkpoints are saved in {self.dirpath!r}, and the resumed run saved in {state_dict['dirpath']!r}: "
                "only best_model_path is taken from it."
            )
            return
        self.best_model_score = state_dict["best_model_score"]
        self.kth_best_model_path = state_dict.get("kth_best_model_path", self.kth_best_model_path)
        self.kth_value = state_dict.get("kth_value", self.kth_value)
        self.best_k_models = dict(state_dict.get("best_k_models", {}))
        self._rank_no_more_than_asked()
        self.last_model_path = state_dict.get("last_model_path", "")
        self._written = dict.fromkeys(retention.written_before(state_dict, ranks=bool(self.monitor)))

    def to_yaml(self, filepath: str | PathLike[str] | None = None) -> None:
        """Write the kept paths with their scores; by default to ``best_k_models.yaml`` in ``dirpath``."""
        target = _files.join(str(self.dirpath), "best_k_models.yaml") if filepath is None else str(filepath)
        write_scores(target, self.best_k_models)
