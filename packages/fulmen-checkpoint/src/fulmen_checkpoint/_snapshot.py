"""The state of a checkpoint at one moment: its structure pickled as torch does, its tensors' bytes in a buffer."""

from __future__ import annotations

import ctypes
import io
import pickle
import zipfile
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_checkpoint._host_copies import HostCopies, padded
from fulmen_checkpoint._shard_file import Frame
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fulmen_checkpoint._buffer import Buffer

__all__ = ["Pickled", "Snapshot", "frame", "on_host", "pickled", "rebuild", "take"]

_PROTOCOL = 2  # torch's restricted reader knows no later one
_ONE_BYTE = torch.uint8


@dataclass(slots=True)
class Pickled:
    """``data.pkl`` of a torch file and the storages that it names by number."""

    data: bytes
    storages: list[torch.UntypedStorage] = field(default_factory=list[torch.UntypedStorage])

    @property
    def size(self) -> int:
        """Bytes that a buffer needs for a snapshot of it."""
        return sum(padded(storage.nbytes()) for storage in self.storages) + len(self.data)


@dataclass(slots=True)
class Snapshot:
    """Where in ``buffer`` the parts of one checkpoint lie, as (offset, size) in bytes."""

    buffer: Buffer
    pickle: tuple[int, int]
    storages: list[tuple[int, int]]
    copies: list[torch.cuda.Event]
    """Copies from CUDA devices that may still be running."""

    def wait(self) -> None:
        """Return when every byte is there."""
        for copy in self.copies:
            copy.synchronize()
        self.copies.clear()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=_PROTOCOL)
        self.storages: list[torch.UntypedStorage] = []
        self._keys: dict[int, str] = {}  # one object for each storage, as pickle writes repeated ones shorter
        self._types: dict[int, torch.dtype] = {}

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        if isinstance(obj, torch.storage.TypedStorage):
            typed = cast("Any", obj)  # what torch.save itself asks of it is private
            storage: torch.UntypedStorage = typed._untyped_storage
            dtype: torch.dtype = typed.dtype
            kind: object = getattr(torch, typed._pickle_storage_type())
            count: int = typed._size()
        elif isinstance(obj, torch.UntypedStorage):
            storage, dtype, kind, count = obj, _ONE_BYTE, torch.UntypedStorage, obj.nbytes()
        else:
            return None
        if storage.data_ptr() != 0 and self._types.setdefault(storage.data_ptr(), dtype) != dtype:
            raise CheckpointError(
                f"two tensors of the checkpoint read the same memory as {self._types[storage.data_ptr()]} and as "
                f"{dtype}, which torch's format cannot hold. Clone one of them."
            )
        key = cast("int", cast("Any", storage)._cdata)
        if key not in self._keys:
            self._keys[key] = str(len(self.storages))
            self.storages.append(storage)
        return ("storage", kind, self._keys[key], torch.serialization.location_tag(storage), count)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, storages: list[torch.UntypedStorage]) -> None:
        super().__init__(io.BytesIO(data))
        self._storages = storages

    def persistent_load(self, pid: tuple[Any, ...]) -> object:
        _, kind, key, _, _ = pid
        dtype = _ONE_BYTE if kind is torch.UntypedStorage else kind._dtype
        storage = cast("Any", torch.storage.TypedStorage)
        return storage(wrap_storage=self._storages[int(key)], dtype=dtype, _internal=True)


def pickled(checkpoint: object) -> Pickled:
    """What ``torch.save`` makes of ``checkpoint`` before it writes storages; none of them is copied yet.

    Raises:
        Exception: an object cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(checkpoint)
    return Pickled(stream.getvalue(), pickler.storages)


def on_host(storages: Iterable[torch.UntypedStorage]) -> Iterator[memoryview]:
    """The bytes of each storage, copied to host memory if they are elsewhere; valid until the next is asked for."""
    for storage in storages:
        host = storage if storage.device.type == "cpu" else cast("torch.UntypedStorage", cast("Any", storage).cpu())
        if host.nbytes() == 0:
            yield memoryview(b"")
        else:
            yield memoryview((ctypes.c_uint8 * host.nbytes()).from_address(host.data_ptr())).cast("B")


def take(source: Pickled, buffer: Buffer) -> Snapshot:
    """Copy every storage into ``buffer``.

    Bytes on the CPU have been copied on return. Bytes on CUDA devices are copied by streams of their own; what is
    queued on the current stream from now on begins after them, so that it may change the tensors.
    """
    places: list[tuple[int, int]] = []
    copies = HostCopies(buffer)
    offset = 0
    for storage in source.storages:
        size = storage.nbytes()
        places.append((offset, size))
        if size:
            copies.add(torch.empty(0, dtype=_ONE_BYTE, device=storage.device).set_(cast("Any", storage)), offset)
        offset += padded(size)
    events = copies.start()
    buffer.write(offset, source.data)
    return Snapshot(buffer, (offset, len(source.data)), places, events)


def rebuild(snapshot: Snapshot) -> dict[str, object]:
    """The checkpoint as objects again; its tensors are on the CPU and lie in the snapshot's buffer."""
    storages = [snapshot.buffer.storage(offset, size) for offset, size in snapshot.storages]
    return cast("dict[str, object]", _Unpickler(snapshot.buffer.read(*snapshot.pickle), storages).load())


@cache
def frame() -> Frame:
    """The records beside pickle and storages, as this version of torch writes them."""
    stream = io.BytesIO()
    torch.save({"": torch.zeros(1)}, stream)
    head: list[tuple[str, bytes]] = []
    tail: list[tuple[str, bytes]] = []
    records = head
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if name == "data/0":
                records = tail
            elif name not in ("data.pkl", ".data/serialization_id"):
                records.append((name, archive.read(info)))
    return Frame(head, tail)
