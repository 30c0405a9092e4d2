"""Where this process stands among those of the run, as a Trainer and its ``strategy`` show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen_fabric import World

__all__ = ["RankSurface"]


class RankSurface:
    """Properties over a ``World``, under Lightning's names."""

    _world: World

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self._world.world_size

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return self._world.rank

    @property
    def local_rank(self) -> int:
        """Index of this process among those of its node."""
        return self._world.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self._world.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes files and logs."""
        return self._world.is_global_zero
