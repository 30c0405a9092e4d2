"""Checkpoints that are folders: the manifest that commits one, and reading all of it on one process.

    manifest.json                  written last: a folder without it is no checkpoint
    state-TOKEN.safetensors        everything that is not a tensor of a module or an optimizer, as plain data
    __RANK_0-TOKEN.distcp          what one rank wrote: torch.distributed.checkpoint's own format
    .metadata                      torch's index, for torch's own readers; ours never open it

Each save has a new TOKEN, so that a save over an old checkpoint leaves the old files alone until its own manifest has
replaced the old one, which every storage does in one step. What no manifest names is deleted by the next save.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fulmen_checkpoint import _digest, _safetensors
from fulmen_checkpoint._fetch import corrupt, fetched, not_found, storage_errors
from fulmen_checkpoint._tree import DTYPES, rebuild
from fulmen_checkpoint.names import MANIFEST
from fulmen_protocols.errors import CheckpointCorrupt, CheckpointError, CheckpointNotFound

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from fulmen_protocols.storage import Storage

__all__ = ["Manifest", "Piece", "Sharded", "is_part", "join", "load", "read_manifest", "read_state", "verify"]

VERSION: Final = 1
TORCH_INDEX: Final = ".metadata"
_PART: Final = re.compile(r"(state-(?P<a>[0-9a-f]{16})\.safetensors|__\d+_\d+-(?P<b>[0-9a-f]{16})\.distcp)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor in pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder holds."""

    world_size: int
    """How many ranks wrote it."""
    state: str
    """Name of the file of plain data."""
    files: dict[str, tuple[int, str]]
    """Name to size in bytes and digest."""
    tensors: dict[str, Sharded]

    def encode(self) -> bytes:
        """The manifest as JSON, with a digest of its own."""
        names = list(self.files)
        body = {
            "fulmen": VERSION,
            "world_size": self.world_size,
            "state": self.state,
            "files": {name: list(told) for name, told in self.files.items()},
            "tensors": {
                name: {
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "shape": entry.shape,
                    "pieces": [[p.offsets, p.sizes, names.index(p.file), p.start, p.length] for p in entry.pieces],
                }
                for name, entry in self.tensors.items()
            },
        }
        text = json.dumps(body, separators=(",", ":"))
        return f'{{"digest":"{_sha(text)}",{text[1:]}'.encode()


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def join(folder: str, name: str) -> str:
    """The path of a file in a checkpoint's folder."""
    return f"{folder.rstrip('/')}/{name}"


def is_part(name: str) -> str | None:
    """The token in the name of a file that a save wrote; None for files of other names."""
    match = _PART.fullmatch(name)
    return None if match is None else match["a"] or match["b"]


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """Read the manifest.

    Raises:
        CheckpointNotFound: there is no such folder.
        CheckpointCorrupt: the folder has none (its save never finished), or it is damaged.
        CheckpointError: it was written by a newer fulmen.
    """
    try:
        with fetched(storage, join(folder, MANIFEST)) as stream:
            text = stream.read().decode("utf-8", errors="replace")
    except CheckpointNotFound:
        if not storage.exists(folder):
            raise not_found(storage, folder) from None
        raise CheckpointCorrupt(
            f"{folder!r} is a folder, but no whole checkpoint: {MANIFEST} is missing, which a save writes last. "
            "The save was cut short, or the folder is something else. Use an earlier checkpoint."
        ) from None
    head = re.match(r'\{"digest":"([0-9a-f]{64})",', text)
    if head is None or _sha("{" + text[head.end() :]) != head[1]:
        raise corrupt(folder, f"{MANIFEST} is not what its own digest says")
    try:
        return _parse(json.loads(text), folder)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise corrupt(folder, f"{MANIFEST} ({type(error).__name__}: {error})") from error


def _parse(raw: Mapping[str, Any], folder: str) -> Manifest:
    if raw["fulmen"] != VERSION:
        raise CheckpointError(
            f"the checkpoint {folder!r} has layout {raw['fulmen']!r}; this fulmen-checkpoint reads {VERSION}. Update "
            "fulmen-checkpoint."
        )
    files = {name: (int(size), str(digest)) for name, (size, digest) in raw["files"].items()}
    names = list(files)
    for name in names:
        if "/" in name or "\\" in name or name in ("", "..", "."):
            raise ValueError(f"{name!r} is no file of this folder")
    tensors: dict[str, Sharded] = {}
    for name, entry in raw["tensors"].items():
        pieces = tuple(
            Piece(_numbers(offsets), _numbers(sizes), names[_number(file)], _number(start), _number(length))
            for offsets, sizes, file, start, length in entry["pieces"]
        )
        tensors[name] = Sharded(DTYPES[entry["dtype"]], _numbers(entry["shape"]), pieces)
    if raw["state"] not in files:
        raise ValueError("the file of plain data is not listed")
    return Manifest(_number(raw["world_size"]), raw["state"], files, tensors)


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _numbers(values: Iterable[object]) -> tuple[int, ...]:
    return tuple(_number(value) for value in values)


