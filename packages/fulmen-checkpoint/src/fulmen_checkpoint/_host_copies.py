"""Copies of tensors into a snapshot's buffer, which let training go on as soon as it can no longer spoil them."""

from __future__ import annotations

import ctypes
import os
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fulmen_checkpoint._buffer import Buffer

__all__ = ["HostCopies", "dense", "padded"]

_ALIGNMENT = 64
_MOVE_BYTES = 8 << 20
# More do not copy faster: memory has only so many channels.
_MOST_THREADS = 4


class _Move(NamedTuple):
    """Bytes to copy within host memory."""

    target: int
    """An address."""
    source: int
    size: int


class HostCopies:
    """Copies that are gathered and then made together."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._moves: list[_Move] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def add(self, source: Tensor, offset: int) -> Tensor:
        """Copy the elements of ``source`` to ``offset`` of the buffer.

        Returns:
            A tensor on the CPU with the elements' shape and dtype, whose storage is just there.
        """
        source = source.detach()
        storage = cast("Any", self._buffer.storage(offset, source.nbytes))
        target = torch.empty(0, dtype=source.dtype).set_(storage, 0, source.shape, _strides(source))
        if source.nbytes == 0:
            return target
        if source.device.type == "cuda":
            self._buffer.pin()
            with torch.cuda.stream(self._stream(source.device)):
                target.copy_(source, non_blocking=True)
        elif source.device.type == "cpu" and _lies_alike(source, target):
            self._moves += _moves(target.data_ptr(), source.data_ptr(), source.nbytes)
        else:
            target.copy_(source)
        return target

    def start(self) -> list[torch.cuda.Event]:
        """Return when all that is on the CPU has been copied.

        Bytes on CUDA devices are copied by streams of their own, and are there when the returned events are over; what
        is queued on the current stream from now on begins after them, so that it may change the tensors.
        """
        _move(self._moves)
        events: list[torch.cuda.Event] = []
        for device, stream in self._streams.items():
            event = cast("torch.cuda.Event", stream.record_event())
            torch.cuda.current_stream(device).wait_event(event)
            events.append(event)
        return events

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.get(device)
        if stream is None:
            made: torch.cuda.Stream = cast("Any", torch.cuda).Stream(device)
            made.wait_stream(torch.cuda.current_stream(device))
            stream = self._streams[device] = made
        return stream


def padded(size: int) -> int:
    """The bytes that a copy of ``size`` bytes takes, so that the one after it is aligned."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def dense(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its storage holds its elements alone, in the order of a clone; otherwise such a clone."""
    plain = tensor.resolve_conj().resolve_neg()
    alone = plain.untyped_storage().nbytes() == plain.nbytes and plain.stride() == _strides(plain)
    return plain if alone else plain.clone()


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those that a clone of ``tensor`` has."""
    return torch.empty_like(tensor, device="meta").stride()


def _lies_alike(source: Tensor, target: Tensor) -> bool:
    return source.stride() == target.stride() and not source.is_conj() and not source.is_neg()


def _moves(target: int, source: int, size: int) -> Iterator[_Move]:
    for done in range(0, size, _MOVE_BYTES):
        yield _Move(target + done, source + done, min(_MOVE_BYTES, size - done))


def _move(moves: list[_Move]) -> None:
    """Copy on several cores by the C library, which goes round the caches where torch's copy fills them."""

    def work() -> None:
        while True:
            try:
                target, source, size = moves.pop()
            except IndexError:
                return
            ctypes.memmove(target, source, size)

    threads = [Thread(target=work) for _ in range(min(_MOST_THREADS, os.cpu_count() or 1, len(moves)) - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
