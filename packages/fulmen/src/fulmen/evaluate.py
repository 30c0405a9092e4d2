"""The evaluation loop: validation, inside ``fit`` or alone, and test. It changes no weight and no training counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from fulmen.hooks import EvalHooks

__all__ = ["EvalParts", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvalParts:
    """What evaluation needs, as callables."""

    step: Callable[..., object]
    """Called with ``(batch, batch_idx)``, and ``dataloader_idx`` where there are several loaders."""
    transfer: Callable[[object, int], object]
    """Put a batch of loader ``dataloader_idx`` on the device."""
    no_grad: Callable[[], AbstractContextManager[object]]
    """``torch.no_grad`` or ``torch.inference_mode``."""
    model_eval: Callable[[], None]
    """Put the model into evaluation mode, remembering each submodule's flag."""
    model_train: Callable[[], None]
    """Give every submodule its flag back."""
    end_batch: Callable[[int], None] | None = None
    """Handle what was logged in this batch of loader ``dataloader_idx``; None where nothing is logged per step."""
    reduce: Callable[[], None] = lambda: None
    """Reduce epoch metrics; called before and after the hooks at the end of the epoch."""
    log: Callable[[], None] = lambda: None
    """Write epoch metrics to the loggers; called before ``on_end``."""


def evaluate(parts: EvalParts, hooks: EvalHooks, loaders: Sequence[Iterable[object]], limits: Sequence[float]) -> None:
    """Run every batch of ``loaders``, one after the other, through the evaluation step.

    Args:
        parts: how to evaluate a batch.
        hooks: who wants to hear of it.
        loaders: what to evaluate on.
        limits: batches to take from each loader; ``inf``: all.
    """
    if hooks.on_model_eval:
        for hook in hooks.on_model_eval:
            hook()
    else:
        parts.model_eval()
    with parts.no_grad():
        for hook in hooks.on_start:
            hook()
        for hook in hooks.on_epoch_start:
            hook()
        for dataloader_idx, (loader, limit) in enumerate(zip(loaders, limits, strict=True)):
            if limit > 0:
                evaluate_loader(parts, hooks, loader, limit, dataloader_idx, several=len(loaders) > 1)
        parts.reduce()
        for hook in hooks.on_epoch_end:
            hook()
        parts.reduce()
        parts.log()
        for hook in hooks.on_end:
            hook()
    if hooks.on_model_train:
        for hook in hooks.on_model_train:
            hook()
    else:
        parts.model_train()


def evaluate_loader(
    parts: EvalParts, hooks: EvalHooks, loader: Iterable[object], limit: float, dataloader_idx: int, *, several: bool
) -> None:
    """Run up to ``limit`` batches of one loader."""
    step, transfer, end_batch = parts.step, parts.transfer, parts.end_batch
    for batch_idx, batch in enumerate(loader):
        batch = transfer(batch, dataloader_idx)  # the batch on the device replaces the one off it
        for hook in hooks.on_batch_start:
            hook(batch, batch_idx, dataloader_idx)

        outputs = step(batch, batch_idx, dataloader_idx) if several else step(batch, batch_idx)

        for hook in hooks.on_batch_end:
            hook(outputs, batch, batch_idx, dataloader_idx)
        if end_batch is not None:
            end_batch(dataloader_idx)
        if batch_idx + 1 >= limit:
            return
