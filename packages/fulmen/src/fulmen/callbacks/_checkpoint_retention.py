"""Which checkpoints a ``ModelCheckpoint`` keeps: how values rank, and which files may be deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fulmen import _files

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from torch import Tensor

__all__ = ["best_of", "is_better", "may_delete", "worst_of", "worst_value", "written_before"]


def worst_value(mode: str) -> Tensor:
    """What every other value is better than; NaN counts as this."""
    return torch.tensor(torch.inf if mode == "min" else -torch.inf)


def is_better(value: Tensor, other: Tensor, mode: str) -> bool:
    """Whether ``value`` is better than ``other``; reads it from its device."""
    other = other.to(value.device)
    return bool(value < other if mode == "min" else value > other)


def best_of(scores: Mapping[str, Tensor], mode: str) -> str:
    """The path with the best score, the earliest of several."""
    return (min if mode == "min" else max)(scores, key=lambda path: scores[path])


def worst_of(scores: Mapping[str, Tensor], mode: str) -> str:
    """The path with the worst score, the earliest of several."""
    return (max if mode == "min" else min)(scores, key=lambda path: scores[path])


def may_delete(path: str, folder: str, resumed_from: str | PathLike[str] | None) -> bool:
    """Whether a file of this run may go: not out of another folder than its own, nor if the run was resumed from it."""
    if resumed_from is not None and _files.real(_files.absolute(resumed_from)) == _files.real(path):
        return False
    return _files.is_inside(path, folder)


def written_before(state: Mapping[str, Any], *, ranks: bool) -> list[str]:
    """The files of the run that ``state`` was saved in. One of Lightning kept no journal, but what it ranks it wrote.

    ``ranks``: whether a monitored value does; otherwise ``best_model_path`` is the newest file, and in no ranking.
    """
    known = [*state.get("best_k_models", ()), state.get("last_model_path", "")]
    if not ranks:
        known.append(state["best_model_path"])
    written: list[str] = state.get("written", [path for path in known if path])
    return written
