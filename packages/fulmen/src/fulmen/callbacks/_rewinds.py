"""Rewind: what SpikeRewind has done, in words, as numbers and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fulmen_protocols import FulmenError

if TYPE_CHECKING:
    from fulmen.callbacks._spike_watch import Spike

__all__ = ["Rewind", "TooManyRewindsError", "described", "loaded", "plain", "row_of", "told"]


class TooManyRewindsError(FulmenError, RuntimeError):
    """A run spiked once more than it may go back."""


@dataclass(frozen=True)
class Rewind:
    """One return to earlier weights; the same on every rank."""

    step: int
    """The optimizer step whose value was a spike, counted from 1 as ``trainer.global_step`` is after it."""
    rank: int
    """Where it was seen first."""
    value: float
    """What was seen."""
    threshold: float | None
    """What it was compared with; None where it was not finite."""
    noticed_at: int
    """``trainer.global_step`` when the ranks went back."""
    back_to: int
    """The optimizer step whose weights they went back to."""
    batches: tuple[tuple[int, int], ...]
    """``(epoch, batch_idx)`` of every batch whose training was undone. They are not trained on again."""


def plain(rewind: Rewind) -> dict[str, Any]:
    """For a checkpoint."""
    return {**asdict(rewind), "batches": [list(batch) for batch in rewind.batches]}


def loaded(state: dict[str, Any]) -> Rewind:
    """What ``plain`` was given."""
    batches = tuple((int(epoch), int(index)) for epoch, index in state["batches"])
    given: dict[str, Any] = {**state, "batches": batches}
    return Rewind(**given)


def row_of(rewind: Rewind, count: int) -> dict[str, float]:
    """For loggers; ``count`` is how many returns there were, this one included."""
    row = {
        "rewind/count": float(count),
        "rewind/spike_step": float(rewind.step),
        "rewind/spike_rank": float(rewind.rank),
        "rewind/value": rewind.value,
        "rewind/back_to_step": float(rewind.back_to),
        "rewind/batches_dropped": float(len(rewind.batches)),
    }
    return row if rewind.threshold is None else {**row, "rewind/threshold": rewind.threshold}


def told(rewind: Rewind, own_steps: int) -> str:
    """The return in words; ``own_steps`` are those of the steps before ``back_to`` that were not undone."""
    own = "" if rewind.back_to == own_steps else f" (of which {own_steps} were not undone)"
    return f"All ranks go back to the weights of step {rewind.back_to}{own}: {_listed(rewind.batches)} dropped"


def described(spike: Spike, rank: int) -> str:
    """What was seen, and where."""
    step = spike.place.step
    if spike.threshold is None:
        return f"on rank {rank} {spike.what} was not finite ({spike.value:g}) in step {step}."
    return f"on rank {rank} {spike.what} was {spike.value:.6g} in step {step}, above {spike.threshold:.6g}."


def _listed(batches: tuple[tuple[int, int], ...]) -> str:
    parts = [
        f"{_range([index for _, index in group])} of epoch {epoch}"
        for epoch, group in groupby(batches, key=lambda batch: batch[0])
    ]
    return f"{' and '.join(parts) or 'no batches'} {'is' if len(batches) == 1 else 'are'}"


def _range(indices: list[int]) -> str:
    return f"batch {indices[0]}" if len(indices) == 1 else f"batches {indices[0]} to {indices[-1]}"
