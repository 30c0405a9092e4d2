"""The default process group: joined through one store that lives as long as the process, and left again."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import socket
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

from fulmen_protocols.errors import BackendUnavailable, MisconfigurationException
from fulmen_strategies._gathering import Waiting, gather, may_hold_remains, open_store, uses_agents_store
from fulmen_strategies._interfaces import interface_for_gloo
from fulmen_strategies._meeting import meet
from fulmen_strategies.launchers._other_hosts import OtherHosts
from fulmen_strategies.launchers._rank import report_exit_first

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from fulmen_protocols.topology import Topology

__all__ = ["ProcessGroupMembership"]

# One store per meeting point, kept until the process ends. If each group brought its own, a fast rank that leaves one
# group and joins the next could meet the server of the old one and be cut off when the slow rank 0 closes it.
_stores: dict[tuple[str, int], Store] = {}
_generations = itertools.count()
_other_hosts: OtherHosts | None = None

# Processes start minutes apart where a shared disk is slow. A short limit for collectives is not meant for that.
_MEETING = timedelta(minutes=10)


class ProcessGroupMembership:
    """This process's place in the default process group. One that somebody else made is used and never destroyed."""

    def __init__(self) -> None:
        self._made: dist.ProcessGroup | None = None
        self._meet_others: Callable[[str], None] | None = None
        self._meetings = itertools.count()
        self._hook_before: Callable[[type[BaseException], BaseException, TracebackType | None], object] | None = None
        self._hook_of_torch: object = None

    def join(self, topology: Topology, backend: str | None, timeout: timedelta) -> None:
        """Initialise the default group unless there is one.

        Raises:
            MisconfigurationException: the existing group and ``topology`` contradict each other, or several
                processes are to meet at port 0, or another host has other settings.
            BackendUnavailable: this build of torch lacks the backend.
        """
        if dist.is_initialized():
            _compare(topology)
            return
        device = topology.device
        backend = backend or dist.get_default_backend_for_device(device)
        _require(backend)
        generation = next(_generations)
        patience = max(timeout, _MEETING)
        try:
            store = _common_store(topology, backend, f"fulmen/{_attempt()}/{generation}", timeout, patience)
            hook_before = sys.excepthook
            dist.init_process_group(
                backend,
                store=store,
                rank=topology.rank,
                world_size=topology.world_size,
                timeout=timeout,
                # NCCL then connects at once and to the right device; gloo and other CPU backends refuse the argument.
                device_id=None if device.type == "cpu" else device,
            )
            self._made = dist.group.WORLD
            self._meet_others = lambda name: meet(store, name, topology.rank, topology.world_size, patience)
            self._hook_before, self._hook_of_torch = hook_before, sys.excepthook
            _let_threads_finish_at_exit()
            # A process that ends with a living group may abort in a destructor ("terminate called without an active
            # exception", exit status 134).
            atexit.register(self.leave)
            report_exit_first()
            self.meet()
        except RuntimeError as error:
            error.add_note(
                f"raised while rank {topology.rank} of {topology.world_size} joined the others at "
                f"{topology.main_address}:{topology.main_port} with backend {backend!r}"
            )
            raise

    def meet(self) -> None:
        """Wait until every rank has come here, if this object has made the group.

        Done by ``join``, and to be called when further groups have been made. A rank is through with making one as soon
        as its own connections stand; if it left then, a rank that is late could find a connection closed ("Connection
        closed by peer", "Connection reset by peer") before it has seen it open.
        """
        if self._meet_others is not None:
            self._meet_others(f"fulmen/met/{next(self._meetings)}")

    def leave(self) -> None:
        """Destroy the group if this object has made it. May be called twice."""
        made, self._made = self._made, None
        self._meet_others = None
        if made is None:
            return
        if _other_hosts is not None:
            _other_hosts.leave()
        atexit.unregister(self.leave)
        if dist.is_initialized() and dist.group.WORLD is made:
            dist.destroy_process_group()
        # init_process_group has wrapped sys.excepthook for good: each new group would add one more "[rank0]:".
        if sys.excepthook is self._hook_of_torch and self._hook_before is not None:
            sys.excepthook = self._hook_before


