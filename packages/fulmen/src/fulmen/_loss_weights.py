"""Losses that are sums with their weights beside them: in checkpoints, and for who wants a mean of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fulmen_protocols import CheckpointError

if TYPE_CHECKING:
    from fulmen._session import Session
    from fulmen.trainer import Trainer

__all__ = ["per_weight", "restore_loss_weights"]


def restore_loss_weights(session: Session, *, window_is_open: bool) -> None:
    """Give every rank the weight of its open window, and the unit in which gradients are counted.

    Raises:
        CheckpointError: the open window's gradients were counted in the other way.
    """
    assert session.resumed is not None
    ranks: list[Any] = session.resumed.get("ranks", [])
    saved = [rank.get("loss_weights") for rank in ranks]
    now = session.loss_weights
    if window_is_open and (now is None) != all(state is None for state in saved):
        before, here = ("mean", "weights") if now is not None else ("weights", "mean")
        raise CheckpointError(
            f"this checkpoint was saved inside an accumulation window with loss_weighting={before!r}, and this Trainer "
            f"has loss_weighting={here!r}: the gradients of one window cannot be counted in two ways. Resume with "
            f"loss_weighting={before!r}, or from a checkpoint that was saved at the end of a window."
        )
    if now is None or not all(saved) or not saved:
        return
    now.load_state_dict({"unit": saved[0]["unit"], "total": _own_total(session, ranks)})


def _own_total(session: Session, ranks: list[Any]) -> Tensor:
    """This rank's part of the saved sum. On another mesh each rank of a data part takes their mean.

    So the sum over ranks, divided by their number, is what it was.
    """
    assert session.resumed is not None
    world = session.world
    totals: list[Tensor] = [rank["loss_weights"]["total"] for rank in ranks]
    if len(ranks) == world.world_size:
        return totals[world.rank]
    if session.resumed["data_parallel_size"] != world.data_parallel_size:  # then no window is open
        return torch.zeros_like(totals[0])
    part = world.data_parallel_rank
    own = [total for index, total in enumerate(totals) if ranks[index].get("data_part", index) == part]
    return torch.stack(own).mean()


def per_weight(trainer: Trainer, outputs: object) -> object:
    """What a training step returned, with a loss per weight where losses are sums; 0 for a batch without weight."""
    if trainer.loss_weighting == "mean" or not isinstance(outputs, Mapping):
        return outputs
    found = cast("Mapping[str, Any]", outputs)
    if "loss" not in found:  # the batch was left out
        return found
    loss, weight = cast("Tensor", found["loss"]), cast("Tensor | float", found["weight"])
    mean = loss / weight.masked_fill(weight == 0, 1) if isinstance(weight, Tensor) else loss / (weight or 1)
    return {**found, "loss": mean}
