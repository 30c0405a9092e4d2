"""TorchCheckpointIO: one checkpoint in one file of torch's own format, whole or not there, with a digest inside."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from contextlib import suppress
from typing import IO, TYPE_CHECKING, cast

import torch

from fulmen_checkpoint import (
    _archive,
    _digest,
    _directory,
    _foreign,
    _registered,
    _safetensors,
    _snapshot,
    _standins,
)
from fulmen_checkpoint._fetch import corrupt, fetched, storage_errors
from fulmen_checkpoint._plain import find_unsafe
from fulmen_checkpoint.migration import migrate
from fulmen_checkpoint.names import MANIFEST
from fulmen_checkpoint.serializers import pack, unpack
from fulmen_checkpoint.storage import FsspecStorage
from fulmen_protocols.errors import CheckpointError, CheckpointNotFound, CheckpointUnsafe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen_protocols.storage import Storage

__all__ = ["TorchCheckpointIO", "require_plain"]

# Below this a read is as fast as a mapping.
_MMAP_BYTES = 1 << 20


class TorchCheckpointIO:
    """``torch.save`` files that survive crashes and tell damage. Satisfies ``fulmen_protocols.CheckpointIO``.

    The file streams to its place, record for record what ``torch.save`` makes; the checkpoint is never held in memory
    a second time. It can be moved, copied and read by plain ``torch.load(weights_only=True)``; files that plain
    ``torch.save`` or Lightning wrote load too.

    Args:
        storage: where files live; by default every local path and every URL that fsspec knows.
        allow_unsafe: save objects that only ``load_checkpoint(..., weights_only=False)`` can bring back. If not,
            saving them is an error, because a checkpoint that does not load is a lost run. None: only where the
            environment has ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1``, with which torch, and ``load_checkpoint``, trust
            every file whose ``weights_only`` is not given; and in a subclass with a ``load_checkpoint`` of its own,
            which may load what ours would not.
        verify: compare each file with its digest before it is loaded.
        mmap: map files into memory instead of reading them. The tensors of a loaded checkpoint then read the file's
            pages as they are used, and their changes stay private. A mapped file may be replaced (as every save of
            ours does) or deleted, but must not be overwritten in place while such tensors live.
        migrate: bring what Lightning before 2.0 wrote to the layout of today.
    """

    def __init__(
        self,
        storage: Storage | None = None,
        *,
        allow_unsafe: bool | None = None,
        verify: bool = True,
        mmap: bool = True,
        migrate: bool = True,
    ) -> None:
        self.storage: Storage = FsspecStorage() if storage is None else storage
        self._allow_unsafe = allow_unsafe
        self.verify = verify
        self.mmap = mmap
        self.migrate = migrate

    @property
    def allow_unsafe(self) -> bool:
        """Whether objects are saved that only code from the file can bring back."""
        if self._allow_unsafe is not None:
            return self._allow_unsafe
        return _files_are_trusted() or type(self).load_checkpoint is not TorchCheckpointIO.load_checkpoint

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write ``checkpoint`` so that ``path`` holds either the old content or all of the new, whatever happens.

        ``storage_options`` go to fsspec for this save, in place of those of the default storage.

        Raises:
            CheckpointUnsafe: an object in it could not be loaded safely; the message names its place.
            CheckpointError: the storage failed; ``path`` keeps what it held.
        """
        target = os.fspath(path)
        checkpoint = pack(checkpoint)
        if not self.allow_unsafe:
            require_plain(checkpoint, target)
        storage = self.storage if storage_options is None else FsspecStorage(storage_options)
        try:
            source = _snapshot.pickled(checkpoint)
        except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
            raise CheckpointError(
                f"the checkpoint {target!r} was not written: torch.save cannot pickle an object in it: {error}. "
                "Remove it, or store plain data in its place."
            ) from error
        frame = _snapshot.frame()
        head = [("data.pkl", source.data), *frame.head]
        with storage_errors(target, "written"), storage.write_atomic(target) as sink:
            _archive.write(sink, _archive.Parts(head, _snapshot.on_host(source.storages), frame.tail))

    def cannot_hold(self, checkpoint: Mapping[str, object]) -> list[tuple[str, object]]:
        """The objects in ``checkpoint`` that could not be loaded safely, each with its place; none where all may be."""
        return [] if self.allow_unsafe else find_unsafe(pack(checkpoint))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read a checkpoint; tensors go to ``map_location`` (None: CPU).

        Any of our formats, and folders of ``torch.distributed.checkpoint``, are known by what they hold. Files of
        Lightning before 2.0 are brought to the layout of today. No code from the file runs unless ``weights_only`` is
        False; None means True, as it does for torch, unless ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`` is set.

        Raises:
            CheckpointNotFound: nothing is there.
            CheckpointCorrupt: the bytes are not those that were written.
            CheckpointUnsafe: it holds objects that only code from the file could rebuild.
            CheckpointError: it holds no dictionary, or something torch cannot read.
        """
        target = os.fspath(path)
        safe = not _files_are_trusted() if weights_only is None else weights_only
        try:
            with fetched(self.storage, target) as stream:
                loaded = self._load_file(stream, target, map_location, safe=safe)
        except (IsADirectoryError, CheckpointNotFound) as error:
            other = _registered.reader_of(self.storage, target)
            if other is not None:
                return other.load_checkpoint(target, map_location, weights_only)
            if isinstance(error, CheckpointNotFound) and not self._is_folder(target):  # some storages open no folders
                raise
            loaded = self._load_folder(target, map_location)
        if not isinstance(loaded, dict):
            raise CheckpointError(
                f"{target!r} holds a {type(loaded).__name__}, but a checkpoint is a dict. Read it with torch.load."
            )
        checkpoint = cast("dict[str, object]", loaded)
        if self.migrate:
            migrate(checkpoint, target)
        return unpack(checkpoint, target)

    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Return if the checkpoint is whole.

        With a digest every byte is checked; without one (files of plain torch or Lightning) the checksums of the
        records, which do not cover the file's headers.

        Raises:
            CheckpointNotFound: nothing is there.
            CheckpointCorrupt: the bytes are not those that were written; the message names the damaged part.
        """
        target = os.fspath(path)
        try:
            with fetched(self.storage, target) as stream:
                # torch's format before zip has no checksums: all that can be asked is whether it reads.
                if not self._check(stream, target) and not _safetensors.begins(stream):
                    with suppress(CheckpointUnsafe):  # then it reads, up to an object that needs code
                        self._read(stream, target, "meta", safe=True, whole=False)
        except (IsADirectoryError, CheckpointNotFound) as error:
            other = _registered.reader_of(self.storage, target)
            if other is not None:
                _registered.verify(other, target)
                return
            if isinstance(error, CheckpointNotFound) and not self._is_folder(target):
                raise
            self._verify_folder(target)

    def has_digest(self, path: str | os.PathLike[str]) -> bool:
        """Whether the checkpoint carries a digest, right or wrong.

        Raises:
            CheckpointNotFound: nothing is there.
            CheckpointCorrupt: its end is damaged.
        """
        target = os.fspath(path)
        try:
            with fetched(self.storage, target) as stream:
                try:
                    if _safetensors.begins(stream):
                        return "fulmen.digest" in _safetensors.read_header(stream).metadata
                    return _digest.has_digest(stream)
                except _digest.Damage as damage:
                    raise corrupt(target, str(damage)) from None
        except (IsADirectoryError, CheckpointNotFound):
            if not self._is_folder(target) and _registered.reader_of(self.storage, target) is None:
                raise
            return self.storage.exists(_directory.join(target, MANIFEST))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint, file or folder. Removing what is not there is allowed."""
        self.storage.remove(os.fspath(path))

    def teardown(self) -> None:
        """Nothing is pending: every save is complete when it returns."""

    def _is_folder(self, path: str) -> bool:
        return any(self.storage.exists(_directory.join(path, name)) for name in (MANIFEST, _directory.TORCH_INDEX))

    def _is_foreign(self, path: str) -> bool:
        """Whether a folder was written by torch.distributed.checkpoint itself, or by Lightning with it."""
        join = _directory.join
        if self.storage.exists(join(path, MANIFEST)) or not self.storage.exists(join(path, _directory.TORCH_INDEX)):
            return False
        # Files of ours without their manifest are half a checkpoint, whatever torch's index says.
        return not any(_directory.is_part(entry.rsplit("/", 1)[-1]) for entry in self.storage.list(path))

    def _load_file(self, stream: IO[bytes], path: str, place: torch.device | str | None, *, safe: bool) -> object:
        whole = self._check(stream, path) if self.verify else False
        if not _safetensors.begins(stream):
            loaded = self._read(stream, path, place, safe=safe, whole=whole)
            stream.seek(0)
            if self.verify and stream.read(2) != b"PK":
                _warn_unchecked(path, "a file of torch's format before 1.6")
            return loaded
        try:
            header = _safetensors.read_header(stream)
            tensors = _safetensors.load(stream, header, mapped=self.mmap)
        except _digest.Damage as damage:
            raise corrupt(path, str(damage)) from None
        if header.tree is not None:
            return _directory.rebuilt(path, header.tree, tensors, place)
        device = torch.device("cpu" if place is None else place)
        return {"state_dict": {name: tensor.to(device) for name, tensor in tensors.items()}}

    def _load_folder(self, path: str, place: torch.device | str | None) -> object:
        if self._is_foreign(path):
            loaded = _foreign.load(self.storage, path, place, self.load_checkpoint)
            if self.verify:
                _warn_unchecked(path, "a folder of torch.distributed.checkpoint")
            return loaded
        return _directory.load(self.storage, path, place, digest=self.verify, mapped=False)

    def _verify_folder(self, path: str) -> None:
        if self._is_foreign(path):
            _foreign.load(self.storage, path, "meta", self.load_checkpoint)
        else:
            _directory.verify(self.storage, path)

    def _check(self, stream: IO[bytes], path: str) -> bool:
        try:
            return _safetensors.check(stream) if _safetensors.begins(stream) else _digest.check(stream)
        except _digest.Damage as damage:
            raise corrupt(path, str(damage)) from None

    def _read(
        self, stream: IO[bytes], path: str, map_location: torch.device | str | None, *, safe: bool, whole: bool
    ) -> object:
        """Give ``stream`` to torch and say what its errors mean. ``whole``: every byte is known to be as written."""
        place = "cpu" if map_location is None else map_location
        try:
            return _standins.load(lambda: _torch_load(stream, place, safe=safe, mmap=self.mmap))
        except pickle.UnpicklingError as error:
            if safe and _REFUSAL.search(str(error)):
                raise CheckpointUnsafe(
                    f"{path!r} was asked to load without running code from it, but it holds "
                    f"{_refused_objects(stream, error)}. If you trust where it comes from, pass weights_only=False, "
                    "which runs code from the file; or allow single classes with "
                    "torch.serialization.add_safe_globals([...])."
                ) from error
            raise _unreadable(path, error, whole=whole) from error
        except (OSError, MemoryError):
            raise
        except Exception as error:
            if safe:
                raise _unreadable(path, error, whole=whole) from error
            if isinstance(error, (AttributeError, ImportError)):
                raise CheckpointError(
                    f"{path!r} holds an object whose class cannot be imported here: {error}. Install or import the "
                    "code that defines it, then load again."
                ) from error
            if whole:  # then it is the code from the file that failed
                raise
            raise _unreadable(path, error, whole=whole) from error


def _files_are_trusted() -> bool:
    said = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "")
    return said.lower() in ("1", "y", "yes", "true")  # as torch reads it


def _warn_unchecked(path: str, kind: str) -> None:
    warnings.warn(
        f"{path!r} is {kind}, which carries no checksum of all its bytes: if it was damaged, nothing tells. Write it "
        "anew with: fulmen checkpoint convert.",
        stacklevel=4,
    )


# How torch's restricted unpickler says that an object is not one of those it may rebuild.
_REFUSAL = re.compile(r"Unsupported global|unsupported GLOBAL|unrecognized function|allowlisted|must be imported")


def _torch_load(stream: IO[bytes], place: torch.device | str, *, safe: bool, mmap: bool) -> object:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if mmap and size >= _MMAP_BYTES and stream.read(4) == b"PK\3\4":
        # torch maps files by name only. This name is the very file that was checked, even if its path was replaced.
        name = f"/proc/self/fd/{stream.fileno()}"
        return torch.load(name if os.path.exists(name) else stream.name, place, weights_only=safe, mmap=True)
    stream.seek(0)
    return torch.load(stream, place, weights_only=safe)


def _refused_objects(stream: IO[bytes], error: pickle.UnpicklingError) -> str:
    stream.seek(0)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    except Exception:  # noqa: BLE001 - files of torch's older format: the first name is in the message
        names = []
    if not names:
        found = re.search(r"GLOBAL (\S+)", str(error))
        return found[1] if found else str(error).splitlines()[-1]
    return ", ".join(sorted(names))


def _unreadable(path: str, error: Exception, *, whole: bool) -> CheckpointError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    if whole:
        return CheckpointError(f"{path!r} is undamaged, but torch cannot read it: {reason}")
    return corrupt(path, f"its content ({type(error).__name__}: {reason})")


def require_plain(checkpoint: Mapping[str, object], path: str) -> None:
    """Raises ``CheckpointUnsafe`` if ``checkpoint`` holds what ``weights_only=True`` could not bring back."""
    unsafe = find_unsafe(checkpoint)
    if not unsafe:
        return
    shown = ", ".join(f"{place}: {_type_name(value)}" for place, value in unsafe[:5])
    more = f" and {len(unsafe) - 5} more" if len(unsafe) > 5 else ""
    raise CheckpointUnsafe(
        f"the checkpoint {path!r} was not written: it holds {shown}{more}, which could be loaded only by running code "
        "from the file. Store plain data instead (tensors, numbers, strings, lists, dicts: str(path), x.item(), "
        "asdict(config)), register the class with fulmen_checkpoint.register_serializer(...) or "
        "torch.serialization.add_safe_globals([...]), or use TorchCheckpointIO(allow_unsafe=True)."
    )


def _type_name(value: object) -> str:
    kind = type(value)
    if kind is bytes or kind is int:
        return "empty bytes" if kind is bytes else "an int of more than 2000 bits"
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
