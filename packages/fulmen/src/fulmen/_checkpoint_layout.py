"""The content of a checkpoint: Lightning's documented keys, and under ``fulmen`` what an exact resume needs besides.

Only plain data and tensors, so that ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from fulmen_protocols import CheckpointError

if TYPE_CHECKING:
    from fulmen.progress import Progress

__all__ = ["LIGHTNING_VERSION", "lightning_loops", "progress_from_lightning"]

LIGHTNING_VERSION = "2.6.0"
"""The version whose layout is written, so that Lightning can read the file."""


def lightning_loops(progress: Progress, loaders: list[Any], *, automatic: bool, validating: bool) -> dict[str, Any]:
    """The ``loops`` entry as Lightning writes it, in all that Lightning reads again.

    Args:
        progress: the counters.
        loaders: states of the loaders that have one.
        automatic: whether the loop steps the optimizers, or the module does.
        validating: whether a validation runs; then the batch before it is done.
    """
    updates = progress.updates if automatic else 0
    steps = {"ready": updates, "completed": updates}
    manual_steps = {"ready": progress.updates - updates, "completed": progress.updates - updates}
    # A batch is completed when its hooks have run; Lightning sees from this where a save was made.
    is_open = int(progress.batch_is_open and not validating and not progress.epoch_ended)
    batches = _tracker(progress.total_batches, is_open)
    in_epoch = _tracker(progress.batch, is_open)
    empty = {"total": _tracker(0), "current": _tracker(0), "is_last_batch": False}
    epochs = progress.epoch + int(progress.epoch_started)
    ended = progress.epoch + int(progress.epoch_ended)
    epoch_progress = {"ready": epochs, "completed": progress.epoch, "started": epochs, "processed": ended}
    return {
        "fit_loop": {
            "state_dict": {"combined_loader": loaders} if loaders else {},
            "epoch_loop.state_dict": {"_batches_that_stepped": progress.log_step},
            "epoch_loop.batch_progress": {
                "total": batches,
                "current": in_epoch,
                "is_last_batch": progress.epoch_is_whole,
            },
            "epoch_loop.scheduler_progress": {
                "total": {"ready": 0, "completed": 0},
                "current": {"ready": 0, "completed": 0},
            },
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {
                    "step": {"total": dict(steps), "current": dict(steps)},
                    "zero_grad": {
                        "total": {**steps, "started": updates},
                        "current": {**steps, "started": updates},
                    },
                }
            },
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": {
                "total": manual_steps,
                "current": dict(manual_steps),
            },
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": empty,
            "epoch_progress": {"total": dict(epoch_progress), "current": dict(epoch_progress)},
        },
        "validate_loop": {"state_dict": {}, "batch_progress": empty},
        "test_loop": {"state_dict": {}, "batch_progress": empty},
        "predict_loop": {"state_dict": {}, "batch_progress": {"total": _tracker(0), "current": _tracker(0)}},
    }


def _tracker(count: int, is_open: int = 0) -> dict[str, int]:
    return {"ready": count, "completed": count - is_open, "started": count, "processed": count}


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def progress_from_lightning(checkpoint: Mapping[str, Any], progress: Progress) -> None:
    """Set ``progress`` from a checkpoint that Lightning wrote.

    Raises:
        CheckpointError: it holds no training state.
    """
    fit = _mapping(_mapping(checkpoint.get("loops")).get("fit_loop"))
    if not fit:
        raise CheckpointError(
            "this checkpoint holds no training state ('loops' is missing), so training cannot resume from it. Load its "
            "weights with load_from_checkpoint and start anew."
        )
    epoch = fit["epoch_progress"]["current"]
    batch = fit["epoch_loop.batch_progress"]
    ended = epoch["processed"] > epoch["completed"]
    progress.epoch = epoch["processed"]
    progress.updates = int(checkpoint.get("global_step", 0))
    progress.total_batches = batch["total"]["processed"]
    whole = ended or batch["is_last_batch"]
    if not whole and batch["current"]["processed"] and epoch["ready"] > epoch["processed"]:
        progress.batch = batch["current"]["processed"]
        progress.epoch_started = True
    elif batch["is_last_batch"] and not ended and epoch["ready"] > epoch["processed"]:
        # Written after the last batch of an epoch, before the epoch was closed: Lightning goes on with the next one.
        progress.epoch = epoch["processed"] + 1
    progress.validated_at = progress.total_batches
    stepped = fit["epoch_loop.state_dict"].get("_batches_that_stepped", progress.updates)
    progress.stepped_batches = stepped + int(progress.total_batches > 0)
