"""Reporter: carries metrics from the store to loggers, progress bar and callbacks, with one device read per row.

A training row of values on a CUDA device is written when they have come to the host by themselves: nothing waits for
the device, and the device never runs out of work for the sake of a row.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from fulmen._metric_read import Arrival, HostSnapshot, read_scalars
from fulmen._metric_view import as_tensors
from fulmen._result_table import print_results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager

    from fulmen._metric_view import MetricView
    from fulmen.metrics import MetricStore, Scalar
    from fulmen.runlog._delivery import Delivery
    from fulmen.trainer import Trainer
    from fulmen_protocols.logger import Logger

__all__ = ["Reporter", "print_results", "reporter_of"]

_QUEUED_ROWS = 512
"""Rows of evaluation steps that wait for one common read."""


class _Row(NamedTuple):
    """An evaluation step's metrics: numbers as they are, tensors stacked, unread."""

    x: int
    numbers: dict[str, float]
    names: tuple[str, ...]
    values: Tensor | None


class _Coming(NamedTuple):
    """A row that waits for its values to come to the host, or for the rows before it."""

    x: int
    epoch: int | None
    of: str
    at: int | None
    log: tuple[str, ...]
    bar: tuple[str, ...]
    names: tuple[str, ...]
    arrival: Arrival
    logger: Logger | None = None
    """The only one that gets it; None: all do."""


