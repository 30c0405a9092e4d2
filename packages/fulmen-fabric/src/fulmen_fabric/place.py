"""A loader's place in its data: what a checkpoint holds of it, and how to go on, on any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from fulmen_data import LoaderPosition, needs_elastic_loader
from fulmen_fabric.rank_zero import PossibleUserWarning, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

__all__ = ["LoaderPlace", "RestOfEpoch"]


class RestOfEpoch(Protocol):
    """Splits what is left of an epoch that another number of ranks began."""

    def __call__(self, position: Mapping[str, object], saved_ranks: int) -> tuple[object, dict[str, object]]:
        """The loader for the rest, and the position in it.

        Raises:
            MisconfigurationException: nobody knows what is left.
        """
        ...


class LoaderPlace:
    """Where a loader is: within an epoch, or between two.

    Args:
        loader: this rank's part of the data, or a combination of several.
        ranks: into how many parts the data are split.
        rest_of_epoch: asked where the epoch was begun by another number of ranks.
    """

    def __init__(self, loader: Iterable[object], ranks: int, rest_of_epoch: RestOfEpoch) -> None:
        self.loader = loader
        self.ranks = ranks
        self._rest_of_epoch = rest_of_epoch
        self._whole = LoaderPosition(loader)
        self._rest: LoaderPosition[object] | None = None
        self._warned: set[str] = set()

    @property
    def position(self) -> LoaderPosition[object]:
        """The position to iterate: the loader's, or that of the rest of an epoch begun by another number of ranks."""
        return self._whole if self._rest is None else self._rest

    @property
    def reads_ahead(self) -> bool:
        """Whether somebody takes batches before the ones in hand are used. Set it before iterating."""
        return self._whole.reads_ahead

    @reads_ahead.setter
    def reads_ahead(self, value: bool) -> None:
        self._whole.reads_ahead = value

    def end_epoch(self) -> None:
        """The next epoch takes the whole loader again."""
        self._rest = None

    def restart(self) -> None:
        """Forget the position and let go of the running iterator, and so of its workers."""
        self.position.restart()
        self._rest = None

    def close(self) -> None:
        """The same, and end the worker processes that loaders keep between epochs too."""
        self.position.close()
        if self._rest is not None:
            self._rest = None
            self._whole.close()

    def state_dict(self, batches: int | None, *, within_epoch: bool) -> dict[str, object]:
        """The place as numbers, lists and tensors.

        Args:
            batches: how many of the running epoch were really used, where somebody reads ahead; None: all handed out.
            within_epoch: False between two epochs.
        """
        return {
            "position": self.position.state_dict(batches) if within_epoch else None,
            "generators": self._whole.generator_states(),
            "order": self._whole.order,
        }

    def load_state_dict(
        self, state: Mapping[str, object], *, saved_ranks: int
    ) -> tuple[object, dict[str, object]] | None:
        """Learn what ``state_dict`` of this rank said, or of any rank where ``saved_ranks`` is another number than now.

        Returns:
            Within an epoch the loader of what is left of it, and the position to load into ``position``; else None.

        Raises:
            MisconfigurationException: nobody knows what is left of the epoch.
        """
        position = cast("dict[str, object] | None", state["position"])
        if position is None:
            self._whole.set_generator_states(cast("Mapping[str, torch.Tensor]", state["generators"]))
            self._whole.set_order(cast("Mapping[str, object] | None", state["order"]))
            return None
        loader: object = self.loader
        elastic = needs_elastic_loader(loader, position, saved_ranks=saved_ranks, ranks=self.ranks)
        if elastic and self._whole.lost is None:
            loader, position = self._rest_of_epoch(position, saved_ranks)
            replayed = position if "replayed" in cast("Mapping[str, object]", position["order"] or {}) else None
            self._rest = LoaderPosition(cast("Iterable[object]", loader), replayed=replayed)
        return loader, position

    @property
    def begins_again(self) -> bool:
        """Whether there are data that a resumed epoch reads from their beginning."""
        return any(position.lost is not None for position in self.position.parts())

    def warn_of_what_is_lost(self) -> None:
        """Name, once each, the data whose place a checkpoint in the middle of an epoch cannot hold."""
        for position in self.position.parts():
            lost, draws = position.lost, position.draws
            if lost is not None and lost not in self._warned:
                self._warned.add(lost)
                rank_zero_warn(
                    f"this checkpoint is saved in the middle of an epoch, and its place in {lost} is not in it: "
                    f"resumed from it, the epoch goes on with {lost} read from its beginning. Give it state_dict and "
                    "load_state_dict, or wrap the loader in fulmen_data.FastForward to have the batches before read "
                    "again and dropped.",
                    category=PossibleUserWarning,
                )
            if draws is not None and draws not in self._warned:
                self._warned.add(draws)
                rank_zero_warn(
                    f"{draws} draws random numbers in loader workers, whose random state is not in checkpoints: "
                    "resumed in the middle of an epoch, a run draws other ones. Use seed_everything(..., "
                    f"workers='samples'), or fulmen_data.SeededDataset({draws}): then they depend on epoch and sample "
                    "alone.",
                    category=PossibleUserWarning,
                )
