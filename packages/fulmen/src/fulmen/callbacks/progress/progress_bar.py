"""ProgressBar: the base class of progress bars; it draws nothing itself."""

from __future__ import annotations

import builtins
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import BackendUnavailable
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["ProgressBar", "get_standard_metrics"]


class ProgressBar(Callback):
    """Base of progress bars: names, totals and metrics. Subclass it and override hooks to draw.

    ``setup`` disables it on ranks other than 0.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._eval_dataloader_idx: int | None = None
        self._warned_names: set[str] = set()

    @property
    def trainer(self) -> Trainer:
        """The Trainer of the running call.

        Raises:
            MisconfigurationException: before ``setup``.
        """
        if self._trainer is None:
            raise MisconfigurationException(
                f"{type(self).__name__}.trainer is known from setup() on: pass the bar to Trainer(callbacks=...)."
            )
        return self._trainer

    # What to write before a bar; properties, so that a subclass can replace them.

    @property
    def sanity_check_description(self) -> str:
        """What stands before the bar of the sanity check."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """What stands before the bar of training, followed by the epoch."""
        return "Epoch"

    @property
    def validation_description(self) -> str:
        """What stands before the bar of validation."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """What stands before the bar of a test."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """What stands before the bar of prediction."""
        return "Predicting"

    # How many batches; ``inf`` when unknown.

    @property
    def total_train_batches(self) -> float:
        """Training batches of an epoch."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches_current_dataloader(self) -> float:
        """Batches of the validation loader that runs, in the sanity check those that it tries."""
        trainer = self.trainer
        return self._of_current(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @property
    def total_test_batches_current_dataloader(self) -> float:
        """Batches of the test loader that runs."""
        return self._of_current(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> float:
        """Batches of the prediction loader that runs."""
        return self._of_current(self.trainer.num_predict_batches)

    @property
    def total_val_batches(self) -> float:
        """Batches of all validation loaders, 0 where a fit does not validate."""
        trainer = self.trainer
        return sum(trainer.num_val_batches) if trainer.enable_validation else 0

    def _of_current(self, batches: Sequence[float]) -> float:
        index = self._eval_dataloader_idx or 0
        return batches[index] if index < len(batches) else float("inf")

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Whether this is the first call, or the loader is another than at the last one."""
        changed = self._eval_dataloader_idx != dataloader_idx
        self._eval_dataloader_idx = dataloader_idx
        return changed

    def reset_dataloader_idx_tracker(self) -> None:
        """Let the next ``has_dataloader_changed`` answer True."""
        self._eval_dataloader_idx = None

    def disable(self) -> None:
        """Draw nothing from now on; called on ranks other than 0. A subclass says how.

        Raises:
            NotImplementedError: always, here.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it is disabled: define disable().")

    def enable(self) -> None:
        """Draw from now on. A subclass says how.

        Raises:
            NotImplementedError: always, here.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it is enabled: define enable().")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without breaking the bar."""
        builtins.print(*args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the Trainer; be silent on ranks other than 0."""
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What is shown beside the bar: ``v_num``, then everything logged with ``prog_bar=True``. Override to change.

        Never waits for a device; see ``Trainer.progress_bar_metrics``.
        """
        standard = get_standard_metrics(trainer)
        logged = trainer.progress_bar_metrics
        for name in sorted((standard.keys() & logged.keys()) - self._warned_names):
            self._warned_names.add(name)
            rank_zero_warn(
                f"the progress bar shows {name!r} by itself and it was logged too; the logged value is shown. To avoid "
                f"this, leave {name!r} out in an override of get_metrics()."
            )
        return {**standard, **logged}


def get_standard_metrics(trainer: Trainer) -> dict[str, int | str]:
    """What a bar shows of itself: ``v_num``, the loggers' versions; of a string its last 4 characters."""
    found: dict[int | str | None, None] = {}
    for logger in trainer.loggers:
        with suppress(BackendUnavailable):  # a server that is away stops no bar
            found[logger.version] = None
    versions = list(found)
    if not versions:
        return {}
    version = versions[0] if len(versions) == 1 else "_".join(str(each) for each in versions)
    if version is None or version == "":
        return {}
    return {"v_num": version[-4:] if isinstance(version, str) else version}
