"""Asking the processes of a run something without a collective: the devices go on with what they have to do."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from fulmen_protocols import RankFailure, current_whereabouts

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

__all__ = ["HostVote", "group_store", "group_timeout", "new_name"]

_RUNS = itertools.count(1)


class HostVote:
    """Whether any rank says yes. Ranks wait for each other's hosts, not for what these have given their devices to do.

    A collective that the host reads would make it wait until its device has come so far, and the device then for the
    next launches. Here each call costs three requests to the store.

    Args:
        store: reachable from every rank.
        world_size: how many ranks there are.
        name: keys start with it; new for each run that uses the same store.
        timeout: how long a rank waits for the others.
    """

    def __init__(self, store: Store, world_size: int, *, name: str, timeout: timedelta) -> None:
        self._store = PrefixStore(name, store)
        self._world_size, self._timeout = world_size, timeout
        self._asked = 0

    def any(self, mine: bool) -> bool:
        """The answer, the same on every rank; all must ask the same questions in the same order.

        Raises:
            RankFailure: a rank did not come in time.
        """
        self._asked += 1
        note = current_whereabouts()
        if note is not None:
            note.meetings += 1  # tells who kept the others waiting, if one does not come
        came, answer = f"came/{self._asked}", f"answer/{self._asked}"
        # One number counts both who came and who said yes.
        yes, there = divmod(self._store.add(came, 1 + mine * (self._world_size + 1)), self._world_size + 1)
        if there == self._world_size:
            self._store.set(answer, str(int(yes > 0)))
            self._store.delete_key(came)
            if self._asked > 1:  # who came here has read the answer before
                self._store.delete_key(f"answer/{self._asked - 1}")
            return yes > 0
        try:
            self._store.wait([answer], self._timeout)
        except dist.DistError as error:
            raise RankFailure(
                f"not all of {self._world_size} ranks came to a point that all must come to within {self._timeout}: "
                "one has probably died, or is somewhere else."
            ) from error
        return self._store.get(answer) == b"1"


def group_store() -> Store | None:
    """The key-value store at which this process's default group met; None without a group."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] -- torch has no public way to it


def group_timeout(device: torch.device) -> timedelta:
    """How long the default group waits for a rank in a collective of tensors on ``device``."""
    group: Any = dist.group.WORLD
    options = getattr(group._get_backend(device), "options", None)  # torch has no public way to it
    return getattr(options, "_timeout", None) or timedelta(minutes=30)


def new_name(what: str) -> str:
    """A name for keys that no earlier run of this program has used: a group, and its store, may outlive many runs.

    The same on every rank, as long as all ask in the same order.
    """
    return f"fulmen/{what}/{next(_RUNS)}"
