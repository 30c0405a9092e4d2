"""What a prediction leaves behind while it runs: outputs, and which samples each batch held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from fulmen_data import track_batch_indices
from fulmen_fabric import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fulmen_data import IndexBatchSamplerWrapper

    Trackers = Sequence[IndexBatchSamplerWrapper | None]

__all__ = ["PredictionRecord", "tracked"]


def tracked(loaders: Sequence[Any]) -> tuple[list[Any], list[IndexBatchSamplerWrapper | None]]:
    """Loaders like ``loaders``, and for each who knows its batches' indices; None, with a warning, where none does."""
    made: list[Any] = []
    trackers: list[IndexBatchSamplerWrapper | None] = []
    for index, given in enumerate(loaders):
        loader, tracker, why = _tracked(given)
        if tracker is None:
            kind = type(given).__name__
            rank_zero_warn(f"prediction writers get no indices of the samples of loader {index} ({kind}): {why}.")
        made.append(loader)
        trackers.append(tracker)
    return made, trackers


def _tracked(loader: Any) -> tuple[Any, IndexBatchSamplerWrapper | None, str]:
    why = "it is no DataLoader with a batch sampler and a map-style data set"
    if not issubclass(type(loader), DataLoader):
        return loader, None, why
    try:
        return (*track_batch_indices(loader), why)
    except TypeError as error:  # its class cannot be made again
        return loader, None, str(error)


class PredictionRecord:
    """``trainer.predict_loop``: what prediction writers read. The names are Lightning's.

    Args:
        num_dataloaders: how many loaders there are.
        trackers: for each loader, who knows the indices; empty where nobody asked for them.
        returns: whether ``trainer.predict`` returns the outputs.
    """

    def __init__(self, num_dataloaders: int, trackers: Trackers, *, returns: bool) -> None:
        self.num_dataloaders = num_dataloaders
        self.return_predictions = returns
        self.current_batch_indices: list[int] | None = None
        """Positions in the data set of the running batch's samples; None where they are unknown."""
        self.epoch_batch_indices: list[list[list[int]]] = [[] for _ in range(num_dataloaders)]
        """By loader, batch and sample; of this rank."""
        self._trackers = trackers
        self.kept: list[list[object]] = [[] for _ in range(num_dataloaders)]
        """Outputs by loader and batch; the loop fills it."""

    @property
    def predictions(self) -> list[Any]:
        """Outputs by batch; with several loaders by loader, then by batch."""
        return self.kept[0] if len(self.kept) == 1 else self.kept

    def begin_batch(self, batch: object, batch_idx: int, dataloader_idx: int) -> None:
        """Note which samples the batch holds, before the hooks at its start."""
        tracker = self._trackers[dataloader_idx]
        self.current_batch_indices = None if tracker is None else tracker.seen_batch_indices[batch_idx]
        if self.current_batch_indices is not None:
            self.epoch_batch_indices[dataloader_idx].append(self.current_batch_indices)

    def release(self) -> None:
        """Let go of what only hooks at the epoch's end need."""
        self.epoch_batch_indices = []
        if not self.return_predictions:
            self.kept = []
