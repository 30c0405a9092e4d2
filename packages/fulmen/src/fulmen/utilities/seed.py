"""Random numbers, by the names people look for here; they live in fulmen-fabric and fulmen-data."""

from fulmen_data import seed_worker as pl_worker_init_function
from fulmen_fabric import isolate_rng, reset_seed, seed_everything

__all__ = ["isolate_rng", "pl_worker_init_function", "reset_seed", "seed_everything"]
