"""Batches copied to the device while it still computes on the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fulmen_fabric.transfer import map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Prefetcher", "can_prefetch"]


def can_prefetch(device: torch.device) -> bool:
    """Whether copies to ``device`` can overlap with its computation: CUDA has streams for it, a CPU copies nothing."""
    return device.type == "cuda"


class Prefetcher(Iterator[object]):
    """Hands out the batches of ``batches`` on a CUDA device, the next ``depth`` of them on their way already.

    Copies run on a stream of their own and overlap with computation where the loader pins its memory
    (``pin_memory=True``). The stream that computes waits, on the device, for the copy of the batch it is given; the
    host waits for nothing.

    Args:
        batches: on the host, or anywhere.
        move: copies one batch to ``device`` without waiting.
        device: a CUDA device.
        depth: batches on the device beside the one in use, at least 1.
    """

    def __init__(
        self, batches: Iterator[object], move: Callable[[object], object], device: torch.device, depth: int
    ) -> None:
        self._batches, self._move, self._device, self._depth = batches, move, device, depth
        # Any: torch does not annotate how a stream is made.
        self._stream = cast("torch.cuda.Stream", cast("Any", torch.cuda).Stream(device))
        self._ready: deque[tuple[object, torch.cuda.Event]] = deque()
        self._ended = False
        self.given = 0
        """Batches handed out so far; the loader is ahead of that."""

    def __next__(self) -> object:
        while not self._ended and len(self._ready) <= self._depth:
            self._fetch()
        if not self._ready:
            raise StopIteration
        batch, copied = self._ready.popleft()
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)

        def used_there(leaf: object) -> object:
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(computing)  # its memory is not given away while that stream still reads it
            return leaf

        map_leaves(used_there, batch)
        self.given += 1
        return batch

    def _fetch(self) -> None:
        try:
            batch = next(self._batches)
        except StopIteration:
            self._ended = True
            return
        with torch.cuda.stream(self._stream):
            moved = self._move(batch)
            copied = cast("torch.cuda.Event", self._stream.record_event())
        self._ready.append((moved, copied))
