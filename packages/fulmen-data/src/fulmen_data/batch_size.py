"""How many samples a batch holds."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

from torch import Tensor

from fulmen_protocols import MisconfigurationException

__all__ = ["extract_batch_size"]

_FIX = "Pass batch_size= where the value is logged."


def extract_batch_size(batch: object) -> int:
    """Size of the first dimension of the first tensor in ``batch``; 1 for a tensor of no dimension.

    Mappings, sequences, other re-iterable collections and dataclass instances are walked in order, to any depth.
    Warns when a later tensor has another size. Reads shapes only: nothing is copied or synchronised.

    Raises:
        ValueError: there is no tensor.
    """
    size = _common_size(batch)
    if size is not None:
        return size
    found: int | None = None
    for tensor in _tensors(batch):
        size = tensor.shape[0] if tensor.ndim else 1
        if found is None:
            found = size
        elif size != found:
            warnings.warn(
                f"the batch holds tensors of first dimension {found} and {size}; {found}, the first, is taken as the "
                f"batch size. {_FIX}",
                stacklevel=2,
            )
            break
    if found is None:
        raise MisconfigurationException(
            f"no tensor was found in a batch of type {type(batch).__name__}: its size is unknown. {_FIX}"
        )
    return found


def _common_size(batch: object) -> int | None:
    """The size where it is plain to see: one tensor, or a list or tuple of equally long ones."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    if not isinstance(batch, (list, tuple)):
        return None
    found: int | None = None
    for item in cast("Sequence[object]", batch):
        if not isinstance(item, Tensor) or not (shape := item.shape):
            return None
        if found is None:
            found = shape[0]
        elif shape[0] != found:
            return None
    return found


def _tensors(batch: object) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple)):
        for item in cast("Iterable[object]", batch):
            if isinstance(item, Tensor):
                yield item
            else:
                yield from _tensors(item)
    elif isinstance(batch, Mapping):
        for item in cast("Mapping[object, object]", batch).values():
            yield from _tensors(item)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _tensors(getattr(batch, field.name, None))
    # An iterator would be used up; text and arrays hold no tensors.
    elif hasattr(batch, "dtype") or isinstance(batch, (Iterator, str, bytes)):
        return
    elif isinstance(batch, Iterable):
        for item in cast("Iterable[object]", batch):
            yield from _tensors(item)
