"""ModelSummary (callback): prints what the module consists of when a fit begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.utilities.model_summary import ModelSummary as Summary
from fulmen.utilities.model_summary import format_summary_table

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["ModelSummary"]


class ModelSummary(Callback):
    """Prints layers, parameters and memory of the module at the start of ``fit``.

    Args:
        max_depth: levels of submodules to list; -1: all; 0: print nothing.
        summarize_kwargs: passed to ``summarize``, for subclasses.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarize on every rank, since a sharded module's forward pass needs them all; print on rank 0."""
        if self._max_depth == 0:
            return
        summary = self._summary(trainer, pl_module)
        if trainer.is_global_zero:
            self.summarize(
                summary._get_summary_data(),  # pyright: ignore[reportPrivateUsage]
                summary.total_parameters,
                summary.trainable_parameters,
                summary.model_size,
                summary.total_training_modes,
                total_flops=summary.total_flops,
                **self._summarize_kwargs,
            )

    def _summary(self, trainer: Trainer, pl_module: LightningModule) -> Summary:
        return Summary(pl_module, max_depth=self._max_depth)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the columns and totals; ``model_size`` is in MB. Override to print them otherwise."""
        table = format_summary_table(
            total_parameters, trainable_parameters, model_size, total_training_modes, total_flops, *summary_data
        )
        print(table)
