"""WeightAveraging and EMAWeightAveraging: an average of the weights, kept beside them while they are trained."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from fulmen.callbacks._requirements import require_whole_model
from fulmen.callbacks.callback import Callback
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from fulmen.callbacks.callback import Stage
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["EMAWeightAveraging", "WeightAveraging"]

_PREFIX = "module."  # of the averaged weights in AveragedModel's state


class WeightAveraging(Callback):
    """Keep an average of the weights, validate with it, save it, and leave the model with it when training ends.

    A checkpoint holds the averaged weights under ``state_dict``, so that ``load_from_checkpoint`` and
    ``trainer.test(ckpt_path=...)`` get them; the weights being trained are under ``current_model_state`` and the number
    of averaged models under ``averaging_state``, so that a resumed run goes on exactly. A file saved with
    ``save_weights_only`` holds the averaged weights alone.

    On several ranks every rank averages its own, equal, weights; averaged buffers are those of rank 0. The average of a
    model in a 16-bit dtype is kept in float32, where small updates do not get lost.

    Args:
        device: where the average lives; None: where the model does.
        use_buffers: whether buffers, such as running statistics, are averaged too; otherwise the average has the
            model's latest, to be recomputed with ``torch.optim.swa_utils.update_bn``.
        kwargs: ``avg_fn`` or ``multi_avg_fn`` of ``torch.optim.swa_utils.AveragedModel``; without them every model
            weighs the same.

    Raises:
        MisconfigurationTypeError: AveragedModel has no such argument, or it cannot be called.
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        _check_arguments(type(self).__name__, kwargs)
        self._device = torch.device(device) if isinstance(device, (str, int)) else device
        self._use_buffers = use_buffers
        self._kwargs = kwargs
        self._average_model: AveragedModel | None = None
        self._latest_update_step = 0
        self._latest_update_epoch = -1
        self._restored: dict[str, Any] | None = None
        self._update_is_owed = False
        self._module: LightningModule | None = None
        # The weights being trained, while the model holds the average.
        self._trained: list[Tensor] | None = None

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to average the weights of this moment; override it to choose. By default after every step.

        Args:
            step_idx: index of the optimizer step just taken, from 0; None at the end of an epoch.
            epoch_idx: index of the epoch that ends, from 0; None after a step.
        """
        return step_idx is not None

    # -- a run's beginning --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Begin anew, and refuse strategies that shard the model.

        Raises:
            MisconfigurationException: the strategy shards the model.
        """
        if stage != "fit":
            return
        require_whole_model(trainer, self)
        self._average_model = self._restored = self._trained = None
        self._module = pl_module
        self._latest_update_step, self._latest_update_epoch = 0, -1
        self._update_is_owed = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """When a fit resumes, load the weights being trained in place of the averaged ones."""
        if trainer.state.fn != "fit":
            return
        if "current_model_state" not in checkpoint or "averaging_state" not in checkpoint:
            rank_zero_warn(
                f"{trainer.ckpt_path} was saved without {type(self).__name__}: the model and its average both start "
                "from its weights."
            )
            return
        rank_zero_info("training goes on from current_model_state of the checkpoint; its state_dict is the average.")
        averaged = {_PREFIX + name: value for name, value in checkpoint["state_dict"].items()}
        self._restored = {**averaged, **checkpoint["averaging_state"]}
        pl_module.load_state_dict(checkpoint["current_model_state"], strict=pl_module.strict_loading)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the average, now that the model is placed and has all its layers."""
        self._average_model = AveragedModel(
            pl_module,
            device=pl_module.device if self._device is None else self._device,
            use_buffers=self._use_buffers,
            **self._kwargs,
        )
        self._average_model.requires_grad_(False)
        for tensor in _tensors(self._average_model.module):
            if tensor.is_floating_point() and tensor.element_size() < 4:
                tensor.data = tensor.data.float()
        if self._restored is not None:
            self._average_model.load_state_dict(self._restored, strict=pl_module.strict_loading)
            self._restored, self._update_is_owed = None, True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch up: another callback may have saved after a step and before its average."""
        if self._update_is_owed:
            self._update_is_owed = False
            self._update_after_step(trainer, pl_module)

    # -- averaging ----------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after an optimizer step, if ``should_update`` says so."""
        self._update_after_step(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average at the end of an epoch, if ``should_update`` says so."""
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._average().update_parameters(pl_module)
            self._latest_update_epoch = epoch

    def _update_after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._average().update_parameters(pl_module)
            self._latest_update_step = step

    def _average(self) -> AveragedModel:
        assert self._average_model is not None, "a fit makes the average when it starts"
        return self._average_model

    # -- who holds which weights --------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the averaged weights. Validation after training finds them in the model already."""
        if self._average_model is not None and trainer.state.fn == "fit":
            self._show_average(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights being trained."""
        if trainer.state.fn == "fit":
            self._take_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model with the average. The trained weights are kept, for a checkpoint saved from now on."""
        self._show_average(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its own weights back if validation failed, before anybody saves it."""
        if trainer.state.fn == "fit":
            self._take_back(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Give the device's memory back: like the model, the average goes to the CPU."""
        if self._average_model is not None:
            self._average_model.cpu()
        if self._trained is not None:
            self._trained = [tensor.cpu() for tensor in self._trained]

    @torch.no_grad()
    def _show_average(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Gradients are gone while this copy exists, so the peak of memory is that of training.
        self._trained = [current.clone() for current in _tensors(pl_module)]
        for averaged, current in zip(_tensors(self._average().module), _tensors(pl_module), strict=True):
            current.copy_(averaged)
        if trainer.world_size > 1:
            # Running statistics are each rank's own; the average that counts, and is saved, is rank 0's.
            for buffer in pl_module.buffers():
                trainer.world.collectives.broadcast(buffer)

    @torch.no_grad()
    def _take_back(self, pl_module: LightningModule) -> None:
        trained, self._trained = self._trained, None
        if trained is not None:
            for held, current in zip(trained, _tensors(pl_module), strict=True):
                current.copy_(held)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """After which step the average was last updated."""
        return {"latest_update_step": self._latest_update_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from that step."""
        self._latest_update_step = state_dict["latest_update_step"]

    def weights_state(self) -> dict[str, Any]:
        """The average, for a snapshot of the weights in memory (``SpikeRewind``)."""
        return {} if self._average_model is None else self._average_model.state_dict()

    def load_weights_state(self, state: Mapping[str, Any]) -> None:
        """Go back to an average that ``weights_state`` gave."""
        if self._average_model is not None:
            self._average_model.load_state_dict(state)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the model's weights, and what only resuming needs beside it."""
        if self._average_model is None or pl_module is not self._module:
            return  # outside of a fit: the model is all there is
        state = self._average_model.state_dict()
        current = dict(checkpoint["state_dict"])
        if self._trained is not None:
            held = {id(tensor): value for tensor, value in zip(_tensors(pl_module), self._trained, strict=True)}
            for name, tensor in pl_module.state_dict(keep_vars=True).items():
                current[name] = held.get(id(tensor), current.get(name))
        checkpoint["current_model_state"] = current
        checkpoint["state_dict"] = {
            name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)
        }
        checkpoint["averaging_state"] = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}

    def weights_to_save(
        self, trainer: Trainer, pl_module: LightningModule, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """What a file of weights only holds: the average."""
        checkpoint = {"state_dict": state_dict}
        self.on_save_checkpoint(trainer, pl_module, checkpoint)
        return checkpoint["state_dict"]


class EMAWeightAveraging(WeightAveraging):
    """Keep an exponential moving average of the weights: ``average = decay * average + (1 - decay) * weights``.

    Args:
        device: where the average lives; None: where the model does.
        use_buffers: whether buffers, such as running statistics, are averaged too.
        decay: how much of the average stays at each update, from 0 to 1.
        update_every_n_steps: average after every so many optimizer steps; 0: after none.
        update_starting_at_step: index of the first optimizer step, from 0, after which to average; None: 0.
        update_starting_at_epoch: average at the end of epochs too, from this index on; None: at none.
        kwargs: none is left for AveragedModel; those that it has are refused.

    Raises:
        MisconfigurationException: an argument is out of range, or the average would never be updated.
        MisconfigurationTypeError: there is no such argument.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise MisconfigurationException(f"EMAWeightAveraging(decay={decay!r}): give a number from 0 to 1.")
        counts = {
            "update_every_n_steps": update_every_n_steps,
            "update_starting_at_step": update_starting_at_step or 0,
            "update_starting_at_epoch": update_starting_at_epoch or 0,
        }
        for name, value in counts.items():
            if value < 0:
                raise MisconfigurationException(f"EMAWeightAveraging({name}={value!r}): give an integer of at least 0.")
        if update_every_n_steps == 0 and update_starting_at_epoch is None:
            raise MisconfigurationException(
                "EMAWeightAveraging(update_every_n_steps=0) would never update the average. Give at least 1, or "
                "update_starting_at_epoch."
            )
        for name in ("avg_fn", "multi_avg_fn"):
            if name in kwargs:
                raise MisconfigurationTypeError(
                    f"EMAWeightAveraging({name}={kwargs[name]!r}) has an averaging function already. Use "
                    f"WeightAveraging({name}=...)."
                )
        super().__init__(device, use_buffers, **kwargs, avg_fn=_ema(decay))
        self.update_every_n_steps = update_every_n_steps
        self.update_starting_at_step = update_starting_at_step
        self.update_starting_at_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to average the weights of this moment.

        Args:
            step_idx: index of the optimizer step just taken, from 0; None at the end of an epoch.
            epoch_idx: index of the epoch that ends, from 0; None after a step.
        """
        if step_idx is not None:
            every = self.update_every_n_steps
            return every > 0 and step_idx >= (self.update_starting_at_step or 0) and step_idx % every == 0
        begin = self.update_starting_at_epoch
        return epoch_idx is not None and begin is not None and epoch_idx >= begin


def _ema(decay: float) -> Callable[..., Any]:
    make: Any = get_ema_avg_fn  # torch gives it no types
    return cast("Callable[..., Any]", make(decay))


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())


def _check_arguments(name: str, kwargs: dict[str, Any]) -> None:
    known = set(inspect.signature(AveragedModel).parameters) - {"model", "device", "use_buffers"}
    for argument, value in kwargs.items():
        if argument not in known:
            raise MisconfigurationTypeError(
                f"{name} got {argument}={value!r}, which torch.optim.swa_utils.AveragedModel does not have."
                f"{did_you_mean(argument, known)} It has: {', '.join(sorted(known))}."
            )
        if value is not None and not callable(value):
            raise MisconfigurationTypeError(f"{name}({argument}={value!r}): give a function.")
    if len([value for value in kwargs.values() if value is not None]) > 1:
        raise MisconfigurationException(f"{name} got avg_fn and multi_avg_fn: they say the same thing. Drop one.")
