"""A context in which new floating-point tensors get another dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["DefaultDtype"]


class DefaultDtype:
    """Within the block ``torch.get_default_dtype()`` is ``dtype``; afterwards it is what it was at entry.

    The previous value is read at entry, not when the context is made, so a change in between is not undone.
    """

    __slots__ = ("_dtype", "_previous")

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._previous: list[torch.dtype] = []  # a stack: the same context may be entered within itself

    def __enter__(self) -> None:
        self._previous.append(torch.get_default_dtype())
        torch.set_default_dtype(self._dtype)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_default_dtype(self._previous.pop())
