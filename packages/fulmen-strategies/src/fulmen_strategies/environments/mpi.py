"""The environment of a process that mpirun, mpiexec or a scheduler's own MPI starter has started."""

from __future__ import annotations

import os
import socket
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from fulmen_protocols.errors import MissingPackage
from fulmen_strategies.environments._table import number, port, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MPIEnvironment"]

# Open MPI, MPICH and Intel MPI, MVAPICH2, PMIx. They say that a starter was used, without starting MPI in this process.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PMIX_SIZE")


class _Place(NamedTuple):
    """Where a process stands among those of MPI's world."""

    world_size: int
    rank: int
    local_rank: int
    local_size: int
    node_rank: int
    num_nodes: int
    address: str
    port: int


class MPIEnvironment:
    """Asks MPI itself, through mpi4py: ranks of COMM_WORLD, nodes in the order of their lowest rank.

    The processes meet at rank 0's host, at a port that is free there, or at its MASTER_ADDR and MASTER_PORT. They learn
    all this from each other in one exchange, at the first question: every process must come to it.

    Raises:
        MissingPackage: mpi4py is not installed.
    """

    def __init__(self) -> None:
        if find_spec("mpi4py") is None:
            raise MissingPackage("MPIEnvironment needs mpi4py: pip install mpi4py.")

    @property
    def creates_processes_externally(self) -> bool:
        """True: mpirun does."""
        return True

    @property
    def main_address(self) -> str:
        """MASTER_ADDR of rank 0, else its host; 127.0.0.1 where all processes share one."""
        return _place().address

    @property
    def main_port(self) -> int:
        """MASTER_PORT of rank 0, else a port that was free there."""
        return _place().port

    @staticmethod
    def detect() -> bool:
        """Whether MPI has started this process together with others. Without a starter, MPI is not touched."""
        size = started_size(os.environ)
        if size > 1 and find_spec("mpi4py") is None:
            warnings.warn(
                f"MPI has started {size} processes, but mpi4py is not installed: each of them is a run of its own. To "
                "make one run of them: pip install mpi4py.",
                stacklevel=2,
            )
            return False
        return size > 1 and _place().world_size > 1

    def world_size(self) -> int:
        """The size of COMM_WORLD."""
        return _place().world_size

    def global_rank(self) -> int:
        """The rank in COMM_WORLD."""
        return _place().rank

    def local_rank(self) -> int:
        """The place among the processes of this host."""
        return _place().local_rank

    def node_rank(self) -> int:
        """The place of this host among those of the run."""
        return _place().node_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the user's settings with what MPI has started.

        Raises:
            MisconfigurationException: they contradict each other; the message has all contradictions.
        """
        refuse(_contradictions(_place(), num_devices, num_nodes))


def started_size(env: Mapping[str, str]) -> int:
    """How many processes an MPI starter says that it has started; 1 where there was none."""
    return number(env, *_SIZES, default=1)


def _contradictions(place: _Place, num_devices: int, num_nodes: int) -> list[str]:
    wrong: list[str] = []
    if place.local_size != num_devices:
        wrong.append(
            f"devices={num_devices}, but MPI has started {place.local_size} processes on this host: set "
            f"devices={place.local_size}, or start {num_devices} on each (Open MPI: --map-by ppr:{num_devices}:node)."
        )
    if place.num_nodes != num_nodes:
        wrong.append(
            f"num_nodes={num_nodes}, but MPI's processes are on {place.num_nodes} host(s): set "
            f"num_nodes={place.num_nodes}, or give mpirun {num_nodes} hosts."
        )
    asked = num_devices * num_nodes
    if place.world_size != asked:
        wrong.append(
            f"devices={num_devices} and num_nodes={num_nodes} make {asked} processes, but MPI has started "
            f"{place.world_size}: make them agree, with mpirun -n {asked} say."
        )
    return wrong


@cache
def _place() -> _Place:
    """Ask the other processes; once."""
    world: Any = import_module("mpi4py.MPI").COMM_WORLD  # starts MPI
    own = (socket.gethostname(), os.environ.get("MASTER_ADDR"), _own_port(world.Get_rank()))
    told: list[tuple[str, str | None, int]] = world.allgather(own)
    return _from(told, world.Get_rank())


def _from(told: list[tuple[str, str | None, int]], rank: int) -> _Place:
    """The place of ``rank``, from what every process has told: its host, its MASTER_ADDR and a port; pure."""
    hosts = [host for host, _, _ in told]
    order = list(dict.fromkeys(hosts))
    local = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    address = told[0][1] or ("127.0.0.1" if len(order) == 1 else hosts[0])
    return _Place(
        len(told), rank, local.index(rank), len(local), order.index(hosts[rank]), len(order), address, told[0][2]
    )


def _own_port(rank: int) -> int:
    if rank != 0:
        return 0
    if "MASTER_PORT" in os.environ:
        return port(os.environ, "MASTER_PORT", default=0)
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
