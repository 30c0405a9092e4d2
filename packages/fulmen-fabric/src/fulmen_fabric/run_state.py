"""What a loop of one's own needs beside weights and optimizers to go on as if it had never stopped."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, cast

from fulmen_fabric.abilities import supports
from fulmen_fabric.rank_zero import rank_zero_info
from fulmen_fabric.seed import collect_rng_state, restore_rng_state
from fulmen_protocols import CheckpointError, SupportsGradScaling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen_fabric._loaders import LoaderMaker
    from fulmen_fabric.loaders import FabricDataLoader
    from fulmen_fabric.world import World
    from fulmen_protocols import Precision

__all__ = ["RunState"]

_VERSION = 1


class RunState:
    """Counters, every rank's random state and place in the data, and the state of a gradient scaler.

    Save it among your objects, and load it right before the loop: nothing may draw random numbers in between.

        run = fabric.run_state
        state = {"model": model, "optimizer": optimizer, "run": run}
        while run.epoch < 10:
            for batch in loader:  # after a load it goes on with the very next batch
                ...
                run.step += 1
                fabric.save(path, state)
            run.epoch += 1

    - Within an epoch the loaders that ``setup_dataloaders`` made go on where they were; a loader whose epoch has ended,
      because its iterator did or because ``epoch`` has been counted since, begins the next one. So count the epoch
      before you save at its end. Loaders are told apart by the order in which they were set up; those that nobody holds
      any more are not saved, and a loader that is set up after the load takes the next place.
    - On another number of ranks the rest of the epoch is dealt anew: no sample twice, none left out. Added ranks keep
      the random state that they have.
    - Gradients are not in it: save where the next thing to happen is ``zero_grad``, so at the end of an accumulation
      window. Nor are draws inside loader workers; see ``seed_everything(workers="samples")``.
    - Where batches are prefetched and the loader has no workers, a data set that draws random numbers is ahead, too.
    """

    def __init__(self, world: World, precision: Precision, loaders: LoaderMaker) -> None:
        """``loaders`` are those whose places count."""
        self.epoch = 0
        """Epochs that have ended, for you to count."""
        self.step = 0
        """Updates, for you to count."""
        self._world = world
        self._scaler = precision if supports(precision, SupportsGradScaling) else None
        self._loaders = loaders
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._saved_parts = 0
        loaders.on_made = self._welcome

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, as plain data and tensors. Every rank must call it; ``fabric.save`` does."""
        places = [loader.state_dict() for loader in self._loaders.in_use()]
        mine = {"rng": collect_rng_state(self._world.device), "loaders": places}
        return {
            "version": _VERSION,
            "epoch": self.epoch,
            "step": self.step,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "data_parallel_size": self._world.data_parallel_size,
            "ranks": self._world.collectives.all_gather_object(mine),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on there. Every rank must call it.

        Raises:
            CheckpointError: a later version of this package wrote it.
            MisconfigurationException: a loader is of another kind than the one that was saved, or nobody knows what
                another number of ranks left of its epoch.
        """
        if state_dict["version"] != _VERSION:
            raise CheckpointError(
                f"this run state was written with layout {state_dict['version']}; this fulmen-fabric reads {_VERSION}. "
                "Update fulmen-fabric."
            )
        world, ranks = self._world, cast("list[Mapping[str, Any]]", state_dict["ranks"])
        self.epoch, self.step = state_dict["epoch"], state_dict["step"]
        if self._scaler is not None and state_dict["scaler"] is not None:
            self._scaler.load_state_dict(state_dict["scaler"])
        same = len(ranks) == world.world_size
        if not same:
            rank_zero_info(f"this run was saved by {len(ranks)} processes and goes on with {world.world_size}")
        self._saved_parts = state_dict["data_parallel_size"]
        self._waiting = deque(ranks[world.rank if same else 0]["loaders"])
        for loader in self._loaders.in_use():
            self._welcome(loader)
        # Last: making the rest of an epoch must leave no trace in the random state.
        if world.rank < len(ranks):
            restore_rng_state(ranks[world.rank]["rng"], world.device)

    def _welcome(self, loader: FabricDataLoader) -> None:
        """Give a loader its clock, and the place that waits for it, if one does."""
        loader.clock = lambda: self.epoch
        if self._waiting:
            loader.load_state_dict(self._waiting.popleft(), self._saved_parts)
