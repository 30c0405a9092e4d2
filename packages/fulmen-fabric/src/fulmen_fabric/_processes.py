"""The processes of a run, as a Fabric shows them: who they are, how they start, what they tell each other."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast, overload

from torch import nn

from fulmen_fabric import _arguments
from fulmen_fabric._communication import all_gather, all_reduce, broadcast
from fulmen_fabric.transfer import mover
from fulmen_fabric.world import World
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Self

    import torch
    from torch import Tensor

    from fulmen_fabric.assembly import Assembly
    from fulmen_protocols import Accelerator, Precision, Strategy

__all__ = ["Processes"]

P = ParamSpec("P")
T = TypeVar("T")


class Processes:
    """What of a Fabric has to do with neither models nor files."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._world = World(assembly)
        self._move: Callable[[object], object] | None = None

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator in use."""
        return self._assembly.accelerator

    @property
    def strategy(self) -> Strategy:
        """The strategy in use."""
        return self._assembly.strategy

    @property
    def precision(self) -> Precision:
        """The precision in use. The state of a gradient scaler is in ``run_state``."""
        return self._assembly.precision

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._world.device

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return self._world.rank

    @property
    def local_rank(self) -> int:
        """Index of this process on its node."""
        return self._world.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self._world.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._world.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self._world.is_global_zero

    # -- starting and ending ------------------------------------------------------------------------------------------

    @overload
    def launch(self) -> None: ...
    @overload
    def launch(self, function: Callable[Concatenate[Self, P], T], *args: P.args, **kwargs: P.kwargs) -> T: ...
    # Any: a function that may be None, or takes what it likes.
    @overload
    def launch(self, function: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | None: ...
    def launch(self, function: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | None:
        """Start the other processes, if nobody has, and join them.

        Runs and returns ``function(fabric, *args, **kwargs)`` in every process; without it the script just goes on.
        Where a command line or a cluster has started the script in every process, they join each other here, too.
        With a strategy that makes new processes for the function (``"ddp_spawn"``, ``"ddp_notebook"``), what rank 0's
        returns is all that comes back.

        Raises:
            TypeError: ``function`` cannot be called, or takes no argument for the Fabric.
            MisconfigurationException: the strategy makes new processes, and there is no function for them.
        """
        if function is None and self._world.runs_apart:
            raise MisconfigurationException(
                f"launch() got no function, and strategy {self._assembly.strategy_name!r} runs one in new processes: "
                "put your loop into a function and pass it, launch(main), or use strategy='ddp' in a script."
            )
        if function is None:
            self._world.launch(_arguments.nothing)
            return None
        _arguments.require_callable(function)
        return self._world.launch(partial(function, self, *args, **kwargs))

    # Any: a subclass's run takes and returns what it likes.
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Override it in a subclass to hold your loop: calling it launches and then runs it in every process."""
        raise NotImplementedError(f"{type(self).__name__} does not define run. Override it, or call launch(function).")

    def _launch_run(self, run: Callable[..., object], *args: object, **kwargs: object) -> object:
        return self._world.launch(partial(run, *args, **kwargs))

    def close(self) -> None:
        """Leave the process group, release the device and finish pending writes."""
        try:
            self._assembly.checkpoint_io.teardown()  # first: ranks that still write talk to each other
        finally:
            self._world.close()

    def _started(self, what: str) -> None:
        """One process needs no launch: it starts at the first call that needs its device."""
        if not self._world.started:
            if self.world_size > 1 and not _arguments.is_under_cli():
                raise RuntimeError(
                    f"fabric.{what}() was called, but the {self.world_size} processes of this run have not been "
                    "launched. Call fabric.launch() first."
                )
            self._world.start()

    # -- between processes --------------------------------------------------------------------------------------------

    def _mover(self) -> Callable[[object], object]:
        if self._move is None:
            self._move = mover(self.device)
        return self._move

    def to_device(self, obj: T) -> T:
        """Move a module in place, or the tensors of nested collections, to this process's device."""
        self._started("to_device")
        if isinstance(obj, nn.Module):
            return obj.to(self.device)
        return cast("T", self._mover()(obj))

    def print(self, *args: object, **kwargs: Any) -> None:
        """``print`` on the first process of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait for every process."""
        self._started("barrier")
        self._world.collectives.barrier(name or "")

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Rank ``src``'s ``obj``, any picklable object. Device tensors arrive on the own device."""
        self._started("broadcast")
        return broadcast(self._world, self._mover(), obj, src)

    # Any: nested collections of numbers and tensors.
    @overload
    def all_gather(self, data: Tensor | float, group: None = None, sync_grads: bool = False) -> Tensor: ...
    @overload
    def all_gather(self, data: Any, group: None = None, sync_grads: bool = False) -> Any: ...
    def all_gather(self, data: Any, group: None = None, sync_grads: bool = False) -> Any:
        """Every rank's tensors, stacked: shape ``(world_size, *shape)``. In one process the data as it is.

        Shapes must be equal on every rank; ``group`` must be None. ``sync_grads``: gradients flow back to each input.
        """
        self._started("all_gather")
        _arguments.require_no_group("all_gather", group)
        return all_gather(self._world, data, sync_grads)

    @overload
    def all_reduce(self, data: Tensor | float, group: None = None, reduce_op: str = "mean") -> Tensor: ...
    @overload
    def all_reduce(self, data: Any, group: None = None, reduce_op: str = "mean") -> Any: ...
    def all_reduce(self, data: Any, group: None = None, reduce_op: str = "mean") -> Any:
        """Tensors combined over ranks by ``"mean"`` (``"avg"``), ``"sum"``, ``"min"`` or ``"max"``, as new tensors.

        Shapes must be equal on every rank; ``group`` must be None.

        Raises:
            MisconfigurationException: an unknown ``reduce_op``.
        """
        self._started("all_reduce")
        _arguments.require_no_group("all_reduce", group)
        return all_reduce(self._world, data, reduce_op)

    def rank_zero_first(self, local: bool = False) -> AbstractContextManager[None]:
        """Run the block on rank 0 (``local``: the first rank of each node) before the others, however long it takes."""
        self._started("rank_zero_first")
        return self._world.rank_zero_first(local)