class Reporter:
    """What a run reports, and when. Knows no Trainer: the loops say what happened.

    Args:
        loggers: where rows go; on ranks other than 0 they are not called.
        log_every_n_steps: a training row every so many batches that stepped an optimizer; 0: none.
        is_global_zero: whether this process is rank 0.
        save_interval_s: seconds between two ``logger.save()`` calls while training; epoch ends save too.

    Attributes:
        loggers: settable at any time.
        store: the metrics of the loop that is running; set by the loop, None between runs.
        delivery: brings rows to the loggers in threads of their own; None: they are called directly.
        is_global_zero: settable where a process learns its rank later.
    """

    def __init__(
        self,
        *,
        loggers: Iterable[Logger] = (),
        log_every_n_steps: int = 50,
        is_global_zero: bool = True,
        save_interval_s: float = 10.0,
    ) -> None:
        self.loggers: list[Logger] = loggers if isinstance(loggers, list) else list(loggers)  # a list is shared
        self.log_every_n_steps = log_every_n_steps
        self.store: MetricStore | None = None
        self.delivery: Delivery | None = None
        self.is_global_zero = is_global_zero
        self._save_interval_s = save_interval_s
        self._saved_at = monotonic()
        self._callback: dict[str, Tensor] = {}
        self._logged: dict[str, Tensor] = {}
        self._bar: dict[str, float] = {}
        self._snapshot = HostSnapshot()
        self._queue: list[_Row] = []
        self._coming: deque[_Coming] = deque()

    # What users read ---------------------------------------------------------------------------------------------

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The latest value under every name that callbacks may monitor. Reading neither communicates nor waits.

        The same dict every time: what is written into it stays until ``reset``.
        """
        if self.store is not None:
            self._take_callback(self.store)
        return self._callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The latest value under every name that loggers know. Reading neither communicates nor waits."""
        if self.store is not None:
            self._logged.update(self.store.logged_metrics)
        return self._logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What the progress bar shows. Reading never waits for the device.

        On the CPU the values are exact; on an accelerator each reading starts a copy to the host and answers what the
        one before has brought, so they are as old as the last reading, or the last row.
        """
        if self.store is not None:
            self._read_bar(self.store)
        return self._bar

    def reset(self) -> None:
        """Forget everything: at the start of a run, and before and after the sanity check."""
        self._callback.clear()
        self._logged.clear()
        self._bar.clear()
        self._snapshot = HostSnapshot()
        self._queue.clear()
        self._coming.clear()

    def restore(self, callback_metrics: Mapping[str, Tensor], device: torch.device) -> None:
        """Let callbacks and schedulers know what they knew when a checkpoint was written."""
        self._callback.update({name: value.to(device) for name, value in callback_metrics.items()})

    def replace(self, callback: Mapping[str, Tensor], logged: Mapping[str, Tensor], bar: Mapping[str, float]) -> None:
        """Take over what the reporter of another process knows; all on the CPU."""
        self.reset()
        self._callback.update(callback)
        self._logged.update(logged)
        self._bar.update(bar)

    def to_cpu(self) -> None:
        """Take what is pending and move it off the device, which the run is about to give back. Waits for the device.

        To be called once, at teardown.
        """
        self.settle()
        self._callback, self._logged = _on_cpu(self.callback_metrics), _on_cpu(self.logged_metrics)
        if self.store is not None:
            bar = self.store.progress_bar_metrics
            self._bar.update(zip(bar, read_scalars(list(bar.values())), strict=True))
        self.store = None

    # What loops say ----------------------------------------------------------------------------------------------

    def is_due(self, batches_that_stepped: int, *, stopping: bool = False) -> bool:
        """Whether the batch that just ended gets a row. Ask only about batches that stepped an optimizer.

        Args:
            batches_that_stepped: how many did before this one.
            stopping: the run ends after this batch, or is a ``fast_dev_run``.
        """
        every = self.log_every_n_steps
        return every > 0 and (stopping or (batches_that_stepped + 1) % every == 0)

    def step_hooks(self, device: torch.device) -> tuple[Callable[..., None], ...]:
        """What runs before every training batch on ``device``; nothing where reading a value waits for nothing."""
        return (self._take_arrived,) if device.type == "cuda" and self.loggers and self.is_global_zero else ()

    def report_step(self, store: MetricStore, *, batches_that_stepped: int, epoch: int) -> None:
        """A row of training step values at x = ``batches_that_stepped``: now, or as soon as the device has them."""
        view = store.step_metrics()
        if store.device.type == "cuda" and self.loggers and self.is_global_zero:
            self._expect(view, x=batches_that_stepped, epoch=epoch)
        else:
            self._report(view, x=batches_that_stepped, epoch=epoch, of="step")
        if monotonic() - self._saved_at >= self._save_interval_s:
            self.save()

    def report_train_epoch(self, store: MetricStore, *, batches_that_stepped: int, epoch: int) -> None:
        """A row of the training epoch's values, at the x of its last batch. After the last ``reduce_epoch``."""
        self._take_callback(store)
        self.settle()
        self._report(store.epoch_metrics(), x=batches_that_stepped - 1, epoch=epoch, of="epoch")
        self.save()

    def report_eval_step(self, store: MetricStore, *, batches_seen: int, dataloader_idx: int | None = None) -> None:
        """A row of an evaluation batch's step values. Read with many others, at the latest at the epoch's end.

        Args:
            store: the evaluation's metrics.
            batches_seen: the row's x: how many batches of this loader the fit had evaluated before.
            dataloader_idx: the batch's loader; None with one loader.
        """
        log = store.step_metrics(dataloader_idx).log
        if not log or store.stage == "sanity_check":
            return
        self._take_logged(log)
        tensors = {n: v for n, v in log.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
        ready = {n: v for n, v in log.items() if n not in tensors}
        numbers = dict(zip(ready, read_scalars(list(ready.values())), strict=True))
        # A stack of its own: the step may write over its tensors before the row is read.
        wide = torch.float32 if any(v.device.type == "mps" for v in tensors.values()) else torch.float64
        stacked = torch.stack([v.reshape(()).to(wide) for v in tensors.values()]) if tensors else None
        self._queue.append(_Row(batches_seen, numbers, tuple(tensors), stacked))
        if len(self._queue) >= _QUEUED_ROWS:
            self._flush_queue()

    def report_eval_epoch(self, store: MetricStore, *, batches_that_stepped: int, epoch: int) -> None:
        """A row of an evaluation's epoch values, at the training step's x. After the last ``reduce_epoch``.

        During the sanity check callbacks get the values, loggers nothing.
        """
        self._take_callback(store)
        view = store.epoch_metrics()
        _require_scalars(view)
        if store.stage == "sanity_check":
            self._take_bar(view.bar)
            return
        self._flush_queue()
        self._report(view, x=batches_that_stepped, epoch=epoch, of="epoch")
        self.save()

    def results(self, store: MetricStore, *, num_dataloaders: int = 1) -> list[dict[str, float]]:
        """What ``validate`` and ``test`` return: the logged epoch values of each dataloader. One device read.

        Values of no loader (logged in ``on_test_epoch_end``) are in every dict.
        """
        views = [store.epoch_metrics(index).log for index in range(max(num_dataloaders, 1))]
        numbers = iter(read_scalars([value for view in views for value in view.values()]))
        return [{name: next(numbers) for name in view} for view in views]

    def log_metrics(self, metrics: Mapping[str, Scalar], *, x: int, epoch: int) -> None:
        """A row of the framework's own, such as learning rates. One device read if there are tensors."""
        self._write(dict(zip(metrics, read_scalars(list(metrics.values())), strict=True)), x, epoch, "callback")

    def pass_on(self, logger: Logger, metrics: Mapping[str, float], x: int) -> None:
        """A callback's row for one logger, as it is."""
        if not self.is_global_zero:
            return
        if self._coming:
            self._queue_up(metrics, metrics, (), x=x, epoch=None, of="callback", logger=logger)
        else:
            self._give_one(logger, metrics, x, None)

    def settle(self) -> None:
        """Write the rows whose values are on their way. Waits for the device to get to the last of them.

        Called at the ends of epochs and of the run, and before a checkpoint, which must not know more than the run's
        log.
        """
        while self._coming:
            self._write_coming(self._coming.popleft())

    def remember_steps(self, store: MetricStore) -> None:
        """Keep the last step's values, whether they got a row or not, when the epoch's take over."""
        view = store.step_metrics()
        self._callback.update(as_tensors(view.callback, store.device))
        self._logged.update(as_tensors(view.log, store.device))

    def leave(self, store: MetricStore) -> None:
        """Keep the last step's values, and the bar's, when another loop's store takes over."""
        self.remember_steps(store)
        self._read_bar(store)

    def goes_on(self) -> None:
        """Training begins, where a checkpoint has put it."""
        if self.delivery is not None:
            self.delivery.goes_on()

    def enter(self, stage: str) -> None:
        """From now on the run's time is spent in ``stage``."""
        if self.delivery is not None:
            self.delivery.enter(stage)

    def within(self, stage: str) -> AbstractContextManager[None]:
        """The block's time belongs to ``stage``."""
        return nullcontext() if self.delivery is None else self.delivery.within(stage)

    def save(self) -> None:
        """Let every logger write what it buffers."""
        self._saved_at = monotonic()
        if not self.is_global_zero:
            return
        if self.delivery is not None:
            self.delivery.save(self.loggers)
            return
        for logger in self.loggers:
            logger.save()

    def _read_bar(self, store: MetricStore) -> None:
        self._bar.update(self._snapshot.update(store.progress_bar_metrics))

    def _take_callback(self, store: MetricStore) -> None:
        self.remember_steps(store)
        self._callback.update(store.callback_metrics)

    def _report(self, view: MetricView, *, x: int, epoch: int, of: str) -> None:
        _require_scalars(view)
        self._take_logged(view.log)
        if not self.is_global_zero:
            return
        if not self.loggers:
            self._take_bar(view.bar)
            return
        # The bar's values come with the same read.
        together = {**view.log, **view.bar}
        numbers = dict(zip(together, read_scalars(list(together.values())), strict=True))
        bar = {name: numbers[name] for name in view.bar}
        self._bar.update(bar)
        self._snapshot.set(bar)
        if view.log:
            self._write({name: numbers[name] for name in view.log}, x, epoch, of)
            if of == "step" and self.delivery is not None:
                self.delivery.note_state()

    def _expect(self, view: MetricView, *, x: int, epoch: int) -> None:
        """Let a training row's values come to the host."""
        _require_scalars(view)
        self._take_logged(view.log)
        together = {**view.log, **view.bar}
        if together:
            self._queue_up(together, view.log, view.bar, x=x, epoch=epoch, of="step")
        if self.delivery is not None:
            self.delivery.note_state()

    def _queue_up(
        self,
        values: Mapping[str, Scalar],
        log: Iterable[str],
        bar: Iterable[str],
        *,
        x: int,
        epoch: int | None,
        of: str,
        logger: Logger | None = None,
    ) -> None:
        at = None if self.delivery is None else self.delivery.at
        arrival = Arrival(list(values.values()))
        self._coming.append(_Coming(x, epoch, of, at, tuple(log), tuple(bar), tuple(values), arrival, logger))
        self._take_arrived()

    def _take_arrived(self, *_: object) -> None:
        while self._coming and self._coming[0].arrival.is_there:
            self._write_coming(self._coming.popleft())

    def _write_coming(self, row: _Coming) -> None:
        numbers = dict(zip(row.names, row.arrival.read(), strict=True))
        bar = {name: numbers[name] for name in row.bar}
        self._bar.update(bar)
        self._snapshot.set(bar)
        log = {name: numbers[name] for name in row.log}
        if row.logger is not None:
            self._give_one(row.logger, log, row.x, row.at)
        elif log:
            self._give(log, row.x, row.epoch, row.of, row.at)

    def _take_logged(self, log: Mapping[str, Scalar]) -> None:
        for name, value in log.items():
            self._logged[name] = value if isinstance(value, Tensor) else torch.tensor(value)

    def _take_bar(self, bar: Mapping[str, Scalar]) -> None:
        self._bar.update(self._snapshot.update(bar))

    def _write(self, metrics: dict[str, float], x: int, epoch: int | None, of: str) -> None:
        """Give a row to every logger, after those that are on their way."""
        if not self.is_global_zero:
            return
        if self._coming:
            self._queue_up(metrics, metrics, (), x=x, epoch=epoch, of=of)
        else:
            self._give(metrics, x, epoch, of, None)

    def _give(self, metrics: dict[str, float], x: int, epoch: int | None, of: str, at: int | None) -> None:
        """A metric named ``step`` sets the x axis instead of being drawn."""
        x = int(metrics.pop("step", x))
        if epoch is not None:
            metrics.setdefault("epoch", epoch)
        if self.delivery is not None:
            self.delivery.row(metrics, x, self.loggers, of, at=at)
            return
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=x)

    def _give_one(self, logger: Logger, metrics: Mapping[str, float], x: int, at: int | None) -> None:
        if self.delivery is None:
            logger.log_metrics(metrics, step=x)
        else:
            self.delivery.row(metrics, x, (logger,), "callback", is_first=logger is self.loggers[0], at=at)

    def _flush_queue(self) -> None:
        """Read and write the rows of evaluation steps."""
        rows, self._queue = self._queue, []
        if not rows or not self.is_global_zero or not self.loggers:
            return
        stacks = [row.values for row in rows if row.values is not None]
        numbers = cast("list[float]", torch.cat(stacks).tolist()) if stacks else []
        position = 0
        for row in rows:
            read = dict(zip(row.names, numbers[position : position + len(row.names)], strict=True))
            position += len(row.names)
            self._write({**row.numbers, **read}, row.x, None, "eval_step")  # its x counts batches, not training steps


def reporter_of(trainer: Trainer) -> Reporter:
    """Where a callback's own rows go: to the loggers as all others."""
    reporter: Reporter = vars(trainer)["_reporter"]
    return reporter


def _require_scalars(view: MetricView) -> None:
    """Metric objects may compute tensors of any shape, which callbacks can use and nobody can draw.

    Raises:
        ValueError: such a one is to be drawn or shown.
    """
    for name, value in (*view.log.items(), *view.bar.items()):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"the metric object logged as {name!r} computed a tensor of shape {tuple(value.shape)}, of which "
                "loggers and progress bar could show nothing: log one element, or pass logger=False, prog_bar=False to "
                "give it to callbacks alone."
            )


def _on_cpu(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in metrics.items()}
