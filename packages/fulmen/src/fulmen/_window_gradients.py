"""Gradients of an accumulation window that a save catches open: into a checkpoint, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen._loss_weights import restore_loss_weights
from fulmen_fabric import rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import CheckpointError, SupportsOpenGradients, SupportsShardedState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fulmen._session import Session
    from fulmen.progress import Progress

__all__ = ["own_gradients", "restore_gradients", "sharded_gradients"]


def own_gradients(session: Session, progress: Progress) -> dict[str, Tensor] | None:
    """This rank's gradients, where a later step needs them and each rank has those of the whole model."""
    if not _window_is_open(session, progress) or supports(session.assembly.strategy, SupportsShardedState):
        return None
    named = session.module.named_parameters()
    return {name: parameter.grad.detach().cpu() for name, parameter in named if parameter.grad is not None}


def sharded_gradients(session: Session, progress: Progress, *, full: bool) -> Mapping[str, Any] | None:
    """Those of a strategy that spreads them over ranks; every rank must call it."""
    strategy = session.assembly.strategy
    if not _window_is_open(session, progress) or not supports(strategy, SupportsShardedState):
        return None
    if not supports(strategy, SupportsOpenGradients):
        rank_zero_warn(
            f"this checkpoint is saved inside an accumulation window, and strategy {session.assembly.strategy_name!r} "
            "cannot save gradients: a resume goes on without the batches of this window so far. Save at the end of a "
            "window."
        )
        return None
    assert session.placed is not None
    return strategy.open_gradients(session.placed, full=full)


def _window_is_open(session: Session, progress: Progress) -> bool:
    manual = session.manual
    return progress.window_is_open if manual is None else manual.gradients_are_open


def restore_gradients(session: Session) -> None:
    """Give every rank the gradients that it had, or its part of those that all had together, and their weights.

    Raises:
        CheckpointError: they do not belong to this number of ranks, to this strategy, or to this weighting of losses.
    """
    assert session.resumed is not None
    ranks: list[Any] = session.resumed.get("ranks", [])
    together: Mapping[str, Any] | None = session.resumed.get("gradients")
    is_spread = together is not None and bool(together["added"] or together["own"] is not None)
    restore_loss_weights(session, window_is_open=is_spread or any(rank["gradients"] for rank in ranks))
    if together is not None and is_spread:
        _restore_sharded(session, together, session.resumed["data_parallel_size"])
    elif any(rank["gradients"] for rank in ranks):
        _restore_own(session, ranks)
    else:
        return
    session.has_open_gradients = not session.module.automatic_optimization


def _restore_sharded(session: Session, together: Mapping[str, Any], saved: int) -> None:
    strategy, now = session.assembly.strategy, session.world.data_parallel_size
    if saved != now:
        raise CheckpointError(
            f"this checkpoint was saved inside an accumulation window by {saved} ranks that each read their part of "
            f"the data; a window of {now} holds other batches. Resume with {saved}, or from a checkpoint that was "
            "saved at the end of a window."
        )
    if supports(strategy, SupportsOpenGradients):
        assert session.placed is not None
        strategy.load_open_gradients(session.placed, together)
    elif together["own"] is not None or supports(strategy, SupportsShardedState):
        raise CheckpointError(
            "this checkpoint was saved inside an accumulation window, by ranks that each hold gradients of their own, "
            f"which strategy {session.assembly.strategy_name!r} cannot take. Resume with the strategy that saved it, "
            "or from a checkpoint that was saved at the end of a window."
        )
    else:
        _give(session, together["added"])


def _restore_own(session: Session, ranks: list[Any]) -> None:
    if supports(session.assembly.strategy, SupportsShardedState):
        raise CheckpointError(
            f"this checkpoint was saved inside an accumulation window by {len(ranks)} processes, each with gradients "
            f"of the whole model, which strategy {session.assembly.strategy_name!r} cannot spread. Resume with the "
            "strategy that saved it, or from a checkpoint that was saved at the end of a window."
        )
    if len(ranks) != session.world.world_size:
        raise CheckpointError(
            f"this checkpoint was saved inside an accumulation window by {len(ranks)} processes, which each hold their "
            f"own gradients; {session.world.world_size} cannot share them. Resume with {len(ranks)}, or from a "
            "checkpoint that was saved at the end of a window."
        )
    _give(session, ranks[session.world.rank]["gradients"])


def _give(session: Session, saved: Mapping[str, Tensor]) -> None:
    for name, parameter in session.module.named_parameters():
        if name in saved:
            parameter.grad = saved[name].to(parameter.device, copy=True)
