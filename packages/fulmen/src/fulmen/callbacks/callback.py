"""Callback: the base class with every hook as a no-op. A hook that is not overridden costs a run nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

    Stage = Literal["fit", "validate", "test", "predict"]

__all__ = ["Callback"]


class Callback:
    """Something that happens beside training: saving, stopping, drawing, measuring.

    Override the hooks you need; the Trainer calls only those. For every event callbacks run before the module's hook of
    the same name, in the order of ``Trainer(callbacks=...)``, except that those with ``runs_first`` come first and
    checkpoint callbacks last.
    """

    runs_first: ClassVar[bool] = False
    """Whether to come before all other callbacks, wherever in the list: for those that change what others see of a run,
    such as a search for a batch size or a learning rate."""

    @property
    def state_key(self) -> str:
        """Under which name ``state_dict`` is stored in a checkpoint. Two stateful callbacks of a run need two keys."""
        return type(self).__qualname__

    def _generate_state_key(self, **arguments: object) -> str:
        """A ``state_key`` that tells instances with different ``arguments`` apart; these must be plain data."""
        return f"{type(self).__qualname__}{arguments!r}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain data and tensors. An empty dict is not stored."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; called before ``on_fit_start`` with a copy of its own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Called when ``fit``, ``validate``, ``test`` or ``predict`` begins, on every rank; ``stage`` names which."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Called when ``fit``, ``validate``, ``test`` or ``predict`` ends, on every rank."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the model is placed and the optimizers exist, before anything runs."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when fit ends, after the strategy has given the devices back."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before the validation batches that are tried before training."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the validation batches that are tried before training."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins, after the sanity check."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training ends."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a training epoch begins."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a training epoch ends, before epoch-level values go to the loggers."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training batch, which is already on the device."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a training batch. ``outputs`` is what ``training_step`` gave, its loss detached."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation begins."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when validation ends."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the pass over the validation data begins."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the pass over the validation data ends."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a validation batch, which is already on the device."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after a validation batch with what its step returned."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when test begins."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when test ends."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the pass over the test data begins."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the pass over the test data ends."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a test batch, which is already on the device."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after a test batch with what its step returned."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when prediction begins."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when prediction ends."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the pass over the prediction data begins."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when the pass over the prediction data ends."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a prediction batch, which is already on the device."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after a prediction batch with what its step returned."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before the gradients of ``optimizer`` are cleared."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called before the backward pass of ``loss``, which is already divided by the accumulation."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the backward pass, before the gradients are unscaled or clipped."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called before ``optimizer`` steps: gradients are unscaled and not yet clipped."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when the run ends by any exception, ``KeyboardInterrupt`` and termination signals included."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called while a checkpoint is built; ``checkpoint`` may be changed in place."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint was read, before states are restored from it."""
