"""Folders of formats that this package does not know, read by a registered checkpoint IO that does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen_checkpoint._directory import TORCH_INDEX
from fulmen_checkpoint.names import MANIFEST
from fulmen_protocols import (
    CHECKPOINT_IOS,
    RecognisesFolders,
    SupportsVerification,
    available,
    load,
    load_factory,
)

if TYPE_CHECKING:
    from fulmen_protocols import CheckpointIO
    from fulmen_protocols.storage import Storage

__all__ = ["reader_of", "verify"]


def reader_of(storage: Storage, path: str) -> CheckpointIO | None:
    """The checkpoint IO that recognises the folder ``path``; None where there is none, or the folder is of ours."""
    names = {entry.rstrip("/").rpartition("/")[2] for entry in storage.list(path)}
    if not names or MANIFEST in names or TORCH_INDEX in names:
        return None
    for name in available(CHECKPOINT_IOS):
        try:
            factory = load_factory(CHECKPOINT_IOS, name)
        except ImportError:  # whoever asks for it by name is told
            continue
        if isinstance(factory, RecognisesFolders) and factory.recognises(names):
            return load(CHECKPOINT_IOS, name)
    return None


def verify(reader: CheckpointIO, path: str) -> None:
    """Let ``reader`` say whether the folder is whole; one that cannot tell loads it."""
    if isinstance(reader, SupportsVerification):
        reader.verify_checkpoint(path)
    else:
        reader.load_checkpoint(path)
