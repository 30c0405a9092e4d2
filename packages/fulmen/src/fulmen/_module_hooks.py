"""The hooks of modules and data modules, each a no-op or torch's obvious default.

Whether a class overrides a hook is decided by comparing its attribute with the one here, so that what nobody overrides
costs a run nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from fulmen._collection import move_to_device
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["CheckpointHooks", "DataHooks", "ModuleHooks", "Stage"]

Stage = Literal["fit", "validate", "test", "predict"]


class ModuleHooks:
    """What a ``LightningModule`` may do at the moments of a run."""

    def on_fit_start(self) -> None:
        """Called after the model is placed and the optimizers exist, before anything runs."""

    def on_fit_end(self) -> None:
        """Called when fit ends, after the strategy has given the devices back."""

    def on_train_start(self) -> None:
        """Called when training begins, after the sanity check."""

    def on_train_end(self) -> None:
        """Called when training ends."""

    def on_validation_start(self) -> None:
        """Called when validation begins."""

    def on_validation_end(self) -> None:
        """Called when validation ends."""

    def on_test_start(self) -> None:
        """Called when testing begins."""

    def on_test_end(self) -> None:
        """Called when testing ends."""

    def on_predict_start(self) -> None:
        """Called when prediction begins."""

    def on_predict_end(self) -> None:
        """Called when prediction ends."""

    def on_train_epoch_start(self) -> None:
        """Called when a training epoch begins."""

    def on_train_epoch_end(self) -> None:
        """Called when a training epoch ends, before epoch-level values go to the loggers."""

    def on_validation_epoch_start(self) -> None:
        """Called when the pass over the validation data begins."""

    def on_validation_epoch_end(self) -> None:
        """Called when the pass over the validation data ends."""

    def on_test_epoch_start(self) -> None:
        """Called when the pass over the test data begins."""

    def on_test_epoch_end(self) -> None:
        """Called when the pass over the test data ends."""

    def on_predict_epoch_start(self) -> None:
        """Called when the pass over the prediction data begins."""

    def on_predict_epoch_end(self) -> None:
        """Called when the pass over the prediction data ends."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Called before a training batch, which is on the device. Returning ``-1`` skips the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after a training batch. ``outputs`` is what ``training_step`` gave, its loss detached."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a validation batch, which is on the device."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a validation batch with what its step returned."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a test batch, which is on the device."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a test batch with what its step returned."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a prediction batch, which is on the device."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a prediction batch with what its step returned."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called before the gradients of ``optimizer`` are cleared."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Called before the backward pass of ``loss``, which is already divided by the accumulation."""

    def on_after_backward(self) -> None:
        """Called after the backward pass, before the gradients are unscaled or clipped."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called before ``optimizer`` steps: gradients are unscaled and not yet clipped."""

    def configure_model(self) -> None:
        """Create large layers here: it runs under the strategy's device, dtype and sharding contexts.

        Called by every ``fit``, ``validate``, ``test``, ``predict`` and ``load_from_checkpoint``, so it must leave a
        module that it has already created alone.
        """

    def on_validation_model_zero_grad(self) -> None:
        """Clear gradients before validation within an epoch, to free their memory."""
        cast("nn.Module", self).zero_grad()

    def on_validation_model_eval(self) -> None:
        """Switch to evaluation mode before validation."""
        self._whole_model().eval()

    def on_validation_model_train(self) -> None:
        """Switch back after validation. Not overridden, each submodule gets back the mode that it had."""
        self._whole_model().train()

    def on_test_model_eval(self) -> None:
        """Switch to evaluation mode before testing."""
        self._whole_model().eval()

    def on_test_model_train(self) -> None:
        """Switch back after testing. Not overridden, each submodule gets back the mode that it had."""
        self._whole_model().train()

    def on_predict_model_eval(self) -> None:
        """Switch to evaluation mode before prediction."""
        self._whole_model().eval()

    def _whole_model(self) -> nn.Module:
        model = getattr(getattr(self, "_trainer", None), "model", None)
        return cast("nn.Module", self if model is None else model)


class DataHooks:
    """Where data comes from and how it gets to the device."""

    prepare_data_per_node: bool = True
    """Whether ``prepare_data`` runs once on every node; otherwise once in the whole run."""

    def prepare_data(self) -> None:
        """Download and preprocess. Runs in one process (per node): assign nothing to ``self`` here."""

    def setup(self, stage: Stage) -> None:
        """Called on every rank when ``fit``, ``validate``, ``test`` or ``predict`` begins."""

    def teardown(self, stage: Stage) -> None:
        """Called on every rank when ``fit``, ``validate``, ``test`` or ``predict`` ends."""

    def train_dataloader(self) -> Any:
        """One loader, or nested collections of loaders, for training."""
        raise _missing(self, "train_dataloader", "fit", "train_dataloaders")

    def val_dataloader(self) -> Any:
        """One loader or several for validation."""
        raise _missing(self, "val_dataloader", "validate", "dataloaders")

    def test_dataloader(self) -> Any:
        """One loader or several for testing."""
        raise _missing(self, "test_dataloader", "test", "dataloaders")

    def predict_dataloader(self) -> Any:
        """One loader or several for prediction."""
        raise _missing(self, "predict_dataloader", "predict", "dataloaders")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the host, before it goes to the device; return the batch."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return ``batch`` on ``device``: tensors in nested collections, and any object with a ``to`` method."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch on the device; return the batch."""
        return batch


class CheckpointHooks:
    """What an object adds to a checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called last while a checkpoint is built; ``checkpoint`` may be changed in place."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called when a checkpoint was read, before weights are taken from it; may be changed in place."""


def _missing(owner: object, hook: str, method: str, argument: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{type(owner).__name__}.{hook}() was called but is not defined. "
        f"Define it, or give the data to Trainer.{method}({argument}=...)."
    )
