"""ThroughputMonitor: batches, samples, items and floating point operations per second, in the loggers."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fulmen._metric_read import read_scalars
from fulmen._reporting import reporter_of
from fulmen.callbacks._device_clock import DeviceClock, Mark
from fulmen.callbacks.callback import Callback
from fulmen.states import RunningStage, TrainerFn
from fulmen_fabric import Throughput, get_available_flops, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["ThroughputMonitor"]


class _Done(NamedTuple):
    """A batch that has been enqueued: when it is finished, and the totals with it, which may still be on the device."""

    mark: Mark
    batches: int
    samples: int | Tensor
    lengths: int | Tensor | None
    flops: float | None
    pauses: tuple[tuple[Mark, Mark], ...]
    """What lies before this batch and is no training: from and to."""


class _StageMeter:
    """The throughput of one stage, fed with batches and read at rows."""

    def __init__(self, throughput: Throughput, device: torch.device) -> None:
        self.throughput = throughput
        self.rows_x = 0
        """Batches of all passes, where evaluations draw their rows."""
        self._device = device
        self.restart()

    def restart(self) -> None:
        self.throughput.reset()
        self._clock = DeviceClock(self._device)
        self._pending: deque[_Done] = deque()
        self.batches = 0
        """Batches of this pass."""
        self._samples: int | Tensor = 0
        self._lengths: int | Tensor = 0
        self._time_s = 0.0
        self._paused_s = 0.0
        self._pause_from: Mark | None = None
        self._pauses: tuple[tuple[Mark, Mark], ...] = ()

    def pause(self) -> None:
        self._pause_from = self._clock.mark()

    def resume(self) -> None:
        if self._pause_from is not None:
            self._pauses = (*self._pauses, (self._pause_from, self._clock.mark()))
            self._pause_from = None

    def add(self, samples: int | Tensor, lengths: int | Tensor | None, flops: float | None) -> None:
        self.batches += 1
        self.rows_x += 1
        self._samples = self._samples + samples
        self._lengths = self._lengths + (0 if lengths is None else lengths)
        totals = self._samples, None if lengths is None else self._lengths
        pending = self._pending
        pending.append(_Done(self._clock.mark(), self.batches, *totals, flops, self._pauses))
        self._pauses = ()
        if len(pending) > self.throughput.window_size:  # what the next row will not look at
            dropped = pending.popleft()
            pending[0] = pending[0]._replace(pauses=(*dropped.pauses, *pending[0].pauses))

    def _feed(self) -> None:
        """Read what has been done since the last row, with one wait for the device."""
        done = list(self._pending)
        self._pending.clear()
        samples = read_scalars([each.samples for each in done])
        lengths = read_scalars([each.lengths for each in done if each.lengths is not None])
        for index, each in enumerate(done):
            for pause in each.pauses:
                begin_s, end_s = self._clock.read(pause)
                self._paused_s += end_s - begin_s
            (now_s,) = self._clock.read([each.mark])
            # Two marks with nothing between them may have the same time; a total must grow.
            self._time_s = max(now_s - self._paused_s, math.nextafter(self._time_s, math.inf))
            self.throughput.update(
                time=self._time_s,
                batches=each.batches,
                samples=int(samples[index]),
                lengths=int(lengths[index]) if lengths else None,
                flops=each.flops,
            )

    def compute(self) -> dict[str, int | float]:
        self._feed()
        return self.throughput.compute()


class ThroughputMonitor(Callback):
    """Logs how fast each stage runs.

    Names are those of ``Throughput.compute`` behind the stage: ``train/device/batches_per_sec``. Rank 0 measures
    itself, and takes the other ranks to do as much in the same time. Its rows come every ``log_every_n_steps`` batches
    that stepped an optimizer, of an evaluation every as many batches. Time is the device's own: a mark is left in its
    queue after each batch and read at the row, so nothing waits in between. Time spent in a validation inside ``fit``
    is taken off that of training.

    Define ``flops_per_batch`` on your module, as an attribute or a property (see ``measure_flops``), to have operations
    per second too, and their share of the device's peak as ``device/mfu``, where that peak is known.

    Args:
        batch_size_fn: samples in a batch. A tensor on the device is not read before the row.
        length_fn: items (tokens, say) in a batch.
        kwargs: of ``Throughput``: ``window_size``, ``separator``, ``available_flops`` and so on.

    Raises:
        MisconfigurationException: one of these has a value that cannot be.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int | Tensor],
        length_fn: Callable[[Any], int | Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        Throughput(**kwargs)  # refuse now what would be refused in the middle of a run
        self.kwargs = kwargs
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.available_flops: float | None = None
        """Operations per second that a device could do at best; None: unknown."""
        self._meters: dict[RunningStage, _StageMeter] = {}
        self._batches_that_stepped = 0
        self._warned_of_flops = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look up the device's peak."""
        self._meters = {}
        self.available_flops = self.kwargs.get("available_flops")
        if self.available_flops is None:
            dtype = trainer.precision_plugin.plan()["compute"]
            self.available_flops = get_available_flops(trainer.strategy.root_device, dtype)

    def _meter(self, trainer: Trainer) -> _StageMeter | None:
        """That of the running stage; None where nothing is measured: off rank 0 and in the sanity check."""
        stage = trainer.state.stage
        if stage is None or trainer.sanity_checking or not trainer.is_global_zero or not trainer.log_every_n_steps:
            return None
        meter = self._meters.get(stage)
        if meter is None:
            arguments: dict[str, Any] = {"world_size": trainer.world_size, **self.kwargs}
            arguments["available_flops"] = self.available_flops
            meter = self._meters[stage] = _StageMeter(Throughput(**arguments), trainer.strategy.root_device)
        return meter

    def _start(self, trainer: Trainer) -> None:
        meter = self._meter(trainer)
        if meter is not None:
            meter.restart()

    def _add(self, meter: _StageMeter, pl_module: LightningModule, batch: Any) -> None:
        flops = getattr(pl_module, "flops_per_batch", None)
        if flops is None and not self._warned_of_flops:
            self._warned_of_flops = True
            rank_zero_warn(
                f"ThroughputMonitor logs no operations per second: {type(pl_module).__name__} has no flops_per_batch. "
                "Set it as an attribute or a property; fulmen.utilities.throughput.measure_flops counts them."
            )
        with torch.no_grad():
            lengths = None if self.length_fn is None else self.length_fn(batch)
            meter.add(self.batch_size_fn(batch), lengths, flops)

    def _log(self, trainer: Trainer, meter: _StageMeter, x: int, **more: float) -> None:
        separator = meter.throughput.separator
        metrics = {f"{trainer.state.stage}{separator}{name}": value for name, value in meter.compute().items()}
        trainer.logged_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        reporter = reporter_of(trainer)
        for logger in trainer.loggers:
            reporter.pass_on(logger, {**metrics, **more}, x)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of training."""
        self._batches_that_stepped = trainer.batches_that_stepped
        self._start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log if an optimizer stepped and it is time."""
        meter = self._meter(trainer)
        if meter is None:
            return
        self._add(meter, pl_module, batch)
        stepped = trainer.batches_that_stepped
        if stepped == self._batches_that_stepped:
            return
        self._batches_that_stepped = stepped
        if stepped % trainer.log_every_n_steps == 0 or trainer.should_stop:
            self._log(trainer, meter, stepped - 1, epoch=trainer.current_epoch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of validation, and stop that of training."""
        training = self._meters.get(RunningStage.TRAINING)
        if training is not None and not trainer.sanity_checking:
            training.pause()
        self._start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock of training go on."""
        training = self._meters.get(RunningStage.TRAINING)
        if training is not None and trainer.state.fn == TrainerFn.FITTING:
            training.resume()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a test."""
        self._start(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of prediction."""
        self._start(trainer)

    def _evaluated(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        meter = self._meter(trainer)
        if meter is None:
            return
        self._add(meter, pl_module, batch)
        if meter.batches % trainer.log_every_n_steps == 0:
            self._log(trainer, meter, meter.rows_x)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch; log if it is time."""
        self._evaluated(trainer, pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch; log if it is time."""
        self._evaluated(trainer, pl_module, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch; log if it is time."""
        self._evaluated(trainer, pl_module, batch)
