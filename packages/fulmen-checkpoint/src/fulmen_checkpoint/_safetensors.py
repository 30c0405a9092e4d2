"""The safetensors format, written and read without its library: a JSON header, then the tensors' bytes.

    8 bytes      length of the header, little-endian
    header       JSON: name -> {"dtype", "shape", "data_offsets"}; "__metadata__" -> texts by name
    data         the tensors, each in row-major order, without gaps

Every reader of safetensors finds the tensors. Under ``__metadata__`` stand the rest of the checkpoint ("fulmen.tree")
and a digest ("fulmen.digest"): the SHA-256 of the header, with the digest's own 64 digits as zeros, and of the digest
of the data (the SHA-256 of the CRC-32s of its 1 MiB chunks). It is computed before anything is written, so that the
file can go out as a stream.

Source of the format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor

from fulmen_checkpoint import _digest
from fulmen_checkpoint._tree import DTYPES, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Header", "Slot", "begins", "check", "load", "read_header", "write"]

_NAMES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_CODES: Final = {dtype: code for code, dtype in _NAMES.items()}
# The format's own limit: a header that claims more is not one.
_LONGEST_HEADER = 100_000_000
_ZEROS = "0" * 64
_MARK = b'"fulmen.digest":"'
# Below this a read is as fast as a mapping.
_MMAP_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """In bytes from the start of the data."""
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says."""

    slots: dict[str, Slot]
    metadata: dict[str, str]
    data_start: int
    """In bytes from the start of the file."""
    size: int
    """Of the file, in bytes."""

    @property
    def tree(self) -> str | None:
        """The rest of the checkpoint; None for a file of someone else's."""
        return self.metadata.get("fulmen.tree")


