"""Strategies under the names by which they are asked for: one function for each variant of DDP."""

from __future__ import annotations

from typing import Any

from fulmen_strategies.ddp import DDPStrategy

__all__ = [
    "ddp_fork",
    "ddp_fork_find_unused_parameters",
    "ddp_spawn",
    "ddp_spawn_find_unused_parameters",
]


def ddp_spawn(**options: Any) -> DDPStrategy:
    """DDP in processes that are started for each call, as new interpreters."""
    return DDPStrategy(start_method="spawn", **options)


def ddp_spawn_find_unused_parameters(**options: Any) -> DDPStrategy:
    """The same; a backward pass may leave parameters without gradient."""
    return DDPStrategy(start_method="spawn", find_unused_parameters=True, **options)


def ddp_fork(**options: Any) -> DDPStrategy:
    """DDP in processes that are copied from this one for each call: works in notebooks."""
    return DDPStrategy(start_method="fork", **options)


def ddp_fork_find_unused_parameters(**options: Any) -> DDPStrategy:
    """The same; a backward pass may leave parameters without gradient."""
    return DDPStrategy(start_method="fork", find_unused_parameters=True, **options)
