"""How the ranks of several hosts come together: at one store, with the same settings, and told while they wait."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from torch._C._distributed_c10d import TCPStore

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._marks import STARTER_IS_NO_RANK
from fulmen_strategies._meeting import another_connection, append, meet

if TYPE_CHECKING:
    from datetime import timedelta

    from torch._C._distributed_c10d import Store

    from fulmen_protocols.topology import Topology

__all__ = ["Waiting", "gather", "may_hold_remains", "open_store", "uses_agents_store"]

_NOTICE_S = 30.0
_NAME_S = 60.0  # how long a name may be unknown: that of a container is known a while after it has started
_PROBE_S = 3.0


def uses_agents_store() -> bool:
    """Whether an elastic agent serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def may_hold_remains() -> bool:
    """Whether the store may hold what an earlier start of the processes has left there."""
    starts_once = os.environ.get(STARTER_IS_NO_RANK) == "1" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0"
    return uses_agents_store() and not starts_once


def open_store(topology: Topology, timeout: timedelta) -> Store:
    """The store of all ranks, served by rank 0; it does not wait for them.

    Raises:
        MisconfigurationException: the main address cannot be resolved, or rank 0 finds its port in use.
        RuntimeError: rank 0 could not be reached in time.
    """
    address, port = topology.main_address, topology.main_port
    _wait_for_name(topology)
    try:
        return TCPStore(
            address,
            port,
            None,
            topology.rank == 0,
            timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if topology.rank == 0 and "EADDRINUSE" in str(error):
            raise MisconfigurationException(
                f"rank 0 was to serve the others at port {port} of {address}, which another process of "
                f"{socket.gethostname()} uses: give another MASTER_PORT on every host (fulmen run: --main-port)."
            ) from error
        raise


def _wait_for_name(topology: Topology) -> None:
    began = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(topology.main_address, topology.main_port, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            if time.monotonic() - began > _NAME_S:
                raise MisconfigurationException(
                    f"rank {topology.rank} of {topology.world_size} on {socket.gethostname()} was to meet the others "
                    f"at {topology.main_address!r}, and no address is known for that name ({error}): give the name or "
                    "address of the host of rank 0 in MASTER_ADDR (fulmen run: --main-address)."
                ) from error
            time.sleep(1.0)


def gather(store: Store, topology: Topology, timeout: timedelta, *, waiting: Waiting, is_new: bool) -> None:
    """Return when every rank has come, with the same settings.

    Args:
        store: of this start of the processes alone if ``is_new``.
        topology: this process's place.
        timeout: after which a rank gives up.
        waiting: tells the user whom it waits for.
        is_new: whether nobody can have left anything in the store.

    Raises:
        MisconfigurationException: another host was started with other settings, or another process with this rank.
        RuntimeError: somebody did not come in time.
    """
    host = socket.gethostname()
    if is_new:
        shape = [topology.num_nodes, topology.world_size // topology.num_nodes]
        mine = json.dumps({"host": host, "node": topology.node_rank, "shape": shape})
        first = json.loads(store.compare_set("settings", "", mine))
        if first["shape"] != shape:
            raise MisconfigurationException(
                f"{host} (node {topology.node_rank}) runs with num_nodes={shape[0]} and devices={shape[1]}, but "
                f"{first['host']} (node {first['node']}) with num_nodes={first['shape'][0]} and "
                f"devices={first['shape'][1]}: start the same command on every host."
            )
        other = store.compare_set(f"is/{topology.rank}", "", f"{host}, process {os.getpid()}").decode()
        if other != f"{host}, process {os.getpid()}":
            raise MisconfigurationException(
                f"two processes are rank {topology.rank}: {other}, and {host}, process {os.getpid()}. Give each host "
                "a node rank of its own (NODE_RANK; fulmen run: --node-rank)."
            )
        append(store, "here", f"{topology.rank} ")
        waiting.ask(another_connection(store))
    try:
        meet(store, "fulmen/here", topology.rank, topology.world_size, timeout)
    except RuntimeError as error:
        error.add_note(waiting.sentence())
        raise


class Waiting:
    """While it waits for other hosts, the first rank of a host says every half a minute for whom; a context."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._store: Store | None = None
        self._done = threading.Event()
        self._began = time.monotonic()

    def __enter__(self) -> Waiting:
        if self._topology.local_rank == 0:
            threading.Thread(target=self._tell, name="fulmen-waiting", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def ask(self, store: Store) -> None:
        """From now on this store knows who has come."""
        self._store = store

    def sentence(self) -> str:
        """Who waits, for how long, and for whom or what."""
        place = self._topology
        seconds = time.monotonic() - self._began
        who = f"rank {place.rank} of {place.world_size} on {socket.gethostname()} (node {place.node_rank})"
        return f"{who} has waited for {seconds:.0f} s: {self._why()}"

    def _why(self) -> str:
        place = self._topology
        if self._store is None:
            return f"{place.main_address}:{place.main_port} {_answer(place.main_address, place.main_port)}"
        here = {int(word) for word in self._store.get("here").split()}
        missing = sorted(set(range(place.world_size)) - here)
        text = f"rank {', '.join(map(str, missing))} has not come to {place.main_address}:{place.main_port}"
        if place.rank == 0 and not _is_local(place.main_address):
            text += f", which is no address of this host: its node rank is {place.node_rank}, is that right?"
        return f"{text}." if not text.endswith("?") else text

    def _tell(self) -> None:
        while not self._done.wait(_NOTICE_S):
            try:
                said = self.sentence()
            except RuntimeError:  # the store is gone; the main thread finds that out as well
                return
            print(said, file=sys.stderr, flush=True)


def _answer(address: str, port: int) -> str:
    """What a connection to that place comes to."""
    try:
        socket.create_connection((address, port), timeout=_PROBE_S).close()
    except ConnectionRefusedError:
        return "refuses connections: rank 0 has not begun yet, or its port is another one."
    except TimeoutError:
        return "does not answer: the host is down, the address is wrong, or a firewall is between."
    except OSError as error:
        return f"cannot be reached ({error}): is the address right?"
    return "answers, and some ranks have not come there yet."


def _is_local(address: str) -> bool:
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(target)
    except OSError:
        return False
    return True