def write(sink: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors, each copied to host memory on its own, and texts that go with them."""
    # The widest first, so that each is aligned to its own size without gaps.
    order = sorted(tensors, key=lambda name: (-_width(tensors[name]), name))
    table: dict[str, object] = {}
    given: dict[str, str] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        code, shape = _CODES.get(tensor.dtype), list(tensor.shape)
        if code is None:  # the format has no word for this one: its bytes are kept, and its name beside them
            given[name] = dtype_name(tensor.dtype)
            code, shape = "U8", [*shape, tensor.dtype.itemsize]
        length = tensor.numel() * tensor.dtype.itemsize
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    texts = dict(metadata)
    if given:
        texts["fulmen.dtypes"] = json.dumps(given)
    blank = _header(table, texts, _ZEROS)
    chunks = _digest.Chunks()
    for name in order:
        host = _host(tensors[name])
        chunks.add(_view(host))
    header = _header(table, texts, _joined(blank, chunks.hexdigest()))
    sink.write(len(header).to_bytes(8, "little") + header)
    for name in order:
        host = _host(tensors[name])
        sink.write(_view(host))


def _header(table: Mapping[str, object], texts: Mapping[str, str], digest: str) -> bytes:
    # The digest stands first, so that nothing in a text can look like it.
    whole = {"__metadata__": {"fulmen.digest": digest, "format": "pt", **texts}, **table}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return text + b" " * (-len(text) % 8)


def _joined(blank_header: bytes, data: str) -> str:
    return hashlib.sha256(blank_header + data.encode("ascii")).hexdigest()


def _width(tensor: Tensor) -> int:
    return tensor.dtype.itemsize


def _host(tensor: Tensor) -> Tensor:
    """The elements of any tensor, row by row; a copy only if they lie otherwise, or elsewhere than in host memory."""
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()


def _view(host: Tensor) -> memoryview:
    """The bytes of a tensor of ``_host``, valid while it lives. Unlike ``Tensor.numpy`` it needs no numpy."""
    if host.numel() == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_uint8 * host.nbytes).from_address(host.data_ptr())).cast("B")


def begins(stream: IO[bytes]) -> bool:
    """Whether a file can be of this format, by its first bytes."""
    stream.seek(0)
    first = stream.read(9)
    return len(first) == 9 and first[8:] == b"{" and 2 <= int.from_bytes(first[:8], "little") <= _LONGEST_HEADER


def read_header(stream: IO[bytes]) -> Header:
    """Read and check the header: every tensor lies within the file, none overlaps another, no byte is left over.

    Raises:
        Damage: it is no header of this format.
    """
    size = stream.seek(0, os.SEEK_END)
    text = _header_text(stream, size)
    try:
        raw = json.loads(text)
        metadata = _texts(raw.pop("__metadata__", {}))
        given = _texts(json.loads(metadata.get("fulmen.dtypes", "{}")))
        slots = {name: _slot(entry, given.get(name)) for name, entry in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _digest.Damage(f"its header ({type(error).__name__}: {error})") from error
    header = Header(slots, metadata, 8 + len(text), size)
    place = 0
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)):
        if slot.begin != place:
            raise _digest.Damage(f"its header: tensor {name!r} does not begin where the one before it ends")
        place = slot.end
    if header.data_start + place != size:
        raise _digest.Damage(f"its header tells of {header.data_start + place} bytes, but the file has {size}")
    return header


def _header_text(stream: IO[bytes], size: int) -> bytes:
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
        raise _digest.Damage(f"its header of {length} bytes does not fit into a file of {size}")
    return stream.read(length)


def _slot(entry: Mapping[str, Any], given: str | None) -> Slot:
    dtype, shape = _NAMES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"not all numbers are whole: {shape} {begin} {end}")
    count = 1
    for side in shape:
        count *= side
    if end - begin != count * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for {dtype} of shape {shape}")
    if given is not None:
        kept = DTYPES[given]
        if dtype is not torch.uint8 or not shape or shape[-1] != kept.itemsize:
            raise ValueError(f"{given} cannot be made of {dtype} of shape {shape}")
        dtype, shape = kept, shape[:-1]
    return Slot(dtype, shape, begin, end)


def _texts(values: object) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, text in cast("dict[object, object]", values).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"{name!r}: {text!r} are not texts")
        texts[name] = text
    return texts


def check(stream: IO[bytes]) -> bool:
    """Compare a file with its digest.

    Returns:
        False when it has none (it is someone else's): then only its structure was checked.

    Raises:
        Damage: the bytes are not those that were written.
    """
    header = read_header(stream)
    told = header.metadata.get("fulmen.digest")
    if told is None:
        if any(name.lower().startswith("fulmen") for name in header.metadata):
            raise _digest.Damage("its header, where the digest should stand")
        return False
    text = _header_text(stream, header.size)
    place = text.find(_MARK) + len(_MARK)
    if text[place : place + 64] != told.encode():
        raise _digest.Damage("its header, where the digest stands")
    blank = text[:place] + _ZEROS.encode() + text[place + 64 :]
    data = _digest.checksums(stream, header.data_start, header.size - header.data_start).hexdigest()
    if _joined(blank, data) != told:
        raise _digest.Damage("its header or its tensors are not those that the digest was made of")
    return True


def load(stream: IO[bytes], header: Header, *, mapped: bool) -> dict[str, Tensor]:
    """All tensors, on the CPU. ``mapped``: a big file's pages are read when they are used, changes stay private."""
    return dict(_tensors(stream, header, mapped and header.size >= _MMAP_BYTES))


def _tensors(stream: IO[bytes], header: Header, mapped: bool) -> Iterator[tuple[str, Tensor]]:
    if mapped:
        # A private mapping, which lives as long as a tensor that uses it.
        whole: Any = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        at = header.data_start
    else:
        stream.seek(header.data_start)
        whole, at = bytearray(header.size - header.data_start), 0
        if stream.readinto(whole) != len(whole):  # type: ignore[attr-defined]
            raise _digest.Damage("the file became shorter while it was read")
    for name, slot in header.slots.items():
        if slot.begin == slot.end:
            yield name, torch.empty(slot.shape, dtype=slot.dtype)
            continue
        raw = torch.frombuffer(whole, dtype=torch.uint8, count=slot.end - slot.begin, offset=at + slot.begin)
        if (at + slot.begin) % slot.dtype.itemsize:  # files of others need not be aligned
            raw = raw.clone()
        yield name, raw.view(slot.dtype).reshape(slot.shape)
