"""Random numbers of XLA devices, where torch looks for them.

torch asks ``torch.get_device_module(device)`` for a device's generator; torch-xla registers no such module, and draws
from one generator for each device that ``torch.manual_seed`` does not reach. Both are mended here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from fulmen_xla._library import library

__all__ = ["register", "seed_like_torch"]

_seeded_with: list[int] = []


def register() -> None:
    """Let ``torch.get_device_module("xla")`` have the functions of a generator, unless somebody has registered one."""
    if hasattr(torch, "xla"):
        return
    module: Any = ModuleType("torch.xla", __doc__)
    module.get_rng_state, module.set_rng_state = _get, _set
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    cast("Any", torch)._register_device_module("xla", module)


def seed_like_torch() -> None:
    """Seed the device with torch's own seed, once for each: a later fit goes on drawing."""
    seed = torch.initial_seed()
    if not _seeded_with or _seeded_with[-1] != seed:
        _seeded_with[:] = [seed]
        library("core.xla_model").set_rng_state(seed % 2**63)


def _get(device: object = "xla") -> Tensor:
    """The state of the device's generator, one whole number."""
    state = int(library("core.xla_model").get_rng_state())
    return torch.tensor([state - 2**64 if state >= 2**63 else state], dtype=torch.int64)


def _set(state: Tensor, device: object = "xla") -> None:
    library("core.xla_model").set_rng_state(int(state.cpu().item()) % 2**64)
