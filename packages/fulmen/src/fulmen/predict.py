"""The prediction loop: every batch once, in order, outputs kept on the CPU if somebody wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from fulmen.hooks import EvalHooks

__all__ = ["PredictParts", "predict"]


@dataclass(frozen=True, slots=True)
class PredictParts:
    """What prediction needs, as callables."""

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
    keep: Callable[[object], object] | None = None
    """Copy outputs to the CPU so that they can be returned; None: outputs are dropped."""
    predictions: list[list[object]] | None = None
    """Where to put what is kept, one list per loader, for hooks that read it while the loop runs."""


def predict(
    parts: PredictParts, hooks: EvalHooks, loaders: Sequence[Iterable[object]], limits: Sequence[float]
) -> list[list[object]]:
    """Run every batch of ``loaders``, one after the other, through the prediction step.

    Returns:
        One list of outputs per loader, empty where outputs are not kept.
    """
    predictions: list[list[object]] = [[] for _ in loaders] if parts.predictions is None else parts.predictions
    several = len(loaders) > 1
    step, transfer, keep = parts.step, parts.transfer, parts.keep
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
            kept = predictions[dataloader_idx]
            for batch_idx, batch in enumerate(loader) if limit > 0 else ():
                batch = transfer(batch, dataloader_idx)
                for hook in hooks.on_batch_start:
                    hook(batch, batch_idx, dataloader_idx)

                outputs = step(batch, batch_idx, dataloader_idx) if several else step(batch, batch_idx)

                for hook in hooks.on_batch_end:
                    hook(outputs, batch, batch_idx, dataloader_idx)
                if keep is not None:
                    kept.append(keep(outputs))
                if batch_idx + 1 >= limit:
                    break
        for hook in hooks.on_epoch_end:
            hook()
        for hook in hooks.on_end:
            hook()
    parts.model_train()
    return predictions
