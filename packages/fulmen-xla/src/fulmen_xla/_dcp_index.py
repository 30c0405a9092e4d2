"""Reading torch.distributed.checkpoint's folders without running code from them: their index is a pickle."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path, PosixPath, WindowsPath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader

from fulmen_protocols.errors import CheckpointUnsafe

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["SafeReader"]

_CLASSES = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip


class SafeReader(FileSystemReader):
    """torch's reader of local folders, whose index may name the classes of such an index and nothing else."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._index = folder / ".metadata"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index.

        Raises:
            CheckpointUnsafe: it names something else.
        """
        with self._index.open("rb") as stream:
            found: Metadata = _Unpickler(stream).load()
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if module == metadata.__name__ and name in _CLASSES:
            return getattr(metadata, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo  # pyright: ignore[reportPrivateUsage]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return cast("Any", torch.serialization)._get_layout
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return PosixPath if name == "PosixPath" else WindowsPath
        raise CheckpointUnsafe(
            f"the index of a checkpoint names {module}.{name}, which no index of torch.distributed.checkpoint holds. "
            "It was not read."
        )