def verify(storage: Storage, folder: str) -> Manifest:
    """Read every byte and compare it with the manifest.

    Raises:
        CheckpointNotFound: there is no such folder.
        CheckpointCorrupt: a file is missing or differs; the message names it.
    """
    manifest = read_manifest(storage, folder)
    for name in manifest.files:
        # Torch's own index comes after the manifest; it may be missing, but not be another one.
        if name != TORCH_INDEX or storage.exists(join(folder, name)):
            with checked(storage, folder, manifest, name):
                pass
    return manifest


@contextmanager
def checked(
    storage: Storage, folder: str, manifest: Manifest, name: str, *, digest: bool = True
) -> Generator[IO[bytes]]:
    """A file of the folder as a stream that is whole."""
    size, told = manifest.files[name]
    try:
        opened = fetched(storage, join(folder, name))
        stream = opened.__enter__()
    except CheckpointNotFound:
        raise corrupt(folder, f"its file {name!r} is missing") from None
    try:
        found = stream.seek(0, io.SEEK_END)
        if found != size:
            raise corrupt(folder, f"its file {name!r} has {found} bytes, not {size}")
        if digest and _digest.checksums(stream, 0, size).hexdigest() != told:
            raise corrupt(folder, f"its file {name!r} is not what its digest says")
        yield stream
    finally:
        opened.__exit__(None, None, None)


def load(
    storage: Storage, folder: str, place: torch.device | str | None, *, digest: bool, mapped: bool
) -> dict[str, object]:
    """The whole checkpoint on one process, whoever wrote which part."""
    manifest = read_manifest(storage, folder)
    tree, tensors = read_state(storage, folder, manifest, digest=digest, mapped=mapped)
    tensors |= assemble(storage, folder, manifest, list(manifest.tensors), digest=digest, place=place)
    return rebuilt(folder, tree, tensors, place)


def rebuilt(
    folder: str, tree: str, tensors: Mapping[str, Tensor], place: torch.device | str | None
) -> dict[str, object]:
    """The checkpoint, its tensors at ``place``."""
    device = torch.device("cpu" if place is None else place)
    try:
        return rebuild(tree, lambda name: _moved(tensors[name], device))
    except ValueError as error:
        raise corrupt(folder, str(error)) from error


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if tensor.device.type == device.type == "cpu" else tensor.to(device)


def read_state(
    storage: Storage, folder: str, manifest: Manifest, *, digest: bool, mapped: bool = False
) -> tuple[str, dict[str, Tensor]]:
    """The tree of plain data and the tensors that are kept with it."""
    with checked(storage, folder, manifest, manifest.state, digest=digest) as stream:
        try:
            header = _safetensors.read_header(stream)
            tensors = _safetensors.load(stream, header, mapped=mapped)
        except _digest.Damage as damage:
            raise corrupt(folder, f"its file {manifest.state!r}: {damage}") from None
    if header.tree is None:
        raise corrupt(folder, f"its file {manifest.state!r} holds no tree of plain data")
    return header.tree, tensors


def assemble(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    names: Iterable[str],
    *,
    digest: bool,
    place: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Whole tensors of the given names, from their pieces; each file is opened once."""
    wanted = {name: manifest.tensors[name] for name in names}
    meta = place is not None and torch.device(place).type == "meta"
    whole = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta" if meta else "cpu")
             for name, entry in wanted.items()}  # fmt: skip
    for name, entry in wanted.items():
        if sum(_volume(piece.sizes) for piece in entry.pieces) != _volume(entry.shape):
            raise corrupt(folder, f"the pieces of tensor {name!r} do not make up its shape {list(entry.shape)}")
    by_file: dict[str, list[tuple[Tensor, Piece, torch.dtype]]] = {}
    for name, entry in wanted.items():
        for piece in entry.pieces:
            by_file.setdefault(piece.file, []).append((whole[name], piece, entry.dtype))
    for file, pieces in by_file.items():
        with checked(storage, folder, manifest, file, digest=digest) as stream:
            if meta:
                continue
            for tensor, piece, dtype in pieces:
                _box(tensor, piece).copy_(read_piece(stream, folder, piece, dtype))
    return whole


def _volume(sizes: Iterable[int]) -> int:
    volume = 1
    for size in sizes:
        volume *= size
    return volume


def _box(tensor: Tensor, piece: Piece) -> Tensor:
    for dim, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def read_piece(stream: IO[bytes], folder: str, piece: Piece, dtype: torch.dtype) -> Tensor:
    """The tensor at ``piece``'s place in a shard file. Runs no code from it."""
    stream.seek(piece.start)
    with storage_errors(folder, "read"):
        data = stream.read(piece.length)
    try:
        found: object = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as error:
        raise corrupt(folder, f"its file {piece.file!r} at byte {piece.start} ({type(error).__name__})") from error
    if not isinstance(found, Tensor) or found.dtype != dtype or tuple(found.shape) != piece.sizes:
        raise corrupt(folder, f"its file {piece.file!r} holds something else at byte {piece.start}")
    return found
