"""The default process group: joined, handed to DeepSpeed, and left again with what DeepSpeed remembers of it."""

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
from fulmen_protocols.errors import BackendUnavailable, MisconfigurationException

if TYPE_CHECKING:
    from fulmen_protocols.topology import Topology

__all__ = ["ProcessGroup"]

# One store for each meeting point, as long as the process lives: a slow rank may still need it when a fast one leaves.
_stores: dict[tuple[str, int], Store] = {}
_generations = itertools.count()
_MEETING = timedelta(minutes=10)


class ProcessGroup:
    """This process's place in the default group. One that somebody else has made is used and never destroyed."""

    def __init__(self) -> None:
        self._made: object = None
        self._hook: Any = None

    def join(self, topology: Topology, backend: str | None, timeout: timedelta) -> None:
        """Make the default group unless there is one, and let DeepSpeed use it.

        Raises:
            MisconfigurationException: the existing group has another rank or size, or there is no port to meet at.
            BackendUnavailable: this build of torch lacks the backend.
        """
        device = topology.device
        chosen = backend or ("gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device))
        if not dist.is_initialized():
            self._make(topology, chosen, timeout)
        elif (found := (dist.get_rank(), dist.get_world_size())) != (topology.rank, topology.world_size):
            raise MisconfigurationException(
                f"this run is rank {topology.rank} of {topology.world_size}, but the process group that is there "
                f"already has rank {found[0]} of {found[1]}. Give devices and num_nodes that match it, or destroy it."
            )
        # DeepSpeed reads some of its whereabouts from the environment.
        os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))
        # On a CPU it builds an operator the first time, and prints so every time.
        with contextlib.redirect_stdout(io.StringIO()):
            submodule("deepspeed.comm").init_distributed(
                chosen, auto_mpi_discovery=False, timeout=timeout, verbose=False
            )

    def _make(self, topology: Topology, backend: str, timeout: timedelta) -> None:
        if (backend == "nccl" and not dist.is_nccl_available()) or (backend == "gloo" and not dist.is_gloo_available()):
            raise BackendUnavailable(
                f"process group backend {backend!r} was asked for, but this build of torch comes without it. Install a "
                "build that has it, or set process_group_backend."
            )
        generation, attempt = next(_generations), _attempt()
        hook = sys.excepthook
        dist.init_process_group(
            backend,
            store=PrefixStore(f"fulmen/{attempt}/{generation}", _store(topology, max(timeout, _MEETING))),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timeout,
            device_id=None if topology.device.type == "cpu" else topology.device,
        )
        self._made, self._hook = dist.group.WORLD, (hook, sys.excepthook)
        _let_threads_finish_at_exit()
        atexit.register(self.leave)  # a process that ends with a living group may abort

    def leave(self) -> None:
        """Destroy the group if this object has made it, and let DeepSpeed forget it. May be called twice."""
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
    known: dict[str, Any] = dict(vars(groups))
    for name, value in known.items():
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
