"""Random numbers, by the names people look for here; they live in fulmen-fabric and fulmen-data."""

from fulmen_data import seed_worker as pl_worker_init_function
from fulmen_fabric import isolate_rng, reset_seed, seed_everything

__all__ = [
    "isolate_rng",
    "max_seed_value",
    "min_seed_value",
    "pl_worker_init_function",
    "reset_seed",
    "seed_everything",
]

min_seed_value = 0
max_seed_value = 2**32 - 1
"""The seeds that ``seed_everything`` takes lie between these two; NumPy takes no other."""
