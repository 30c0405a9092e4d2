"""What a forked process must forget of the process group that its parent is in."""

from __future__ import annotations

import importlib
from typing import Any

import torch.distributed as dist

__all__ = ["forget_inherited_group"]

_inherited: list[list[object]] = []


def forget_inherited_group() -> None:
    """In a process made by fork: be in no process group, though the parent was in one.

    The group's objects were copied, the threads that serve it were not: whoever used or destroyed it would wait for
    ever. So they are kept, and torch is told that there is none.
    """
    if not dist.is_initialized():
        return
    world: Any = importlib.import_module("torch.distributed.distributed_c10d")
    _inherited.append([world._world.default_pg, *world._world.pg_map])
    for group in list(world._world.pg_map):
        world._unregister_process_group(group.group_name)
    world._update_default_pg(None)
    for table in ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "pg_to_tag", "tags_to_pg"):
        getattr(world._world, table).clear()
    world._world.group_count = 0
