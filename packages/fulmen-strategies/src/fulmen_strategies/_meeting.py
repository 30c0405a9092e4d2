"""A meeting of all ranks through their store, beside every process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datetime import timedelta

    from torch._C._distributed_c10d import Store

__all__ = ["another_connection", "append", "meet", "set_all"]


def another_connection(store: Store) -> Store:
    """The same store over a connection of its own: while a thread waits over one, nobody else can use that one."""
    return cast("Store", cast("Any", store).clone())  # torch's stubs lack it, and the two below


def append(store: Store, key: str, text: str) -> None:
    """Add ``text`` to the end of what is there; ranks that do so at once lose nothing."""
    cast("Any", store).append(key, text)


def set_all(store: Store, keys: list[str], value: str) -> None:
    """Set all of them in one message."""
    cast("Any", store).multi_set(keys, [value] * len(keys))


def meet(store: Store, name: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Return when all ranks have come; on rank 0, whose process may serve the store, when all have heard so, too.

    After this the store is not needed any more for the ranks to know that the others were there, so that any of them
    may end at once.

    Args:
        store: of all ranks.
        name: of this meeting; each name can be used once.
        rank: of this process.
        world_size: how many come.
        timeout: after which a rank gives up.

    Raises:
        RuntimeError: somebody did not come in time, or the store is gone.
    """
    if store.add(f"{name}/come", 1) == world_size:
        store.set(f"{name}/all", "")
    store.wait([f"{name}/all"], timeout)
    if store.add(f"{name}/heard", 1) == world_size:
        store.set(f"{name}/known", "")
    if rank == 0:
        store.wait([f"{name}/known"], timeout)
