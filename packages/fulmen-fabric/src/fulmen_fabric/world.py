"""The processes and groups of a run: they live from the first call to the last (fit, test, fit again)."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from fulmen_fabric.abilities import supports
from fulmen_fabric.rank_zero import rank_zero_only
from fulmen_fabric.seed import collect_rng_state, reset_seed, restore_rng_state
from fulmen_fabric.stopping import StopAgreement
from fulmen_fabric.voting import HostVote, group_store, group_timeout, new_name
from fulmen_protocols import (
    LaunchesApart,
    SupportsCollectives,
    SupportsDataParallel,
    SupportsDeviceMesh,
    SupportsLaunch,
    SupportsPatientBarrier,
    Topology,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fulmen_fabric.assembly import Assembly
    from fulmen_protocols import Collectives, ReduceOp

__all__ = ["LocalCollectives", "World"]

T = TypeVar("T")


class LocalCollectives:
    """``Collectives`` of a run of one process."""

    rank = 0
    world_size = 1

    def barrier(self, name: str = "") -> None:
        """Nobody to wait for."""

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """``tensor`` itself."""
        return tensor

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """``value`` itself."""
        return value

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        """A copy: like every implementation, the result shares no memory with the input."""
        return tensor.clone()

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        """Shape ``(1, *tensor.shape)``, as for any world; ``Fabric.all_gather`` drops the dimension again."""
        return (tensor if differentiable else tensor.detach()).unsqueeze(0)

    def all_gather_object(self, value: T) -> list[T]:
        """``[value]``."""
        return [value]


class World:
    """Starts the processes of an ``Assembly`` once, joins them, and keeps them for later calls."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._topology: Topology | None = None
        self._collectives: Collectives | None = None
        self._started_in: int | None = None
        self._data_parts: tuple[int, ...] | None = None

    def launch(self, function: Callable[[], T]) -> T:
        """Run ``function`` in every process of the run and return this process's (or rank 0's) value.

        Other processes of this node are started first, if nobody has done so. A later call finds them alive.

        Raises:
            RankFailure: another process ended with an error.
        """
        assembly = self._assembly
        if assembly.launcher is None:
            self.start()
            return function()

        return assembly.launcher.launch(
            partial(self._enter, function),  # a launcher may have to pickle it
            num_processes=len(assembly.devices),
            num_nodes=assembly.num_nodes,
            node_rank=assembly.environment.node_rank(),
            main_address=assembly.environment.main_address,
            main_port=assembly.environment.main_port,
        )

    def _enter(self, function: Callable[[], T]) -> T:
        self.start()
        return function()

    def start(self) -> None:
        """Make this process's device current and join the others. In a process that has started, does nothing.

        Raises:
            ValueError: the environment gives this process a local rank for which there is no device.
        """
        # A forked child inherits the flag of its parent, but not the parent's group.
        if self._started_in == os.getpid():
            return
        assembly = self._assembly
        self._topology = topology = self._read_topology()
        if topology.world_size > 1:
            rank_zero_only.rank = topology.rank
            reset_seed()
        assembly.accelerator.setup_device(topology.device)
        assembly.strategy.setup_environment(topology)
        self._collectives = (
            assembly.strategy.collectives
            if topology.world_size > 1 and supports(assembly.strategy, SupportsCollectives)
            else LocalCollectives()
        )
        self._data_parts = self._find_data_parts()
        self._started_in = os.getpid()

    def close(self) -> None:
        """Leave the group and release the device. Calling it twice is allowed; ``start`` may follow."""
        if self._started_in != os.getpid():
            return
        self._started_in = None
        self._topology = None
        self._collectives = None
        self._data_parts = None
        try:
            self._assembly.strategy.teardown()
        finally:
            self._assembly.accelerator.teardown()

    @property
    def runs_apart(self) -> bool:
        """Whether ``launch`` would run its function in other processes than this one, and bring its value back."""
        launcher: object = self._assembly.launcher
        return supports(launcher, LaunchesApart) and not self._assembly.environment.creates_processes_externally

    @property
    def started(self) -> bool:
        """Whether ``start`` has run in this process and ``close`` has not."""
        return self._started_in == os.getpid()

    @property
    def topology(self) -> Topology:
        """Where this process stands. Before ``start`` what the environment says so far."""
        return self._topology if self._topology is not None else self._read_topology()

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._assembly.strategy.root_device if self.started else self.topology.device

    @property
    def rank(self) -> int:
        """Index among all processes."""
        return self.topology.rank

    @property
    def local_rank(self) -> int:
        """Index among the processes of this node."""
        return self.topology.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self.topology.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes of the run."""
        return self._assembly.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    @property
    def collectives(self) -> Collectives:
        """The strategy's, or ``LocalCollectives`` in a run of one process.

        Raises:
            RuntimeError: the processes have not met yet.
        """
        if self._collectives is not None:
            return self._collectives
        if self.world_size == 1 or self.runs_apart:  # the process that launches others is no rank, and alone
            return LocalCollectives()
        raise RuntimeError(
            f"the {self.world_size} processes of this run have not met yet. Call launch() before communicating."
        )

    @property
    def data_parallel_rank(self) -> int:
        """Index of this process's part of the data."""
        strategy = self._assembly.strategy
        return strategy.data_parallel_rank if supports(strategy, SupportsDataParallel) else self.rank

    @property
    def data_parallel_size(self) -> int:
        """Number of parts into which the data is split."""
        strategy = self._assembly.strategy
        return strategy.data_parallel_size if supports(strategy, SupportsDataParallel) else self.world_size

    @property
    def data_parts(self) -> tuple[int, ...] | None:
        """Index of each rank's part of the data, by rank; None where every rank reads a part of its own."""
        return self._data_parts

    @property
    def device_mesh(self) -> DeviceMesh | None:
        """All processes along named dimensions, where the strategy arranges them so; None before ``start``."""
        strategy = self._assembly.strategy
        return strategy.device_mesh if self.started and supports(strategy, SupportsDeviceMesh) else None

    @property
    def data_parallel_group(self) -> ProcessGroup | None:
        """The ranks among which the data are split, where those are not all."""
        mesh = self.device_mesh
        return None if self._data_parts is None or mesh is None else mesh["data_parallel"].get_group()

    def _find_data_parts(self) -> tuple[int, ...] | None:
        """Of a run that has just started: who reads what. Ranks that read the same must also draw the same."""
        strategy, collectives = self._assembly.strategy, self._collectives
        if collectives is None or not supports(strategy, SupportsDataParallel):
            return None
        if strategy.data_parallel_size == collectives.world_size:
            return None
        # Dropout, shuffling and augmentation must agree on the ranks of one model. With a seed they do already.
        state = cast("Mapping[str, object]", collect_rng_state(strategy.root_device))
        restore_rng_state(collectives.broadcast_object(state), strategy.root_device)
        return tuple(collectives.all_gather_object(strategy.data_parallel_rank))

    def stop_agreement(self) -> StopAgreement:
        """A new agreement on where to stop; every rank makes its own at the same place of the program.

        Without a torch process group (an engine with one of its own) ranks have no store to agree through: then each
        rank must be told to stop, by a signal to all of them.
        """
        store = group_store()
        return StopAgreement(
            store,
            self.rank,
            self.world_size if store is not None else 1,
            name=new_name("stop"),
        )

    def host_vote(self) -> HostVote | None:
        """A new vote among all ranks' hosts; every rank makes its own at the same place of the program.

        None for one rank, which has nobody to ask, and without a torch process group.
        """
        store = group_store() if self.world_size > 1 else None
        if store is None:
            return None
        return HostVote(store, self.world_size, name=new_name("vote"), timeout=group_timeout(self.device))

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Generator[None, None, None]:
        """Run the block on rank 0 (``local``: on the first rank of each node) before the others, however long it takes.

        Every rank enters it. When the block fails on the rank that goes first, the others never get to run it: they
        end as they do whenever a rank fails.
        """
        if self.world_size == 1:
            yield
            return
        collectives = self.collectives
        wait = (
            collectives.patient_barrier if supports(collectives, SupportsPatientBarrier) else self.collectives.barrier
        )
        first = (self.local_rank if local else self.rank) == 0
        if not first:
            wait("rank_zero_first")
        yield
        if first:
            wait("rank_zero_first")

    def _read_topology(self) -> Topology:
        assembly = self._assembly
        environment = assembly.environment
        if assembly.world_size == 1:
            # Other processes of the environment, if any, are runs of their own.
            meets = supports(assembly.strategy, SupportsLaunch)
            return Topology(assembly.devices, main_port=environment.main_port if meets else 0)
        local_rank, node_rank = environment.local_rank(), environment.node_rank()
        if local_rank >= len(assembly.devices):
            raise ValueError(
                f"{type(environment).__name__} gives this process local rank {local_rank}, but there are only "
                f"{len(assembly.devices)} devices on a node. Ask for as many devices as processes."
            )
        return Topology(
            devices=assembly.devices,
            # Before the launcher has run, this process has no rank yet; it will be the first of its node.
            rank=environment.global_rank()
            if assembly.launcher is None
            else node_rank * len(assembly.devices) + local_rank,
            local_rank=local_rank,
            node_rank=node_rank,
            world_size=assembly.world_size,
            num_nodes=assembly.num_nodes,
            main_address=environment.main_address,
            main_port=environment.main_port,
        )
