"""Questions about loaders: how long they are and what they read from."""

from __future__ import annotations

from typing import cast

from torch.utils.data import IterableDataset

__all__ = ["has_iterable_dataset", "has_len", "sized_len"]


def sized_len(loader: object) -> int | None:
    """``len(loader)``, or None where it has none (an ``IterableDataset`` without a length, a generator)."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def has_len(loader: object) -> bool:
    """Whether ``len(loader)`` works; a length of 0 counts."""
    return sized_len(loader) is not None


def has_iterable_dataset(loader: object) -> bool:
    """Whether ``loader`` reads a ``torch.utils.data.IterableDataset``, which has no indices to sample."""
    return isinstance(cast("object", getattr(loader, "dataset", None)), IterableDataset)
