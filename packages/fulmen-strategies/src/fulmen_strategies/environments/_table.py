"""The pure part of every environment: variables in, numbers out; nonsense is refused with its name and value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._marks import LAUNCHED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["compare_world", "is_launched", "number", "port"]


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


def compare_world(env: Mapping[str, str], num_devices: int, num_nodes: int) -> None:
    """Compare WORLD_SIZE, if it is set, with the number of processes that the user's settings make.

    Raises:
        MisconfigurationException: they differ.
    """
    asked = num_devices * num_nodes
    started = number(env, "WORLD_SIZE", default=asked)
    if started != asked:
        raise MisconfigurationException(
            f"devices={num_devices} and num_nodes={num_nodes} make {asked} processes, but the environment has "
            f"WORLD_SIZE={started}: make them agree, or unset WORLD_SIZE if nothing started this process."
        )
