"""What an exact resume needs beside Lightning's keys, under ``fulmen`` in a checkpoint: taken, and given back.

Counters; and of each rank its random state, its place in the data, its running metrics, and the gradients of an
accumulation window that a save caught open. Plain data and tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulmen._metric_state import merge_states
from fulmen._window_gradients import own_gradients, sharded_gradients
from fulmen_fabric import collect_rng_state, rank_zero_info, restore_rng_state
from fulmen_protocols import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fulmen._metering import Metering
    from fulmen._session import Session
    from fulmen._train_loader import TrainLoader
    from fulmen.metrics import MetricStore
    from fulmen.progress import Progress
    from fulmen.trainer import Trainer
    from fulmen_fabric.seed import RNGState

__all__ = [
    "CutEpoch",
    "cut_epoch",
    "exact_state",
    "foreign_state",
    "loader_states",
    "require_known_version",
    "restore_position",
    "restore_rng",
]

_VERSION = 1


@dataclass(frozen=True, slots=True)
class CutEpoch:
    """What a rank knew of an epoch when it was left before its end."""

    rng: RNGState
    loader: dict[str, object]
    metrics: dict[str, Any]


def cut_epoch(loader: TrainLoader, metrics: MetricStore, progress: Progress, device: torch.device) -> CutEpoch | None:
    """To be kept of the epoch that ends, if more of it is left: a run that is resumed goes on there.

    What draws at an epoch's end, or in an evaluation after it, would not have drawn had the run gone on.
    """
    if not progress.cut_at:
        return None
    place = loader.state_dict(progress.batch, within_epoch=True)
    return CutEpoch(collect_rng_state(device), place, metrics.state_dict())


def exact_state(trainer: Trainer, session: Session, *, full: bool) -> dict[str, Any]:
    """Counters, and each rank's random state, data position, running metrics and open gradients.

    ``full``: the gradients of sharded parameters are whole, and on rank 0.
    """
    progress = trainer._progress  # pyright: ignore[reportPrivateUsage]
    store = trainer._metering.train if trainer._fitting else None  # pyright: ignore[reportPrivateUsage]
    loader = session.train_loader
    within_epoch = progress.epoch_started and not progress.epoch_ended
    cut = session.cut_epoch if progress.cut_at else None
    is_inside = cut is not None or (within_epoch and progress.batch and not progress.epoch_is_whole)
    if loader is not None and is_inside:
        loader.warn_of_what_is_lost()
    mine: dict[str, Any] = {
        "data_part": trainer.world.data_parallel_rank,
        "rng": session.rng_before_validation or collect_rng_state(trainer.world.device),
        "loader": None if loader is None else loader.state_dict(progress.batch, within_epoch=within_epoch),
        "metrics": None if store is None or progress.epoch_ended else store.state_dict(),
        "gradients": own_gradients(session, progress),
        "loss_weights": None if session.loss_weights is None else session.loss_weights.state_dict(),
    }
    if cut is not None:
        mine.update(rng=cut.rng, loader=cut.loader, metrics=cut.metrics)
    return {
        "version": _VERSION,
        "progress": progress.state_dict() | {"cut_at": progress.cut_at if cut else 0},
        "data_parallel_size": trainer.world.data_parallel_size,
        "ranks": trainer.world.collectives.all_gather_object(mine),
        "gradients": sharded_gradients(session, progress, full=full),
        "callback_metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
    }


def loader_states(session: Session, progress: Progress) -> list[Any]:
    """States of the training loaders that have one, in order, where Lightning keeps them: in the middle of an epoch."""
    loader = session.train_loader
    if loader is None or not progress.epoch_started or progress.epoch_ended:
        return []
    return loader.own_states()


def foreign_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """In place of ``exact_state``, what Lightning's checkpoints know of the place in the data."""
    return {"loaders": checkpoint["loops"]["fit_loop"].get("state_dict", {}).get("combined_loader", [])}


def require_known_version(exact: Mapping[str, Any], path: object) -> None:
    """Refuse a layout of a later fulmen.

    Raises:
        CheckpointError: it is one.
    """
    if exact["version"] != _VERSION:
        raise CheckpointError(
            f"{path} was written with layout {exact['version']}; this fulmen reads {_VERSION}. Update fulmen."
        )


# ---------------------------------------------------------------------- position and random state


def restore_position(session: Session, metering: Metering, progress: Progress) -> None:
    """Data position and running metrics, before the first batch.

    Raises:
        MisconfigurationException: the loader is of another kind than the one that was saved.
    """
    exact, world, loader = session.resumed, session.world, session.train_loader
    assert exact is not None
    assert loader is not None
    if "ranks" not in exact:
        if progress.epoch_started and progress.batch:
            loader.load_own_states(exact["loaders"], progress.epoch, progress.batch)
        return
    metering.reporter.restore(exact["callback_metrics"], world.device)
    ranks, data_ranks = exact["ranks"], exact["data_parallel_size"]
    if len(ranks) != world.world_size:
        rank_zero_info(f"this run was saved by {len(ranks)} processes and goes on with {world.world_size}")
    parts = _by_data_part(exact)
    same = data_ranks == world.data_parallel_size
    position = parts[world.data_parallel_rank if same else 0]["loader"]
    if position is not None:
        batch = loader.load_state_dict(position, saved_ranks=data_ranks)
        if batch is not None:
            progress.batch = batch
    part, step = world.data_parallel_rank, world.data_parallel_size
    states = [rank["metrics"] for rank in ([parts[part]] if same else parts[part::step])]
    known = [state for state in states if state is not None]
    metrics = known[0] if same and known else merge_states(known)
    if metrics is not None:
        metering.train.load_state_dict(metrics, module=session.module)


def restore_rng(session: Session) -> None:
    """Random states, last of all: nothing may draw between this and the first batch.

    On more ranks than saved them the added ones keep what they have, as in a run that starts. On another mesh, ranks
    that read the same data (tensor parallel) go on with one state: dropout must agree on them.
    """
    exact, world = session.resumed, session.world
    session.resumed = None
    if exact is None or "ranks" not in exact:
        return
    ranks, parts = exact["ranks"], _by_data_part(exact)
    if (len(ranks), len(parts)) == (world.world_size, world.data_parallel_size):
        restore_rng_state(ranks[world.rank]["rng"], world.device)
    elif world.data_parallel_rank < len(parts):
        restore_rng_state(parts[world.data_parallel_rank]["rng"], world.device)


def _by_data_part(exact: Mapping[str, Any]) -> list[Any]:
    """What the ranks saved, of each part of the data its first rank."""
    ranks: list[Any] = exact["ranks"]
    parts: dict[int, Any] = {}
    for index, rank in enumerate(ranks):
        parts.setdefault(rank.get("data_part", index), rank)
    return [parts[part] for part in sorted(parts)]
