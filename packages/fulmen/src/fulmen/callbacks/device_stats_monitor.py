"""DeviceStatsMonitor: what the device says about itself, and the host, in the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen._reporting import reporter_of
from fulmen.callbacks.callback import Callback
from fulmen_fabric import rank_zero_warn, supports
from fulmen_protocols import ACCELERATORS, SupportsDeviceStats, did_you_mean, load
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

    Source = Callable[[], Mapping[str, float]]

__all__ = ["DeviceStatsMonitor"]


class DeviceStatsMonitor(Callback):
    """Logs statistics of rank 0's device before and after the batches that get rows, in fit, validation and test.

    Names are ``DeviceStatsMonitor.on_train_batch_start/cpu_percent`` and so on: the class, the hook, the statistic. On
    CUDA the statistics are those of torch's allocator in bytes; of the CPU, the use of processors, memory and swap of
    the whole host in percent. Nothing is asked at other batches.

    Args:
        cpu_stats: None: statistics of the CPU if the run is on it; True: also beside those of another device; False:
            none.
        filter_keys: names of the statistics to log, without the class and the hook; None: all.
    """

    def __init__(self, cpu_stats: bool | None = None, filter_keys: Collection[str] | None = None) -> None:
        if isinstance(filter_keys, str):
            raise MisconfigurationException(
                f"DeviceStatsMonitor(filter_keys={filter_keys!r}) is text, not a set of names: use {{{filter_keys!r}}}."
            )
        self._cpu_stats = cpu_stats
        self._filter_keys = None if filter_keys is None else frozenset(filter_keys)
        self._sources: list[Source] = []
        self._stepped = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where statistics come from, and that they can be had.

        Raises:
            MisconfigurationException: there is no logger, or the accelerator has no statistics.
            MissingPackage: those of the CPU are wanted and psutil is not installed.
        """
        if not trainer.loggers:
            raise MisconfigurationException(
                "DeviceStatsMonitor needs a logger, and the Trainer has none: leave out the callback, or logger=False."
            )
        self._sources = self._find_sources(trainer) if trainer.is_global_zero else []
        # The use of processors is counted from one call to the next: this is the first.
        found = {name for source in self._sources for name in source()}
        unknown = sorted((self._filter_keys or frozenset()) - found) if found else []
        if unknown:
            rank_zero_warn(
                f"DeviceStatsMonitor(filter_keys=...) names {unknown[0]!r}, which no statistic is called here."
                f"{did_you_mean(unknown[0], found)} There are: {', '.join(sorted(found))}."
            )

    def _find_sources(self, trainer: Trainer) -> list[Source]:
        accelerator, device = trainer.accelerator, trainer.strategy.root_device
        if device.type == "cpu" and self._cpu_stats is False:
            return []
        sources: list[Source] = []
        if supports(accelerator, SupportsDeviceStats):
            own = accelerator
            sources.append(lambda: own.get_device_stats(device))
        elif not self._cpu_stats:
            raise MisconfigurationException(
                f"DeviceStatsMonitor: accelerator {accelerator.name()!r} reports no statistics (it has no "
                "get_device_stats). Pass cpu_stats=True for those of the host alone, or leave out the callback."
            )
        if self._cpu_stats and device.type != "cpu":
            host = load(ACCELERATORS, "cpu")
            if supports(host, SupportsDeviceStats):
                cpu = host
                sources.append(lambda: cpu.get_device_stats(device))
        return sources

    def _log(self, trainer: Trainer, hook: str, batches: int) -> None:
        every = trainer.log_every_n_steps
        if not self._sources or not every or not (batches % every == 0 or trainer.should_stop):
            return
        stats = {name: value for source in self._sources for name, value in source().items()}
        if self._filter_keys is not None:
            stats = {name: value for name, value in stats.items() if name in self._filter_keys}
        x = trainer.fit_loop.epoch_loop.log_step
        reporter = reporter_of(trainer)
        for logger in trainer.loggers:
            separator = getattr(logger, "group_separator", "/")
            prefix = f"{type(self).__qualname__}.{hook}{separator}"
            reporter.pass_on(logger, {prefix + name: value for name, value in stats.items()}, x)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log at the batches that get rows."""
        self._stepped = trainer.batches_that_stepped
        self._log(trainer, "on_train_batch_start", self._stepped + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the batches that get rows."""
        self._log(trainer, "on_train_batch_end", self._stepped + 1)

    def _evaluating(self, trainer: Trainer, hook: str, batch_idx: int) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, hook, batch_idx + 1)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log every ``log_every_n_steps`` batches."""
        self._evaluating(trainer, "on_validation_batch_start", batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log every ``log_every_n_steps`` batches."""
        self._evaluating(trainer, "on_validation_batch_end", batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log every ``log_every_n_steps`` batches."""
        self._evaluating(trainer, "on_test_batch_start", batch_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log every ``log_every_n_steps`` batches."""
        self._evaluating(trainer, "on_test_batch_end", batch_idx)
