"""SpikeRewind: after a spike of the loss all ranks go back to earlier weights, in memory, and on to other data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch

from fulmen._loss_weights import per_weight
from fulmen._reporting import reporter_of
from fulmen._snapshots import Snapshot, structure
from fulmen.callbacks._loss import loss_among
from fulmen.callbacks._requirements import require_no_engine
from fulmen.callbacks._rewinds import Rewind, TooManyRewindsError, described, loaded, plain, row_of, told
from fulmen.callbacks._spike_watch import Place, Spike, Watch
from fulmen.callbacks.callback import Callback
from fulmen.states import TrainerStatus
from fulmen_fabric import rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import MisconfigurationException, OwnsOptimizerStep
from fulmen_protocols.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from fulmen._session import Session
    from fulmen.callbacks.callback import Stage
    from fulmen.module import LightningModule
    from fulmen.progress import Progress
    from fulmen.trainer import Trainer
    from fulmen_fabric.voting import HostVote

__all__ = ["Rewind", "SpikeRewind", "TooManyRewindsError"]

_PLACES = ("host", "device")


class _Point(NamedTuple):
    """A snapshot, and where it stands."""

    snapshot: Snapshot
    step: int
    """Optimizer steps behind its weights, as the run counted them when it was taken."""
    at: int
    """Steps seen when it was taken, or last gone back to."""
    steps_then: int
    """``global_step`` at that moment."""
    batches_then: int
    """Batches of the run at that moment."""


class SpikeRewind(Callback):
    """Goes back to the weights of some steps ago when the loss jumps or is not finite, and on with the next data.

    Every ``every_n_steps`` steps each rank copies what optimizer steps change: parameters and buffers, the states of
    optimizers, schedulers and a gradient scaler, averages of the weights (``WeightAveraging``). When any rank sees a
    spike, all load the same copy at the same step: the newest that is older than the step before the spike, which may
    have spoilt the weights already; two are kept for that. The batches since then are dropped: training goes on with
    the batch that would have come next anyway.

    - **Counters go on.** ``global_step``, epochs, the loggers' x and ``max_steps`` count what was done, undone steps
      included: nothing that a run counts ever falls. Schedules go back with the weights, so that these see the learning
      rate that they would have seen; one that counts steps ends ``steps_undone`` steps early. One that counts epochs
      does not miss the end of an epoch. Random states go on, as the data do.
    - **No step waits.** A step keeps one number on the device. Every ``check_every_n_steps`` steps those of the check
      before are judged, which have come to the host meanwhile (on CUDA devices; others are read there), and hosts vote
      through the group's store. Until then a spoilt run goes on, for ``2 * check_every_n_steps - 1`` steps at most,
      however fast a device is.
    - **Nothing spoilt is kept.** Before validation, before a checkpoint is saved, and at the ends of epochs and of
      training all steps so far are judged, and it is looked whether weights are finite; the host waits for the device
      there. A run that is resumed goes on exactly as the one that saved: after a save both take a new copy.
    - The copies on the host are pinned, made without waiting, and each takes the memory of a checkpoint.

    Each return is a warning, a row for the loggers (``rewind/...``), and a ``Rewind`` in ``rewinds``. Means that are
    logged over an epoch hold what was logged in dropped batches as well. A callback of yours that has
    ``weights_state()`` and ``load_weights_state(state)`` goes back too.

    Args:
        monitor: a value that is logged at every step (``self.log(..., on_step=True)``), such as a norm of gradients.
            None: the loss that ``training_step`` returns; its mean where several batches make a step. Every rank judges
            its own.
        factor: a value is a spike if it is above this multiple of the median of the last values (to be exact, by
            ``factor - 1`` times its size above it, so it may be negative). None: any size will do.
        sigmas: and if it is more than this many standard deviations above their mean. None: any distance will do. With
            neither only a value that is not finite is a spike, as it is always.
        window: how many last values those are; with less than half of them only what is not finite is a spike.
        every_n_steps: steps from one copy to the next.
        check_every_n_steps: steps from one check to the next, ``every_n_steps / 2 - 1`` at most. None: 10, or fewer if
            that is too many.
        max_rewinds: after so many returns the next spike ends the fit with ``TooManyRewindsError`` on every rank.
        cooldown: steps after a return in which only what is not finite is a spike.
        keep_on: where the copies lie, ``"host"`` or ``"device"``.

    Raises:
        MisconfigurationException: an argument has a value that cannot be.
    """

    runs_first = True  # so that a checkpoint that another callback saves after a batch knows of that batch

    def __init__(
        self,
        monitor: str | None = None,
        *,
        factor: float | None = 2.0,
        sigmas: float | None = None,
        window: int = 50,
        every_n_steps: int = 100,
        check_every_n_steps: int | None = None,
        max_rewinds: int = 10,
        cooldown: int = 0,
        keep_on: Literal["host", "device"] = "host",
    ) -> None:
        _require_counts(
            window=(window, 2), every_n_steps=(every_n_steps, 4), max_rewinds=(max_rewinds, 0), cooldown=(cooldown, 0)
        )
        most = every_n_steps // 2 - 1
        check = min(10, most) if check_every_n_steps is None else check_every_n_steps
        _require_counts(check_every_n_steps=(check, 1))
        if check > most:
            raise MisconfigurationException(
                f"SpikeRewind(every_n_steps={every_n_steps!r}, check_every_n_steps={check!r}): a spike is noticed up "
                f"to {2 * check - 1} steps later, and by then both copies may hold it. Check every {most} steps at "
                f"most, or copy every {2 * check + 2} at least."
            )
        if factor is not None and not 1.0 < factor < math.inf:
            raise MisconfigurationException(
                f"SpikeRewind(factor={factor!r}): give a number above 1, or None to look at finite values by sigmas "
                "only, or not at all."
            )
        if sigmas is not None and not 0.0 < sigmas < math.inf:
            raise MisconfigurationException(f"SpikeRewind(sigmas={sigmas!r}): give a positive number, or None.")
        if keep_on not in _PLACES:
            raise MisconfigurationException(
                f"SpikeRewind(keep_on={keep_on!r}) is neither 'host' nor 'device'.{did_you_mean(str(keep_on), _PLACES)}"
            )
        self.monitor = monitor
        self.factor, self.sigmas, self.window = factor, sigmas, window
        self.every_n_steps, self.check_every_n_steps = every_n_steps, check
        self.max_rewinds, self.cooldown = max_rewinds, cooldown
        self.keep_on: Literal["host", "device"] = keep_on
        self.rewinds: list[Rewind] = []
        """What has happened in this run, over all resumes."""
        self.steps_undone = 0
        """Optimizer steps that are in ``global_step`` and not in the weights."""
        self._begin()

    def _begin(self) -> None:
        self.rewinds, self.steps_undone = [], 0
        what = "the loss" if self.monitor is None else self.monitor
        self._watch = Watch(what, self.factor, self.sigmas, self.window)
        self._seen = 0
        """Steps seen."""
        self._checked_at = self._settled_at = self._taken_at = 0
        self._is_training = self._in_step = self._in_validation = False
        self._takes_anew, self._may_have_changed = True, False
        self._of_ranks: list[dict[str, Any]] | None = None
        self._rank, self._vote = 0, cast("HostVote | None", None)
        self._window_sum: Tensor | float | None = None
        self._window_batches = 0
        self._forget()

    def _forget(self) -> None:
        self._points: list[_Point] = []
        self._batches: list[tuple[int, int, int]] = []

    @property
    def dropped_batches(self) -> list[tuple[int, int]]:
        """``(epoch, batch_idx)`` of all batches whose training was undone, in order."""
        return [batch for rewind in self.rewinds for batch in rewind.batches]

    # -- a run's beginning and end ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Begin anew, and refuse strategies whose state cannot be given back within a run.

        Raises:
            MisconfigurationException: the strategy is one, or there are two of these callbacks.
        """
        if stage != "fit":
            return
        require_no_engine(trainer, self)
        strategy, mesh = trainer.assembly.strategy, trainer.world.device_mesh
        name = trainer.assembly.strategy_name
        if supports(strategy, OwnsOptimizerStep):
            raise MisconfigurationException(
                f"SpikeRewind gives optimizers an earlier state, and strategy={name!r} steps them by an engine of its "
                "own. Drop the callback, or use 'ddp' or 'fsdp'."
            )
        if mesh is not None and "pipeline_parallel" in (mesh.mesh_dim_names or ()):
            raise MisconfigurationException(
                f"SpikeRewind cannot go back with the pipeline of strategy={name!r}, whose ranks hold different "
                "modules. Drop the callback, or leave pipeline_parallel_size at 1."
            )
        if sum(isinstance(callback, SpikeRewind) for callback in trainer.callbacks) > 1:
            raise MisconfigurationException(
                "Trainer(callbacks=[...]) holds two SpikeRewind, and each would undo what the other keeps. Leave one, "
                "and log what it should monitor under one name."
            )
        self._begin()
        self._rank = trainer.global_rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how to ask the other ranks."""
        self._vote = trainer.world.host_vote()
        self._is_training, self._in_step, self._in_validation = True, False, False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last steps count, too."""
        self._settle(trainer, pl_module)
        self._is_training = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Give the memory back."""
        self._is_training, self._vote, self._window_sum = False, None, None
        self._forget()

    # -- steps --------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Other callbacks may change what a run is made of now."""
        self._may_have_changed = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps: check, go back, copy, if it is time.

        Raises:
            TooManyRewindsError: there was a spike, and there is no further return.
        """
        self._in_step = False
        if not _progress(trainer).window_is_open:
            if self._may_have_changed:
                self._may_have_changed = False
                self._takes_anew |= bool(self._points) and structure(_session(trainer)) != self._newest.structure
            if self._takes_anew:
                self._settle(trainer, pl_module)
                self._takes_anew, self._points = False, []
            elif self._seen % self.check_every_n_steps == 0 and self._checked_at != self._seen:
                self._checked_at = self._seen
                self._agree(trainer, self._watch.judge_sent())
                self._watch.send()
            if not self._points or self._seen - self._taken_at >= self.every_n_steps:
                self._take(trainer)
        self._in_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch and its value.

        Raises:
            MisconfigurationException: there is no such value.
        """
        self._in_step = False
        session, progress = _session(trainer), _progress(trainer)
        if session.forward_only:
            return
        self._batches.append((progress.total_batches, progress.epoch, batch_idx))
        self._note(trainer, outputs)
        if progress.window_is_open:
            return
        self._seen += 1
        value, self._window_sum, self._window_batches = self._of_window(trainer), None, 0
        if value is not None:
            self._watch.add(Place(self._seen, progress.updates), value)

    def _note(self, trainer: Trainer, outputs: object) -> None:
        """Add a batch's value to its window's, as a copy: a step may write over its tensors."""
        if self.monitor is not None:
            metrics = trainer.callback_metrics
            found = metrics.get(self.monitor)
            if found is None:
                raise MisconfigurationException(
                    f"SpikeRewind(monitor={self.monitor!r}) found no such value.{did_you_mean(self.monitor, metrics)} "
                    f"Logged are {sorted(metrics)!r}. Log it at every step with self.log({self.monitor!r}, ..., "
                    "on_step=True)."
                )
            self._window_sum, self._window_batches = found.detach().clone(), 1
            return
        loss = loss_among(per_weight(trainer, outputs), "SpikeRewind")
        if loss is not None:
            loss = loss.detach()
            self._window_sum = loss.clone() if self._window_sum is None else self._window_sum + loss
            self._window_batches += 1

    def _of_window(self, trainer: Trainer) -> Tensor | float | None:
        """The mean over the window's batches; the loop gives each loss divided by the batches of a whole window."""
        total, whole = self._window_sum, trainer.accumulate_grad_batches
        if total is None or self.monitor is not None or not trainer.lightning_module.automatic_optimization:
            return total
        return total if self._window_batches == whole else total * (whole / self._window_batches)

    # -- declared points ----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate no spoilt weights."""
        self._settle(trainer, pl_module)
        self._in_validation = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is over."""
        self._in_validation = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages and schedules that look at the end of an epoch see no spoilt weights."""
        self._settle(trainer, pl_module)

    def before_checkpoint(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save no spoilt weights, and begin anew with those of the checkpoint, as a run that resumes from it will.

        Called by every rank. Inside of a step nothing can go back: a checkpoint that is saved there may hold a spike,
        which this run undoes later. A run that is resumed from it has nothing to go back to, and says so.
        """
        if not self._is_training:
            return
        if self._in_step and not _progress(trainer).window_is_open:
            is_spoilt = self._any(trainer, self._watch.judge_all() is not None)
            if not is_spoilt and trainer.state.status is TrainerStatus.RUNNING:
                self._points = []
                self._take(trainer)
        else:
            if not (self._in_step or self._in_validation):
                self._settle(trainer, pl_module)
            # Not yet: averages may follow, or lie in the module while it is validated; a window may be open.
            self._takes_anew = True
        self._of_ranks = trainer.world.collectives.all_gather_object(self._own_state())

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge all steps so far, and look at the weights; waits for the device."""
        if not self._is_training or self._settled_at == self._seen or _progress(trainer).window_is_open:
            return
        self._settled_at = self._seen
        spike = self._watch.judge_all()
        if spike is None and not _are_finite(pl_module.parameters()):
            place = Place(self._seen, _progress(trainer).updates)
            spike = Spike(place, math.nan, None, "a weight after it")
        self._agree(trainer, spike)

    def _any(self, trainer: Trainer, mine: bool) -> bool:
        """Whether it holds on any rank."""
        if trainer.world_size == 1:
            return mine
        if self._vote is None:  # no store to meet at
            return trainer.strategy.reduce_boolean_decision(mine, all=False)
        return self._vote.any(mine)

    def _agree(self, trainer: Trainer, spike: Spike | None) -> None:
        """Go back on all ranks if any has found a spike."""
        if not self._any(trainer, spike is not None):
            return
        of_ranks: list[Spike | None] = trainer.world.collectives.all_gather_object(spike)
        found = [(each.place, rank, each) for rank, each in enumerate(of_ranks) if each is not None]
        _, rank, first = min(found)
        self._go_back(trainer, rank, first)

    # -- going back ---------------------------------------------------------------------------------------------------

    @property
    def _newest(self) -> Snapshot:
        return self._points[-1].snapshot

    def _take(self, trainer: Trainer) -> None:
        """Copy the state of this moment; of older copies one stays."""
        progress = _progress(trainer)
        self._points = self._points[-1:]  # first: there is no room for three
        snapshot = Snapshot(trainer, _session(trainer), progress, self.keep_on)
        step = progress.updates
        point = _Point(snapshot, step - self.steps_undone, self._seen, step, progress.total_batches)
        self._points.append(point)
        oldest = self._points[0].batches_then
        self._batches = [batch for batch in self._batches if batch[0] > oldest]
        self._taken_at = self._seen

    def _go_back(self, trainer: Trainer, rank: int, spike: Spike) -> None:
        session, progress = _session(trainer), _progress(trainer)
        while len(self._points) > 1 and self._points[-1].at > spike.place.at - 2:
            self._points.pop()
        where = f"{described(spike, rank)} Noticed at step {progress.updates}."
        if not self._points or self._newest.structure != structure(session):
            self._is_training = False
            why = (
                "since the last copy a callback has changed what the model or its optimizers are made of. Go on from a "
                "checkpoint."
                if self._points
                else "the checkpoint that this run resumed from was saved after the spike, where that could not be "
                "undone yet. Resume from an earlier one."
            )
            raise TooManyRewindsError(f"SpikeRewind: {where} There is nothing to go back to: {why}")
        point = self._points[-1]
        point.snapshot.restore(trainer, session, progress)
        batches = tuple((epoch, index) for count, epoch, index in self._batches if count > point.batches_then)
        rewind = Rewind(
            spike.place.step, rank, spike.value, spike.threshold, progress.updates, point.steps_then, batches
        )
        self.steps_undone += progress.updates - point.steps_then
        self._points[-1] = point._replace(
            at=self._seen, steps_then=progress.updates, batches_then=progress.total_batches
        )
        self._watch.forget_from(spike.place.at)
        self._watch.quiet_until = self._seen + self.cooldown
        self._taken_at = self._settled_at = self._seen
        text = f"SpikeRewind: {where} {told(rewind, point.step)}"
        if len(self.rewinds) >= self.max_rewinds:
            self._is_training = False
            before = ", ".join(str(each.step) for each in self.rewinds) or "none"
            raise TooManyRewindsError(
                f"{text}, and the fit ends: max_rewinds={self.max_rewinds}, after spikes at steps {before}. Look at "
                "the data of these batches and at the learning rate, or allow more."
            )
        self.rewinds.append(rewind)
        rank_zero_warn(f"{text}, training goes on with the next one. Return {len(self.rewinds)} of {self.max_rewinds}.")
        row = row_of(rewind, len(self.rewinds))
        reporter_of(trainer).log_metrics(row, x=progress.log_step, epoch=progress.epoch)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {
            **self._watch.state_dict(),
            "seen": self._seen,
            "checked_at": self._checked_at,
            "settled_at": self._settled_at,
            "window": [None if self._window_sum is None else float(self._window_sum), self._window_batches],
        }

    def state_dict(self) -> dict[str, Any]:
        """What has happened, and what each rank knows of its values, as plain data; not the copies."""
        ranks, self._of_ranks = self._of_ranks, None
        return {
            "rewinds": [plain(each) for each in self.rewinds],
            "steps_undone": self.steps_undone,
            "ranks": [self._own_state()] if ranks is None else ranks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with a copy of what the checkpoint holds. Ranks that are new know what rank 0 knew."""
        self.rewinds = [loaded(each) for each in state_dict["rewinds"]]
        self.steps_undone = int(state_dict["steps_undone"])
        ranks: list[dict[str, Any]] = state_dict["ranks"]
        mine = ranks[self._rank if self._rank < len(ranks) else 0]
        self._watch.load_state_dict(mine)
        self._seen, self._checked_at, self._settled_at = mine["seen"], mine["checked_at"], mine["settled_at"]
        self._window_sum, self._window_batches = mine["window"]
        self._takes_anew = True


def _session(trainer: Trainer) -> Session:
    return cast("Session", vars(trainer)["_session"])


def _progress(trainer: Trainer) -> Progress:
    return cast("Progress", vars(trainer)["_progress"])


@torch.no_grad()
def _are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all trained numbers that this rank holds are; waits for the device."""
    counts: list[Tensor] = []
    for parameter in parameters:
        if parameter.requires_grad and parameter.is_floating_point():
            own: Any = getattr(parameter, "to_local", parameter.detach)
            counts.append(torch.isfinite(own()).all())
    return not counts or bool(torch.stack(counts).all())


def _require_counts(**counts: tuple[object, int]) -> None:
    """Each with the least that it may be."""
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise MisconfigurationException(f"SpikeRewind({name}={value!r}): give an integer of at least {least}.")
