"""Random streams of data-loading workers that never repeat each other."""

from __future__ import annotations

import hashlib
import os
import random
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["add_worker_seeding", "derive_seed", "seed_worker"]

T = TypeVar("T")

# In the order in which launchers are trusted; the first that is set wins.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")


def derive_seed(*parts: int, bits: int = 64) -> int:
    """A number below ``2**bits`` (at most 512 bits) that depends on every bit of every part, and on their order.

    A hash, so that neighbouring parts (worker 1, worker 2) give unrelated seeds; the same on every machine.
    """
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=64).digest(), "little") & ((1 << bits) - 1)


def seed_worker(worker_id: int, rank: int | None = None) -> None:
    """Seed torch, Python and NumPy (if installed) in a worker; pass it as a DataLoader's ``worker_init_fn``.

    The seeds differ between workers, ranks and epochs, and depend on nothing else but the state of the parent's
    generator when the epoch began (with persistent workers: when they started; their streams then run on).

    Args:
        worker_id: given by the DataLoader.
        rank: of the parent process; None reads the launcher's environment variables.
    """
    if rank is None:
        rank = next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)
    # The DataLoader seeded torch with base_seed + worker_id, base_seed being drawn anew at each epoch.
    base_seed = torch.initial_seed() - worker_id
    torch.manual_seed(derive_seed(base_seed, worker_id, rank, 0))
    random.seed(derive_seed(base_seed, worker_id, rank, 1, bits=512))
    try:
        numpy = import_module("numpy")
    except ImportError:
        return
    words = derive_seed(base_seed, worker_id, rank, 2, bits=512)
    numpy.random.seed([(words >> shift) & 0xFFFFFFFF for shift in range(0, 512, 32)])


def add_worker_seeding(loader: DataLoader[T], rank: int) -> None:
    """Set ``seed_worker`` for ``rank`` on ``loader`` unless it has a ``worker_init_fn`` of its own."""
    if loader.worker_init_fn is None:
        loader.worker_init_fn = partial(seed_worker, rank=rank)
