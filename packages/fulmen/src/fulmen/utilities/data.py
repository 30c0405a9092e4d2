"""Questions about loaders and batches, by the names people look for here; most live in fulmen-data."""

from fulmen.hparams import AttributeDict
from fulmen_data import extract_batch_size, has_iterable_dataset, has_len, sized_len, suggested_max_num_workers

__all__ = [
    "AttributeDict",
    "extract_batch_size",
    "has_iterable_dataset",
    "has_len",
    "sized_len",
    "suggested_max_num_workers",
]