@functools.cache
def _let_threads_finish_at_exit() -> None:
    """Give the GIL away for a moment when the process ends, also after a group that was left long before.

    A thread of gloo drops the tensors of its last piece of work after that work is done, and needs the GIL for it. If
    the interpreter is finalised meanwhile, the thread is ended in the middle of C++ code and the process aborts (seen
    in about 1 of 16 runs). A wrapper that outlives its group keeps the group's threads. There is nothing to wait for.
    """
    atexit.register(time.sleep, 0.1)  # runs after every leave(), which is registered later


def _compare(topology: Topology) -> None:
    found = (dist.get_rank(), dist.get_world_size())
    asked = (topology.rank, topology.world_size)
    if found != asked:
        raise MisconfigurationException(
            f"this run is rank {asked[0]} of {asked[1]}, but the process group that is already initialised has rank "
            f"{found[0]} of {found[1]}: give devices and num_nodes that match it, or destroy it first."
        )


def _require(backend: str) -> None:
    missing = (backend == "nccl" and not dist.is_nccl_available()) or (
        backend == "gloo" and not dist.is_gloo_available()
    )
    if missing:
        raise BackendUnavailable(
            f"process group backend {backend!r} was asked for, but this build of torch comes without it: "
            "install a build that has it, or set process_group_backend."
        )


def _common_store(topology: Topology, backend: str, prefix: str, timeout: timedelta, patience: timedelta) -> Store:
    """What all ranks of this group share; on several hosts, when all have come and know of each other."""
    if topology.num_nodes == 1 or topology.world_size == 1:
        return PrefixStore(prefix, _store(topology, patience))
    with Waiting(topology) as waiting:
        base = _store(topology, patience)
        store = PrefixStore(prefix, base)
        _watch_other_hosts(base, topology, timeout)
        gather(store, topology, patience, waiting=waiting, is_new=not may_hold_remains())
    if "gloo" in backend:
        _lead_gloo(topology)
    return store


def _watch_other_hosts(store: Store, topology: Topology, timeout: timedelta) -> None:
    """From the first group of this process on, over all that follow."""
    global _other_hosts
    if _other_hosts is None:
        # Agents of several nodes may count their starts differently; then their ranks do not hear of each other.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _other_hosts = OtherHosts(PrefixStore(f"fulmen/hosts/{attempt}", store), topology, timeout)
        _other_hosts.begin()
    _other_hosts.join()


def _lead_gloo(topology: Topology) -> None:
    interface = interface_for_gloo(topology.main_address)
    if interface is None:
        return
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    if topology.local_rank == 0:
        host = socket.gethostname()
        print(
            f"GLOO_SOCKET_IFNAME={interface} was set on {host}: the name {host!r} gives no address at which other "
            f"hosts find it, and {interface} leads to {topology.main_address}.",
            file=sys.stderr,
            flush=True,
        )


def _store(topology: Topology, timeout: timedelta) -> Store:
    if topology.world_size == 1:
        return HashStore()
    place = (topology.main_address, topology.main_port)
    if topology.main_port == 0:
        raise MisconfigurationException(
            f"{topology.world_size} processes were asked to meet at {place[0]}:0, which is no port: give main_port."
        )
    if place not in _stores and topology.num_nodes > 1 and not uses_agents_store():
        _stores[place] = open_store(topology, timeout)
    if place not in _stores:
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        iterator = rendezvous(
            f"tcp://{host}:{place[1]}", rank=topology.rank, world_size=topology.world_size, timeout=timeout
        )
        _stores[place] = next(iterator)[0]
    return _stores[place]


def _attempt() -> str:
    """Which start of the processes this is, under torchrun's restarts.

    torchrun keeps one store over all restarts, in which the dead processes' addresses would be found and dialled
    (pytorch/pytorch#135712). Its counter tells the attempts apart; over several nodes it may differ between agents, so
    there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 remains the cure.
    """
    env = os.environ
    one_node = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    return env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
