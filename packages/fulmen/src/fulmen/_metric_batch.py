"""How many samples a batch holds, read off its tensors when nobody said it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import cast

from torch import Tensor

__all__ = ["batch_sizes", "first_batch_size"]


def batch_sizes(batch: object) -> Iterator[int]:
    """The leading size of every tensor in ``batch``, depth first; a tensor of shape ``()`` counts as one sample.

    Walks mappings, sequences, dataclasses and other re-iterable containers. Iterators are left alone: walking one
    would use it up.
    """
    if isinstance(batch, Tensor):
        yield batch.shape[0] if batch.ndim else 1
    elif isinstance(batch, Mapping):
        for value in cast("Mapping[object, object]", batch).values():
            yield from batch_sizes(value)
    elif isinstance(batch, (str, bytes, int, float, complex)) or batch is None or isinstance(batch, Iterator):
        return
    elif isinstance(batch, Iterable):
        for value in cast("Iterable[object]", batch):
            if value is batch:  # some string-like types contain themselves
                return
            yield from batch_sizes(value)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from batch_sizes(getattr(batch, field.name, None))


def first_batch_size(batch: object) -> int | None:
    """The leading size of the first tensor in ``batch``; without tensors, the length of its first list of plain values.

    None when neither is there.
    """
    known: object = batch
    if isinstance(batch, (list, tuple)):  # the usual (inputs, targets), without a generator
        head = cast("tuple[object, ...]", batch)
        if head and isinstance(head[0], Tensor):
            return head[0].shape[0] if head[0].ndim else 1
    size = next(batch_sizes(known), None)
    return _plain_length(known) if size is None else size


def _plain_length(batch: object) -> int | None:
    if isinstance(batch, Mapping):
        values: Iterable[object] = cast("Mapping[object, object]", batch).values()
    elif isinstance(batch, (list, tuple)):
        sequence = cast("tuple[object, ...]", batch)
        if sequence and isinstance(sequence[0], (str, bytes, int, float)):
            return len(sequence)
        values = sequence
    else:
        return None
    return next((size for size in map(_plain_length, values) if size is not None), None)
