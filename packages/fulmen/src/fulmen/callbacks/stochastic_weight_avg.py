"""StochasticWeightAveraging: the mean of the weights of a run's last epochs, found at a high learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from fulmen.callbacks._requirements import BATCH_NORM, require_whole_model
from fulmen.callbacks.callback import Callback
from fulmen.optimizer import LRSchedulerConfig
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from fulmen.callbacks.callback import Stage
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["StochasticWeightAveraging"]

_AVG_FN = Callable[[Tensor, Tensor, Tensor], Tensor]
_CPU = torch.device("cpu")


class StochasticWeightAveraging(Callback):
    """Average the weights over the last epochs, while the learning rate is annealed to a constant one.

    From ``swa_epoch_start`` on, the weights that an epoch begins with go into the average, and ``SWALR`` takes the
    place of the learning-rate scheduler. When training ends the model gets the average. If it has batch norm, one more
    epoch follows, which only runs forward: the running statistics of the averaged weights are collected from it.
    Training that ends before its last epoch gets the average too, unless the model has batch norm, whose statistics
    would not belong to it: then the weights stay as they were trained. Without ``max_epochs`` no epoch is the last, so
    the model gets the average and the statistics are left to ``torch.optim.swa_utils.update_bn``.

    Args:
        swa_lrs: learning rate to anneal to, for all parameter groups or one for each.
        swa_epoch_start: first epoch to average, counted from 1, or a fraction of ``max_epochs``.
        annealing_epochs: epochs that the annealing takes; 0: none.
        annealing_strategy: ``"cos"`` or ``"linear"``.
        avg_fn: called with the average, the weights and the number of models averaged so far; returns the new average.
            By default every model weighs the same.
        device: where the average lives; None: where the model does.

    Raises:
        MisconfigurationException: an argument is out of range.
        MisconfigurationTypeError: an argument has the wrong type.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization".
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: _AVG_FN | None = None,
        device: torch.device | str | None = _CPU,
    ) -> None:
        _check_arguments(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy, avg_fn, device)
        self.n_averaged: Tensor | None = None
        self.momenta: dict[nn.Module, float | None] = {}
        self._swa_lrs = swa_lrs
        self._swa_epoch_start = swa_epoch_start
        self._annealing_epochs = annealing_epochs
        self._annealing_strategy: Literal["cos", "linear"] = annealing_strategy
        self._avg_fn = avg_fn or self.avg_fn
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self.n_averaged = None
        self._average_model: LightningModule | None = None
        self._swa_scheduler: SWALR | None = None
        self._latest_update_epoch = -1
        self._restored: dict[str, Any] | None = None
        self._start_epoch = 0
        self._max_epochs: int | None = None
        self._has_extra_epoch = False
        self._updates_batch_norm = False

    @property
    def swa_start(self) -> int:
        """Index of the first epoch that is averaged, from 0."""
        return max(self._start_epoch - 1, 0)

    @property
    def swa_end(self) -> float:
        """Index of the last epoch that is averaged, from 0; ``inf`` without ``max_epochs``."""
        return math.inf if self._max_epochs is None or self._max_epochs == -1 else self._max_epochs - 1

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: LightningModule) -> bool:
        """Whether any layer keeps running statistics."""
        return any(isinstance(module, BATCH_NORM) for module in pl_module.modules())

    # -- a run's beginning --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Begin anew, and refuse what cannot be averaged.

        Raises:
            MisconfigurationException: the strategy shards the model, or ``swa_epoch_start`` does not fit
                ``max_epochs``.
        """
        if stage != "fit":
            return
        require_whole_model(trainer, self)
        self._reset()
        start, epochs = self._swa_epoch_start, trainer.max_epochs
        if isinstance(start, float) and epochs == -1:
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_epoch_start={start!r}) is a fraction of max_epochs, and max_epochs=-1. "
                "Give the epoch as an integer."
            )
        self._start_epoch = int(epochs * start) if isinstance(start, float) else start
        if epochs != -1 and self.swa_start >= epochs:
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_epoch_start={start!r}) never begins: max_epochs={epochs}. "
                "Give an earlier epoch, or train longer."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch for batch norm, and go on with the average and the schedule of a resumed run.

        Raises:
            MisconfigurationException: there are several optimizers or schedulers, ``swa_lrs`` has another length than
                the parameter groups, or batch norm would need an epoch without steps from manual optimization.
        """
        batch_norm = self.pl_module_contains_batch_norm(pl_module)
        self._check_run(trainer, pl_module, batch_norm)
        self._max_epochs = trainer.max_epochs
        if batch_norm and self._max_epochs != -1:
            trainer.max_epochs = self._max_epochs + 1
            self._has_extra_epoch = True
        restored, self._restored = self._restored, None
        if restored is None:
            return
        self._latest_update_epoch = restored["latest_update_epoch"]
        if restored["n_averaged"] == 0:
            return
        self._make_average(pl_module)
        assert self._average_model is not None
        self._average_model.load_state_dict(restored["average_model_state"])
        self.n_averaged = torch.tensor(restored["n_averaged"], dtype=torch.long, device=pl_module.device)
        # The checkpoint's schedule is SWALR's; it is loaded into this one, like the optimizer's learning rates.
        self._swap_scheduler(trainer)
        self._updates_batch_norm = bool(restored.get("updates_batch_norm", False))

    def _check_run(self, trainer: Trainer, pl_module: LightningModule, batch_norm: bool) -> None:
        optimizers, schedulers = trainer.optimizers, trainer.lr_scheduler_configs
        if len(optimizers) != 1 or len(schedulers) > 1:
            raise MisconfigurationException(
                f"StochasticWeightAveraging works with one optimizer and at most one learning-rate scheduler, and "
                f"configure_optimizers returned {len(optimizers)} and {len(schedulers)}. Return fewer, or use "
                "WeightAveraging."
            )
        groups = len(optimizers[0].param_groups)
        if isinstance(self._swa_lrs, list) and len(self._swa_lrs) != groups:
            raise MisconfigurationException(
                f"StochasticWeightAveraging(swa_lrs={self._swa_lrs!r}) has {len(self._swa_lrs)} learning rates for "
                f"{groups} parameter group(s). Give one for each, or a single number."
            )
        if batch_norm and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"StochasticWeightAveraging recomputes batch norm's statistics in an epoch without steps, and "
                f"{type(pl_module).__name__} has automatic_optimization=False and steps by itself. Use automatic "
                "optimization, or WeightAveraging."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with an interrupted epoch for batch norm."""
        if self._updates_batch_norm:
            self._collect_statistics(trainer, pl_module)

    # -- epochs -------------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the weights, or prepare the epoch for batch norm."""
        epoch = trainer.current_epoch
        if self.swa_start <= epoch <= self.swa_end:
            if self._average_model is None:
                self._begin(trainer, pl_module)
            if epoch > self._latest_update_epoch:
                assert self._average_model is not None
                assert self.n_averaged is not None
                self.update_parameters(self._average_model, pl_module, self.n_averaged, self._avg_fn)
                self._latest_update_epoch = epoch
        elif self._has_extra_epoch and epoch == self.swa_end + 1 and self._average_model is not None:
            self.transfer_weights(self._average_model, pl_module)
            self.reset_batch_norm_and_save_state(pl_module)
            self._collect_statistics(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != self.swa_start:
            rank_zero_warn(
                f"StochasticWeightAveraging begins in epoch {trainer.current_epoch} and not in {self.swa_start}: the "
                "checkpoint that this run resumed from holds no average."
            )
        self._make_average(pl_module)
        self.n_averaged = torch.zeros((), dtype=torch.long, device=pl_module.device)
        self._swap_scheduler(trainer)

    def _make_average(self, pl_module: LightningModule) -> None:
        self._average_model = deepcopy(pl_module).to(self._device or pl_module.device)

    def _swap_scheduler(self, trainer: Trainer) -> None:
        self._swa_scheduler = SWALR(
            trainer.optimizers[0],
            cast("float", self._swa_lrs),  # torch takes a list as well
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
        )
        for config in trainer.lr_scheduler_configs:
            if config.interval != "epoch" or config.frequency != 1:
                rank_zero_warn(
                    f"StochasticWeightAveraging anneals once an epoch; the {type(config.scheduler).__name__} it "
                    f"replaces had interval={config.interval!r} and frequency={config.frequency}."
                )
            rank_zero_info(f"{type(config.scheduler).__name__} is replaced by SWALR")
        trainer.lr_scheduler_configs = [LRSchedulerConfig(self._swa_scheduler)]

    def _collect_statistics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run this epoch forward only, with statistics that are plain means over it."""
        self._updates_batch_norm = True
        trainer.forward_only = True
        for module in _batch_norms(pl_module):
            self.momenta.setdefault(module, module.momentum)
            module.momentum = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the epoch for batch norm."""
        if self._updates_batch_norm:
            self._end_statistics(trainer)

    def _end_statistics(self, trainer: Trainer) -> None:
        self._updates_batch_norm = False
        trainer.forward_only = False
        self.reset_momenta()

    # -- a run's end --------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model with the average."""
        extra_epoch, self._has_extra_epoch = self._has_extra_epoch, False
        if extra_epoch:
            assert self._max_epochs is not None
            trainer.max_epochs = self._max_epochs
        if self._average_model is None:
            return
        if not extra_epoch:
            self.transfer_weights(self._average_model, pl_module)
            if self.pl_module_contains_batch_norm(pl_module):
                rank_zero_warn(
                    "max_epochs=-1, so no epoch recomputed the statistics of batch norm for the averaged weights that "
                    "the model has now: call torch.optim.swa_utils.update_bn(loader, model)."
                )
        elif trainer.current_epoch <= self.swa_end + 1:
            rank_zero_warn(
                f"training ended in epoch {trainer.current_epoch} of {self._max_epochs}, before the statistics of "
                "batch norm could be recomputed for the averaged weights: the model keeps the weights as trained."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave Trainer and layers as they were."""
        trainer.forward_only = False
        self.reset_momenta()
        if self._has_extra_epoch:
            self._has_extra_epoch = False
            assert self._max_epochs is not None
            trainer.max_epochs = self._max_epochs

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Take the extra epoch back where a resumed run had nothing left to train, and free the device."""
        if self._has_extra_epoch:
            self.on_train_end(trainer, pl_module)
        if self._average_model is not None:
            self._average_model.cpu()

    # -- averaging ----------------------------------------------------------------------------------------------------

    @staticmethod
    @torch.no_grad()
    def transfer_weights(src_pl_module: LightningModule, dst_pl_module: LightningModule) -> None:
        """Copy the parameters of one module into another."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters(), strict=True):
            target.copy_(source)

    @staticmethod
    @torch.no_grad()
    def update_parameters(
        average_model: LightningModule, model: LightningModule, n_averaged: Tensor, avg_fn: _AVG_FN
    ) -> None:
        """Take the weights of ``model`` into ``average_model``, and count them in ``n_averaged``, shape ``()``."""
        is_first = bool(n_averaged == 0)  # waits for the device once an epoch
        for average, parameter in zip(average_model.parameters(), model.parameters(), strict=True):
            current = parameter.to(average.device)
            average.copy_(current if is_first else avg_fn(average, current, n_averaged.to(average.device)))
        n_averaged += 1

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """The mean of one more model: every model weighs the same."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    def reset_batch_norm_and_save_state(self, pl_module: LightningModule) -> None:
        """Forget the running statistics, and collect the next ones as plain means (``momentum=None``)."""
        self.momenta = {}
        for module in _batch_norms(pl_module):
            module.reset_running_stats()
            self.momenta[module] = module.momentum
            module.momentum = None

    def reset_momenta(self) -> None:
        """Give batch norm its momentum back."""
        for module, momentum in self.momenta.items():
            cast("nn.BatchNorm1d", module).momentum = momentum
        self.momenta = {}

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The average, how many models it holds, and its schedule."""
        return {
            "n_averaged": 0 if self.n_averaged is None else int(self.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": None if self._swa_scheduler is None else self._swa_scheduler.state_dict(),
            "average_model_state": None if self._average_model is None else self._average_model.state_dict(),
            "updates_batch_norm": self._updates_batch_norm,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there once the model is placed."""
        self._restored = state_dict


def _batch_norms(module: nn.Module) -> list[nn.BatchNorm1d]:
    """The layers with running statistics; all kinds have the attributes of ``BatchNorm1d``."""
    found = [m for m in module.modules() if isinstance(m, BATCH_NORM)]
    return cast("list[nn.BatchNorm1d]", [m for m in found if m.running_mean is not None])


def _check_arguments(
    swa_lrs: object, start: object, annealing_epochs: object, strategy: object, avg_fn: object, device: object
) -> None:
    name = "StochasticWeightAveraging"
    rates = cast("list[object]", swa_lrs) if isinstance(swa_lrs, list) else [swa_lrs]
    if not rates or not all(_is_number(rate) and cast("float", rate) > 0 for rate in rates):
        raise MisconfigurationException(
            f"{name}(swa_lrs={swa_lrs!r}): give a positive number, or a list of them, one for each parameter group."
        )
    is_epoch = isinstance(start, int) and not isinstance(start, bool) and start >= 1
    if not is_epoch and not (isinstance(start, float) and 0 <= start <= 1):
        raise MisconfigurationException(
            f"{name}(swa_epoch_start={start!r}): give an integer of at least 1, or a float from 0 to 1."
        )
    if isinstance(annealing_epochs, bool) or not isinstance(annealing_epochs, int) or annealing_epochs < 0:
        raise MisconfigurationException(
            f"{name}(annealing_epochs={annealing_epochs!r}): give an integer of at least 0."
        )
    if strategy not in ("cos", "linear"):
        raise MisconfigurationException(f"{name}(annealing_strategy={strategy!r}): use 'cos' or 'linear'.")
    if avg_fn is not None and not callable(avg_fn):
        raise MisconfigurationTypeError(f"{name}(avg_fn={avg_fn!r}): give a function, or None.")
    if device is not None and not isinstance(device, (torch.device, str)):
        raise MisconfigurationTypeError(f"{name}(device={device!r}): give a torch.device, its name, or None.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
