"""Combined loaders, samplers for ranks and exact data position, for fulmen or for your own loop."""

from fulmen_data.batch_size import extract_batch_size
from fulmen_data.combined_loader import CombinationMode, CombinedLoader
from fulmen_data.distribute import distribute_loader, set_epoch, track_batch_indices
from fulmen_data.elastic import batches_left, elastic_loader, needs_elastic_loader
from fulmen_data.fast_forward import FastForward
from fulmen_data.position import LoaderPosition
from fulmen_data.rebuild import rebuild_loader
from fulmen_data.samplers import (
    DistributedBatchSampler,
    DistributedSamplerWrapper,
    IndexBatchSamplerWrapper,
    SeekableSampler,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from fulmen_data.seeded import SeededDataset, sample_seed, seed_samples
from fulmen_data.sizes import has_iterable_dataset, has_len, sized_len
from fulmen_data.worker_seeding import add_worker_seeding, derive_seed, seed_worker
from fulmen_data.workers import end_workers, suggested_max_num_workers

__all__ = [
    "CombinationMode",
    "CombinedLoader",
    "DistributedBatchSampler",
    "DistributedSamplerWrapper",
    "FastForward",
    "IndexBatchSamplerWrapper",
    "LoaderPosition",
    "SeededDataset",
    "SeekableSampler",
    "UnrepeatedDistributedSampler",
    "UnrepeatedDistributedSamplerWrapper",
    "add_worker_seeding",
    "batches_left",
    "derive_seed",
    "distribute_loader",
    "elastic_loader",
    "end_workers",
    "extract_batch_size",
    "has_iterable_dataset",
    "has_len",
    "needs_elastic_loader",
    "rebuild_loader",
    "sample_seed",
    "seed_samples",
    "seed_worker",
    "set_epoch",
    "sized_len",
    "suggested_max_num_workers",
    "track_batch_indices",
]
