"""Checkpoints for drills, in every format, and a hostile one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fulmen_checkpoint import SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_protocols import CheckpointIO

FORMATS: dict[str, Callable[..., CheckpointIO]] = {
    "torch file": TorchCheckpointIO,
    "folder of shards": ShardedCheckpointIO,
    "safetensors file": SafetensorsCheckpointIO,
}


def checkpoint(number: int = 0) -> dict[str, Any]:
    """A small one that knows its number: every tensor is filled with it."""
    module = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(8, 24)).sum().backward()
    optimizer.step()
    state = {name: torch.full_like(tensor, number) for name, tensor in module.state_dict().items()}
    moments = optimizer.state_dict()
    for entry in moments["state"].values():
        entry.update({key: torch.full_like(value, number) for key, value in entry.items()})
    return {
        "epoch": number,
        "global_step": number,
        "state_dict": state,
        "optimizer_states": [moments],
        "ranks": [{"rng": torch.full((32,), number % 200, dtype=torch.uint8)}],
        "words": ["a", ("b", 2.5), None],
    }


def same(left: Any, right: Any) -> bool:
    """Whether two checkpoints are equal, bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def files_of(path: Path) -> list[Path]:
    """The files of a checkpoint."""
    return sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a checkpoint, in place of an old one."""
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        os.remove(target)
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))
