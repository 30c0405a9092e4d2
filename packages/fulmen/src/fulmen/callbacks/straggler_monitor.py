"""StragglerMonitor: names the ranks for which all others wait."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fulmen._reporting import reporter_of
from fulmen.callbacks._own_work import mark_waits
from fulmen.callbacks._slow_ranks import SlowRanks, Straggler, slowdowns
from fulmen.callbacks._step_times import OUTSIDE
from fulmen.callbacks._straggler_watch import Watch
from fulmen.callbacks.callback import Callback
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_fabric.voting import group_store
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from torch import Tensor

    from fulmen._session import Session
    from fulmen.callbacks.callback import Stage
    from fulmen.fit import FitParts
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["Straggler", "StragglerMonitor"]

_DEVICE = "look at its device's clock, temperature and other users"
_ADVICE = {
    "data": "its loader is late: look at its disk and network, at num_workers, and at what else its machine does",
    "transfer": "moving its batches is slow: look at pin_memory, and at what on_after_batch_transfer does",
    "hooks": "hooks of callbacks or of the module take it that long: look at what only this rank does there",
    "forward": f"it computes more slowly: {_DEVICE}, and at the size of its batches",
    "backward": f"it computes more slowly: {_DEVICE}, and at the size of its batches",
    "optimizer": f"what follows its backward pass is slow: {_DEVICE}, and at hooks around the optimizer's step",
}


class StragglerMonitor(Callback):
    """Warns of ranks that make all others wait, with the machine, by how much, and in which part of the step.

    In a run of several ranks everybody waits for the slowest in each step, so that all steps take equally long and
    nobody sees why. Here each rank measures the time of its own work, from the loader to the optimizer, and leaves out
    where it may wait for others. Every ``every_n_steps`` optimizer steps it writes a few numbers to the group's store;
    rank 0 reads those of all a step later and compares each rank with the median of the others. No rank waits for
    another, and no host for its device.

    A rank is named by a warning on rank 0, once, and again only after it has recovered. One that is slow in its first
    steps (compiling) or once (a stall) is not named. Windows in which a rank has no data of its own left are left out.

    What is seen depends on how ranks communicate:

    - DDP: data, transfer, hooks, forward, backward up to the last gradients, optimizer.
    - FSDP2: data, transfer, hooks, optimizer, and the forward pass without waits for parameters, unless compiled or
      with manual optimization; not the backward pass.
    - Everything else (tensor and pipeline parallel, DeepSpeed, ``SyncBatchNorm`` under any strategy): data, transfer
      and hooks.

    A rank's collectives of its own inside of ``training_step`` or a hook hide who was late for them. On CUDA and XPU
    times are the device's: a host that is late counts where the device stands still because of it. In a run of one
    process, and where training only runs forward, the callback does nothing.

    Args:
        every_n_steps: optimizer steps of a window, at least 3.
        threshold: a rank is slow if its own work takes longer by this share (0.1: 10 %) than the median of the other
            ranks. It must also make steps longer by a quarter of that share, and by half a millisecond.
        patience: windows in a row in which it must be slow.
        log: whether loggers get ``straggler/slowest_rank`` and ``straggler/slowdown`` (a share, 0 at least) for each
            window.

    Raises:
        MisconfigurationException: an argument has a value that cannot be.
    """

    def __init__(
        self, every_n_steps: int = 20, *, threshold: float = 0.1, patience: int = 2, log: bool = False
    ) -> None:
        if every_n_steps < 3:
            raise MisconfigurationException(
                f"StragglerMonitor(every_n_steps={every_n_steps!r}): a window needs at least 3 steps to tell a lasting "
                "delay from a single one."
            )
        if not 0.0 < threshold < math.inf:
            raise MisconfigurationException(
                f"StragglerMonitor(threshold={threshold!r}): give a positive share of a step's time, such as 0.1."
            )
        if patience < 1:
            raise MisconfigurationException(f"StragglerMonitor(patience={patience!r}) must be at least 1.")
        self.every_n_steps, self.threshold, self.patience = every_n_steps, threshold, patience
        self.log = log
        self.found: list[Straggler] = []
        """Who was named in this fit, on rank 0."""
        self._watch: Watch | None = None
        self._hooks: list[Any] = []
        self._is_alone = True

    # ------------------------------------------------------------------ a run's beginning and end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Begin anew.

        Raises:
            MisconfigurationException: ranks have no store through which they could compare themselves.
        """
        if stage != "fit":
            return
        self.found, self._watch = [], None
        self._is_alone = trainer.world_size == 1
        if not self._is_alone and group_store() is None:
            raise MisconfigurationException(
                "StragglerMonitor lets ranks compare their times through the store of torch's process group, and the "
                f"{trainer.world_size} processes of strategy={trainer.assembly.strategy_name!r} have none. Drop the "
                "callback."
            )

    def watched_parts(self, trainer: Trainer, parts: FitParts) -> FitParts:
        """``parts`` with a look at the clock around each; called by the Trainer while it composes its loop."""
        session = cast("Session", vars(trainer)["_session"])
        if self._is_alone or session.forward_only:
            return parts
        if self._watch is None:
            slow = SlowRanks(self.threshold, self.patience)
            self._watch = Watch(session, trainer.global_rank, trainer.world_size, self.every_n_steps, slow)
        return self._watch.around(parts, partial(self._look, trainer, self._watch))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark where the module waits for others."""
        watch = self._watch
        if watch is not None:
            watch.begin(trainer.global_step)
            self._hooks = list(mark_waits(watch.session, watch.work, watch.turn_inside))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last window counts, too, if all ranks have told theirs."""
        if self._watch is not None:
            self._report(trainer, self._watch)
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Leave the module as it was."""
        self._leave()

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._watch = [], None

    # ------------------------------------------------------------------ within steps

    @property
    def _on_before_backward_is_idle(self) -> bool:
        return self._is_alone

    @property
    def _on_after_backward_is_idle(self) -> bool:
        return self._is_alone

    @property
    def _on_train_epoch_start_is_idle(self) -> bool:
        return self._is_alone

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What lies between two epochs belongs to no step."""
        if self._watch is not None:
            self._watch.times.turn(OUTSIDE)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        if self._watch is not None:
            self._watch.end_forward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward pass is over."""
        if self._watch is not None:
            self._watch.end_backward()

    # ------------------------------------------------------------------ between steps

    def _look(self, trainer: Trainer, watch: Watch) -> None:
        """After an optimizer step: tell of a window that is full; on rank 0 compare those of all."""
        self._report(trainer, watch)
        watch.note_step(trainer.global_step)

    def _report(self, trainer: Trainer, watch: Watch) -> None:
        window = watch.window_of_all()
        if window is None:
            return
        ranks = slowdowns(window)
        named, recovered = watch.slow.judge(ranks)
        for each in named:
            self.found.append(each)
            rank_zero_warn(_told(each, trainer.world_size))
        for each in recovered:
            rank_zero_info(f"StragglerMonitor: rank {each.rank} ({each.host}) keeps up with the others again.")
        if self.log:
            slowest = max(ranks, key=lambda each: each.slowdown)
            row = {"straggler/slowest_rank": float(slowest.rank), "straggler/slowdown": max(slowest.slowdown, 0.0)}
            reporter, x = reporter_of(trainer), trainer.batches_that_stepped - 1
            for logger in trainer.loggers:
                reporter.pass_on(logger, row, x)


def _told(slow: Straggler, ranks: int) -> str:
    others = "that of the other rank" if ranks == 2 else "the median of the other ranks"
    return (
        f"rank {slow.rank} on {slow.host!r} is slow since step {slow.since_step}, and all ranks wait for it. Its own "
        f"work takes {1000 * slow.late_s:.3g} ms longer in each step than {others} (+{slow.slowdown:.0%}), which makes "
        f"steps {slow.step_slowdown:.0%} longer. Most of it, {1000 * slow.part_late_s:.3g} ms, is in {slow.part!r}: "
        f"{_ADVICE[slow.part]}."
    )
