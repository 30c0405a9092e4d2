"""The pure part of every environment: variables in, a place among the processes out, by one table.

Nonsense and contradictions are refused with the variable's name, both values and what to do, all of them at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._marks import LAUNCHED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TABLE", "Row", "attempt", "contradictions", "is_launched", "number", "port", "refuse"]


class Row(NamedTuple):
    """The variables by which one starter tells its processes where they stand; of several the first that is set."""

    starter: str
    """How messages call it."""
    world_size: tuple[str, ...]
    rank: tuple[str, ...]
    local_rank: tuple[str, ...]
    node_rank: tuple[str, ...]
    address: tuple[str, ...] = ("MASTER_ADDR",)
    port: tuple[str, ...] = ("MASTER_PORT",)
    local_size: tuple[str, ...] = ()
    """Number of processes on this node; most starters do not say."""
    num_nodes: tuple[str, ...] = ()
    set_local_size: str = ""
    """How the user asks the starter for another number of processes on each node."""
    set_num_nodes: str = ""


TABLE = {
    "torchrun": Row(
        "torchrun", ("WORLD_SIZE",), ("RANK",), ("LOCAL_RANK",), ("GROUP_RANK",),
        local_size=("LOCAL_WORLD_SIZE",), num_nodes=("GROUP_WORLD_SIZE",),
        set_local_size="start it with --nproc-per-node {}", set_num_nodes="start it with --nnodes {}",
    ),
    "slurm": Row(
        "SLURM", ("SLURM_NTASKS",), ("SLURM_PROCID",), ("SLURM_LOCALID",), ("SLURM_NODEID",),
        ("MASTER_ADDR", "SLURM_NODELIST"), ("MASTER_PORT", "SLURM_JOB_ID"),
        ("SLURM_NTASKS_PER_NODE",), ("SLURM_NNODES",), "--ntasks-per-node={}", "--nodes={}",
    ),
    "lsf": Row(
        "jsrun", ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_LOCAL_RANK",), (),
        ("LSB_DJOB_RANKFILE",), ("MASTER_PORT", "LSB_JOBID"), ("JSM_NAMESPACE_LOCAL_SIZE",),
        set_local_size="start {} tasks on each host",
    ),
    "kubeflow": Row("Kubeflow", ("WORLD_SIZE",), ("RANK",), (), ("RANK",), num_nodes=("WORLD_SIZE",),
        set_num_nodes="give the job {} replicas"),
    "local": Row(
        "the environment", ("WORLD_SIZE",), ("RANK",), ("LOCAL_RANK",), ("NODE_RANK", "GROUP_RANK"),
        port=("MASTER_PORT", "STANDALONE_PORT"), local_size=("LOCAL_WORLD_SIZE",),
    ),
}  # fmt: skip
"""The rows. MPI has none: its processes ask each other."""


def number(env: Mapping[str, str], *names: str, default: int) -> int:
    """The first of ``names`` that is set, as a number of at least 0.

    Raises:
        MisconfigurationException: it is no such number.
    """
    for name in names:
        value = env.get(name)
        if value is None:
            continue
        try:
            found = int(value)
        except ValueError:
            found = -1
        if found < 0:
            raise MisconfigurationException(
                f"the environment variable {name} must be a whole number of at least 0, but it is {value!r}."
            )
        return found
    return default


def port(env: Mapping[str, str], *names: str, default: int) -> int:
    """As ``number``, for a TCP port.

    Raises:
        MisconfigurationException: it is no number from 1 to 65535.
    """
    found = number(env, *names, default=default)
    if not 0 < found < 2**16:
        name = next((name for name in names if name in env), names[0])
        raise MisconfigurationException(f"the environment variable {name} must be a port from 1 to 65535, not {found}.")
    return found


def is_launched(env: Mapping[str, str], parent: int, exists: Callable[[int], bool]) -> bool:
    """Whether the environment says that every process of the run has been started already.

    A process of our launcher carries its parent's id: a program that such a process starts in turn inherits the
    variables without being a rank. Other launchers are known by LOCAL_RANK together with WORLD_SIZE; one alone is a
    left-over.

    Args:
        env: the variables of the process.
        parent: the id of the process's present parent.
        exists: whether there is a process of that id; one of ours that has lost its parent is still one of ours.
    """
    if LAUNCHED in env:
        starter = number(env, LAUNCHED, default=0)
        return parent == starter or not exists(starter)
    return "LOCAL_RANK" in env and "WORLD_SIZE" in env


def attempt(function: Callable[[], int], wrong: list[str]) -> int | None:
    """``function()``, or None after noting in ``wrong`` that a variable is no number."""
    try:
        return function()
    except MisconfigurationException as error:
        wrong.append(str(error))
        return None


def contradictions(row: Row, env: Mapping[str, str], num_devices: int, num_nodes: int) -> list[str]:
    """Everything in which the variables and the user's settings contradict each other; pure."""
    wrong: list[str] = []

    def found(names: tuple[str, ...]) -> tuple[str, int] | None:
        name = next((name for name in names if name in env), None)
        value = None if name is None else attempt(lambda: number(env, name, default=0), wrong)
        return None if name is None or value is None else (name, value)

    asked = num_devices * num_nodes
    world, local_size, nodes = found(row.world_size), found(row.local_size), found(row.num_nodes)
    if world and local_size and nodes and world[1] == local_size[1] * nodes[1] == asked and nodes[1] != num_nodes:
        # As many processes, on another number of nodes: with devices="auto" their number follows from num_nodes.
        wrong.append(
            f"devices={num_devices} and num_nodes={num_nodes}, but {row.starter} has started {local_size[0]}="
            f"{local_size[1]} processes on each of {nodes[0]}={nodes[1]} nodes: set num_nodes={nodes[1]} and "
            f"devices={local_size[1]} (or 'auto')."
        )
        local_size = nodes = None
    if local_size is not None and local_size[1] != num_devices:
        name, value = local_size
        fix = row.set_local_size.format(num_devices)
        wrong.append(
            f"devices={num_devices}, but {row.starter} has started {name}={value} processes on this node: "
            f"set devices={value}" + (f", or {fix}." if fix else ".")
        )
    if nodes is not None and nodes[1] != num_nodes:
        name, value = nodes
        wrong.append(
            f"num_nodes={num_nodes}, but {row.starter} has {name}={value}: set num_nodes={value}, or "
            f"{row.set_num_nodes.format(num_nodes)}."
        )
    if world is not None and world[1] != asked:
        name, value = world
        wrong.append(
            f"devices={num_devices} and num_nodes={num_nodes} make {asked} processes, but {row.starter} has "
            f"{name}={value}: make them agree, or unset {name} if nothing started this process."
        )
    limits = (
        (row.rank, world[0] if world else "devices x num_nodes", world[1] if world else asked),
        (row.local_rank, "devices", num_devices),
        (row.node_rank if row.node_rank != row.rank else (), "num_nodes", num_nodes),
    )
    for names, limit_name, limit in limits:
        place = found(names)
        if place is not None and place[1] >= limit:
            wrong.append(
                f"{row.starter} has {place[0]}={place[1]}, which must be below {limit_name}={limit}: make them agree."
            )
    return wrong


def refuse(wrong: list[str]) -> None:
    """Raise if anything is wrong.

    Raises:
        MisconfigurationException: with everything in ``wrong``.
    """
    if len(wrong) > 1:
        wrong = [f"{len(wrong)} contradictions:", *(f"  {i}. {each}" for i, each in enumerate(wrong, 1))]
    if wrong:
        raise MisconfigurationException("\n".join(wrong))
