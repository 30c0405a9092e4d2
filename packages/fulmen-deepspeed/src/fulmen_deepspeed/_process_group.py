"""The default process group: joined, handed to DeepSpeed, and left again with what DeepSpeed remembers of it.

How a group is joined and left stands once more in fulmen-strategies, with other things around it (a launcher's notes on
failures there, a library that keeps groups of its own here); docs/decisions/0025 says why. The keys in the store carry
this package's name: one process may meet the others at one store for both packages in turn.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import itertools
import os
import sys
import time
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

from fulmen_deepspeed._library import submodule
from fulmen_deepspeed.collectives import EngineCollectives
from fulmen_protocols.errors import BackendUnavailable, MisconfigurationException

if TYPE_CHECKING:
    import torch

    from fulmen_protocols.topology import Topology

__all__ = ["ProcessGroup"]

# One store for each meeting point, as long as the process lives: a slow rank may still need it when a fast one leaves.
_stores: dict[tuple[str, int], Store] = {}
_generations = itertools.count()
_MEETING = timedelta(minutes=10)


class ProcessGroup:
    """This process's place in the default group. One that somebody else has made is used and never destroyed.

    Args:
        backend: ``"nccl"``, ``"gloo"``, ...; None: what suits the device.
        timeout: after which a rank gives up waiting for others in a collective.
    """

    def __init__(self, backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        self._backend = backend
        self._timeout = timeout
        self._topology: Topology | None = None
        self._collectives: EngineCollectives | None = None
        self._has_told_local_rank = False
        self._made: object = None
        self._hook: Any = None

    @property
    def device(self) -> torch.device:
        """The device of this process.

        Raises:
            RuntimeError: the group is not joined.
        """
        return self._joined("root_device").device

    @property
    def local_rank(self) -> int:
        """Index of this process on its node.

        Raises:
            RuntimeError: the group is not joined.
        """
        return self._joined("local_rank").local_rank

    @property
    def collectives(self) -> EngineCollectives:
        """Communication among the ranks.

        Raises:
            RuntimeError: the group is not joined.
        """
        self._joined("collectives")
        assert self._collectives is not None
        return self._collectives

    def _joined(self, name: str) -> Topology:
        if self._topology is None:
            raise RuntimeError(
                f"{name} of DeepSpeedStrategy is unknown until setup_environment has run: call it first."
            )
        return self._topology

    def join(self, topology: Topology) -> None:
        """Make the default group unless there is one, and let DeepSpeed use it.

        Raises:
            MisconfigurationException: the existing group has another rank or size, or there is no port to meet at.
            BackendUnavailable: this build of torch lacks the backend.
        """
        device = topology.device
        backend = self._backend or ("gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device))
        if not dist.is_initialized():
            self._make(topology, backend)
        elif (found := (dist.get_rank(), dist.get_world_size())) != (topology.rank, topology.world_size):
            raise MisconfigurationException(
                f"this run is rank {topology.rank} of {topology.world_size}, but the process group that is there "
                f"already has rank {found[0]} of {found[1]}. Give devices and num_nodes that match it, or destroy it."
            )
        # DeepSpeed reads some of its whereabouts from the environment, also while it trains.
        if "LOCAL_RANK" not in os.environ:
            os.environ["LOCAL_RANK"] = str(topology.local_rank)
            self._has_told_local_rank = True
        # On a CPU it builds an operator the first time, and prints so every time.
        with contextlib.redirect_stdout(io.StringIO()):
            submodule("deepspeed.comm").init_distributed(
                backend, auto_mpi_discovery=False, timeout=self._timeout, verbose=False
            )
        self._topology = topology
        self._collectives = EngineCollectives(device)

    def _make(self, topology: Topology, backend: str) -> None:
        if (backend == "nccl" and not dist.is_nccl_available()) or (backend == "gloo" and not dist.is_gloo_available()):
            raise BackendUnavailable(
                f"process group backend {backend!r} was asked for, but this build of torch comes without it. Install a "
                "build that has it, or set process_group_backend."
            )
        generation, attempt = next(_generations), _attempt()
        hook = sys.excepthook
        dist.init_process_group(
            backend,
            store=PrefixStore(
                f"fulmen_deepspeed/{attempt}/{generation}", _store(topology, max(self._timeout, _MEETING))
            ),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=self._timeout,
            device_id=None if topology.device.type == "cpu" else topology.device,
        )
        self._made, self._hook = dist.group.WORLD, (hook, sys.excepthook)
        _let_threads_finish_at_exit()
        atexit.register(self.leave)  # a process that ends with a living group may abort

    def leave(self) -> None:
        """Destroy the group if this object has made it, and let DeepSpeed forget it. May be called twice."""
        self._topology = self._collectives = None
        if self._has_told_local_rank:  # alone in the environment it would tell the next run of a launcher
            self._has_told_local_rank = False
            os.environ.pop("LOCAL_RANK", None)
        made, self._made = self._made, None
        if made is None:
            return
        atexit.unregister(self.leave)
        if dist.is_initialized() and dist.group.WORLD is made:
            _forget()
            dist.destroy_process_group()
        before, wrapped = self._hook
        if sys.excepthook is wrapped:  # torch has put its own around it, for good
            sys.excepthook = before


@cache
def _let_threads_finish_at_exit() -> None:
    # A thread of gloo needs the GIL once more after its last work; without it the process may abort at its end.
    atexit.register(time.sleep, 0.1)


def _forget() -> None:
    """Clear what DeepSpeed keeps of the group in its modules, so that the next run finds nothing of this one."""
    groups = submodule("deepspeed.utils.groups")
    known = cast("dict[str, object]", vars(groups))
    for name, value in list(known.items()):
        if not name.startswith("_") or not name.endswith(("_GROUP", "_GROUPS", "_RANKS")):
            continue
        if isinstance(value, dict):
            cast("dict[object, object]", value).clear()
        elif value is not None:
            setattr(groups, name, None)
    submodule("deepspeed.comm.comm").cdb = None


def _store(topology: Topology, timeout: timedelta) -> Store:
    if topology.world_size == 1:
        return HashStore()
    place = (topology.main_address, topology.main_port)
    if topology.main_port == 0:
        raise MisconfigurationException(
            f"{topology.world_size} processes were to meet at {place[0]}:0, which is no port. Give main_port."
        )
    if place not in _stores:
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        meeting = rendezvous(
            f"tcp://{host}:{place[1]}", rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )
        _stores[place] = next(meeting)[0]
    return _stores[place]


def _attempt() -> str:
    """Which start under torchrun this is: its store outlives the processes, and would give away dead addresses."""
    env = os.environ
    one_node = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    return env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
