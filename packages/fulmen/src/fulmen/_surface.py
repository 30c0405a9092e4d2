"""The Trainer's readable surface: what callbacks, loggers and integrations use, under Lightning's names."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from fulmen._run_loaders import train_loader
from fulmen._surface_loops import LoopSurface
from fulmen._surface_ranks import RankSurface
from fulmen._surface_settings import SettingsSurface
from fulmen._surface_stages import StageSurface
from fulmen._verify import overrides
from fulmen.callbacks.checkpoint import Checkpoint
from fulmen.callbacks.early_stopping import EarlyStopping
from fulmen.callbacks.progress import ProgressBar
from fulmen_data import CombinedLoader

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fulmen._loaders import EvalLoaders
    from fulmen._reporting import Reporter
    from fulmen._session import Session
    from fulmen.data_wait import DataWait
    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule
    from fulmen.optimizer import LRSchedulerConfig
    from fulmen.plan import Plan
    from fulmen.runlog._settings import LogDelivery
    from fulmen.strategy_facade import StrategyFacade
    from fulmen_fabric import Assembly, World
    from fulmen_protocols import Accelerator, Logger, Precision, Profiler

__all__ = ["TrainerSurface"]


class TrainerSurface(SettingsSurface, LoopSurface, StageSurface, RankSurface):
    """Properties over what a Trainer holds; no behaviour."""

    assembly: Assembly
    world: World
    strategy: StrategyFacade
    callbacks: list[Any]
    profiler: Profiler
    log_delivery: LogDelivery
    fast_dev_run: int
    _session: Session | None
    _plan: Plan
    _reporter: Reporter
    _loggers: list[Logger]
    _ckpt_path: str | None
    _loaders_before: dict[str, EvalLoaders]
    _data_wait: DataWait | None = None
    _users_ckpt_path: str | None = None
    _shared_log_dir: str | None = None

    # ------------------------------------------------------------------ where we run

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator in use."""
        return self.assembly.accelerator

    @property
    def precision(self) -> str:
        """The precision's name, for example ``32-true``."""
        return self.assembly.precision_name

    @property
    def precision_plugin(self) -> Precision:
        """The precision in use."""
        return self.assembly.precision

    @property
    def scaler(self) -> Any:
        """The gradient scaler of ``16-mixed``, else None."""
        return getattr(self.assembly.precision, "scaler", None)

    @property
    def device_ids(self) -> list[int]:
        """Ids of this node's devices."""
        return list(self.assembly.device_ids)

    @property
    def num_devices(self) -> int:
        """Devices of this node."""
        return len(self.assembly.devices)

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self.assembly.num_nodes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """``num_replicas`` and ``rank`` for a sampler of one's own."""
        return {"num_replicas": self.world.data_parallel_size, "rank": self.world.data_parallel_rank}

    # ------------------------------------------------------------------ what we run

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the last call; None before the first, which is not in the type: callbacks run later."""
        return cast("LightningModule", None if self._session is None else self._session.module)

    @property
    def model(self) -> nn.Module | None:
        """The module as the strategy placed it, wrapped where it wraps."""
        session = self._session
        return None if session is None else session.placed or session.module

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The datamodule of the last call."""
        return None if self._session is None else self._session.datamodule

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the running fit. Settable: the loop takes them up after the batch in hand."""
        return [] if self._session is None else self._session.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        if self._session is not None:
            self._session.optimizers = list(optimizers)
            self._progress.replan = True

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers of the running fit. Settable: the loop takes them up after the batch in hand."""
        return [] if self._session is None else self._session.schedulers

    @lr_scheduler_configs.setter
    def lr_scheduler_configs(self, configs: list[LRSchedulerConfig]) -> None:
        if self._session is not None:
            self._session.schedulers = list(configs)
            self._progress.replan = True

    @property
    def forward_only(self) -> bool:
        """Whether training batches are only run forward: no backward pass, no optimizer step. Settable."""
        return self._session is not None and self._session.forward_only

    @forward_only.setter
    def forward_only(self, value: bool) -> None:
        if self._session is not None and self._session.forward_only != value:
            self._session.forward_only = value
            self._progress.replan = True

    def place_model_again(self) -> None:
        """Let the strategy wrap the model anew, once ``requires_grad`` of a parameter has changed during a fit.

        A wrapper such as DDP's reduces only what needed a gradient when it was made. Call it at the start of an epoch
        or between two optimizer steps, on every rank.
        """
        if self._session is not None:
            self._session.place_again()
            self.strategy.model = self._session.placed
            self._progress.replan = True

    @property
    def _manual(self) -> Any:
        return None if self._session is None else self._session.manual

    # ------------------------------------------------------------------ progress

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, all optimizers together."""
        manual = self._manual
        return self._progress.updates if manual is None else manual.updates()

    @property
    def batches_that_stepped(self) -> int:
        """Batches after which an optimizer was stepped so far: the loggers' x of the next batch."""
        return self._progress.stepped_batches

    @property
    def current_epoch(self) -> int:
        """Completed epochs; the running one's index."""
        return self._progress.epoch

    @property
    def data_wait(self) -> DataWait | None:
        """How long training has waited for its data: of the running fit, or of the last one. Asks no other rank.

        None before the first, and on devices whose queue cannot be asked.
        """
        waits = None if self._session is None else self._session.data_waits
        return self._data_wait if waits is None else waits.figures(self._progress.total_batches)

    @property
    def should_stop(self) -> bool:
        """Whether somebody asked training to stop. Set it to True from any hook, on every rank alike."""
        return self._progress.stop_reason is not None

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value:
            self._progress.stop("trainer.should_stop was set")
        else:
            self._progress.stop_reason = None

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch in hand, or the one just trained, is the last of its epoch."""
        progress, session = self._progress, self._session
        if progress.epoch_is_whole:
            return True
        loader = None if session is None else session.train_loader
        in_hand = progress.epoch_started and not progress.epoch_ended and not progress.batch_is_open
        return in_hand and loader is not None and (loader.last_is_out or progress.batch + 1 >= loader.batches)

    @property
    def val_check_batch(self) -> float | None:
        """Batches between validations of the running fit; ``inf`` without a known end, None before it is known."""
        if not self._train_loader_is_known:
            return None
        every = self._plan.validate_every_batches
        return self._plan.batches if every == math.inf else every

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole fit; ``inf`` when unbounded. May ask for the training loader."""
        if self._session is None:
            return math.inf
        self._load_training_data()
        return replace(
            self._plan,
            max_epochs=self.max_epochs,
            max_steps=self.max_steps,
            accumulate=self.accumulate_grad_batches,
            batches=self.num_training_batches,
        ).estimated_steps()

    def _load_training_data(self) -> None:
        """Ask for the training loader, unless it is known or nothing is trained."""
        if self._session is not None and not self._train_loader_is_known:
            train_loader(self._session, self.settings).setup(self._progress.epoch)

    @property
    def num_training_batches(self) -> float:
        """Training batches of an epoch on this rank; ``inf`` when unknown."""
        session = self._session
        if session is None or session.train_loader is None or not session.train_loader.is_loaded:
            return math.inf
        return session.train_loader.batches

    @property
    def _train_loader_is_known(self) -> bool:
        loader = None if self._session is None else self._session.train_loader
        return loader is not None and loader.is_loaded

    def _limits(self, stage: str) -> list[float]:
        loaders = self._eval_loaders(stage)
        return [] if loaders is None else list(loaders.limits)

    def _eval_loaders(self, stage: str) -> EvalLoaders | None:
        """Those of the running call, else of the last one that had any."""
        session = self._session
        loaders = None if session is None else session.eval_loaders.get(stage)
        return self._loaders_before.get(stage) if loaders is None else loaders

    @property
    def num_val_batches(self) -> list[float]:
        """Validation batches of each loader on this rank."""
        return self._limits("val")

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Sanity-check batches of each validation loader."""
        return [min(limit, self.num_sanity_val_steps) for limit in self._limits("val")]

    @property
    def num_test_batches(self) -> list[float]:
        """Test batches of each loader on this rank."""
        return self._limits("test")

    @property
    def num_predict_batches(self) -> list[float]:
        """Prediction batches of each loader on this rank."""
        return self._limits("predict")

    @property
    def train_dataloader(self) -> Any:
        """The training loader, or a collection of them shaped like the user's; split over ranks."""
        session = self._session
        return None if session is None or session.train_loader is None else _as_given(session.train_loader.loader)

    def _loaders(self, stage: str) -> Any:
        loaders = self._eval_loaders(stage)
        if loaders is None:
            return None
        return _as_given(loaders.collection)

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader, or a collection of them."""
        return self._loaders("val")

    @property
    def test_dataloaders(self) -> Any:
        """The test loader, or a collection of them."""
        return self._loaders("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction loader, or a collection of them."""
        return self._loaders("predict")

    @property
    def enable_validation(self) -> bool:
        """Whether the running fit validates."""
        session = self._session
        return (
            session is not None
            and session.sources["val"].is_defined
            and overrides(session.module, "validation_step")
            and self.limit_val_batches > 0
        )

    # ------------------------------------------------------------------ callbacks, loggers, metrics

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """Every checkpoint callback."""
        return [c for c in self.callbacks if isinstance(c, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first checkpoint callback, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """Every early-stopping callback."""
        return [c for c in self.callbacks if isinstance(c, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        """The first early-stopping callback, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        """The progress bar, or None."""
        return next((c for c in self.callbacks if isinstance(c, ProgressBar)), None)

    @property
    def loggers(self) -> list[Logger]:
        """The loggers. Settable, and the list may be changed in place: from the next row on they are used."""
        return self._loggers

    @loggers.setter
    def loggers(self, loggers: Iterable[Logger] | None) -> None:
        self._loggers = list(loggers or ())
        self._shared_log_dir = None
        reporter = getattr(self, "_reporter", None)
        if reporter is not None:
            reporter.loggers = self._loggers

    @property
    def logger(self) -> Logger | None:
        """The first logger, or None. Settable."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    @property
    def log_dir(self) -> str | None:
        """The run's folder: the first logger's, or ``default_root_dir``; rank 0's on every rank."""
        if self._shared_log_dir is not None:
            return self._shared_log_dir
        if not self.loggers:
            return self.default_root_dir
        first = self.loggers[0]
        return getattr(first, "log_dir", None) or getattr(first, "save_dir", None)

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """What callbacks monitor: the last value of everything logged, on the device it was logged from."""
        reporter = getattr(self, "_reporter", None)
        return {} if reporter is None else reporter.callback_metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """What was last sent to loggers."""
        reporter = getattr(self, "_reporter", None)
        return {} if reporter is None else reporter.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """What the progress bar shows, as floats."""
        reporter = getattr(self, "_reporter", None)
        return {} if reporter is None else reporter.progress_bar_metrics

    @property
    def ckpt_path(self) -> str | None:
        """The checkpoint that the last call resumed from or was tested with.

        Settable: the calls that follow use it where they are given none, until it is set to None.
        """
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: str | os.PathLike[str] | None) -> None:
        self._ckpt_path = self._users_ckpt_path = None if not path else os.fspath(path)

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return self.world.device


def _as_given(loaders: object) -> object:
    return loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
