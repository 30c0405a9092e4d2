"""Upgrading files of old Lightning versions where they lie."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fulmen_checkpoint._fetch import not_found
from fulmen_checkpoint.migration import migrate
from fulmen_checkpoint.storage import FsspecStorage
from fulmen_checkpoint.torch_io import TorchCheckpointIO

__all__ = ["upgrade"]


def upgrade(path: str | os.PathLike[str], extension: str = ".ckpt") -> list[tuple[str, list[str]]]:
    """Bring local files to the layout of Lightning 2.6; what was there is kept beside as ``NAME.bak``.

    A ``.bak`` that is there already is the original of an earlier upgrade, and is never replaced. Files that need no
    change are left alone.

    Args:
        path: a file, or a folder that is searched with all it holds.
        extension: of the files in a folder.

    Returns:
        Each file, and the versions whose changes were applied to it.

    Raises:
        CheckpointNotFound: nothing is there.
        CheckpointError: a file cannot be read; those before it have been upgraded.
    """
    target = Path(path)
    if not target.exists():
        raise not_found(FsspecStorage(), os.fspath(path))
    files = [target] if target.is_file() else sorted(p for p in target.rglob(f"*{extension}") if p.is_file())
    return [(str(file), _upgrade(file)) for file in files]


def _upgrade(file: Path) -> list[str]:
    io = TorchCheckpointIO(migrate=False)
    checkpoint = io.load_checkpoint(file)
    applied = migrate(checkpoint, str(file))
    if applied:
        backup = file.with_suffix(".bak")
        if not backup.exists():
            shutil.copyfile(file, backup)
        io.save_checkpoint(checkpoint, file)
    return applied
