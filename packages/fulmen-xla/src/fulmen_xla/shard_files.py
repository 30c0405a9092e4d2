"""XLAShardFilesIO: a folder to which every rank writes a file with what it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fulmen_protocols.errors import CheckpointError, CheckpointNotFound
from fulmen_xla.checkpoint_io import XLACheckpointIO
from fulmen_xla.collectives import XLACollectives

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fulmen_protocols.checkpoint_io import CheckpointIO

__all__ = ["XLAShardFilesIO"]


class XLAShardFilesIO:
    """``checkpoint_rank-00000000-of-00000004.pth`` and so on: names that torch-xla's own tools know.

    Each rank reads its own file again, on as many ranks as wrote them.

    Args:
        checkpoint_io: writes one file; None: the one that is registered as ``"torch"``.
        sequential: ranks of a host write one after the other.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None, *, sequential: bool = False) -> None:
        self._file = XLACheckpointIO(checkpoint_io)
        self._sequential = sequential

    def save_sharded(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write this rank's file; called by every rank.

        Raises:
            CheckpointError: the folder is there and holds something.
        """
        folder, ranks = Path(os.fspath(path)), XLACollectives()
        found = ranks.broadcast_object(_content(folder))
        if found:
            raise CheckpointError(
                f"the checkpoint {str(folder)!r} was not written: something is there already ({found}). Choose another "
                "path, or remove it."
            )
        ranks.barrier("folder")
        for turn in range(ranks.world_size if self._sequential else 1):
            if not self._sequential or turn == ranks.rank:
                self._file.save_checkpoint(checkpoint, folder / _name(ranks), storage_options)
            ranks.barrier(f"shards {turn}")

    def load_sharded(self, path: str | os.PathLike[str], into: Mapping[str, object]) -> dict[str, object]:
        """Read this rank's file; ``into`` is not needed, as a rank reads what it wrote."""
        return self.load_checkpoint(path)

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write one file, from this rank alone."""
        self._file.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read this rank's file of a folder, or a whole file.

        Raises:
            CheckpointNotFound: another number of ranks wrote the folder.
        """
        folder = Path(os.fspath(path))
        if not folder.is_dir() or not list(folder.glob("checkpoint_rank-*.pth")):
            return self._file.load_checkpoint(path, map_location, weights_only)
        file = folder / _name(XLACollectives())
        if not file.exists():
            found = ", ".join(sorted(one.name for one in folder.glob("checkpoint_rank-*.pth"))[:4])
            raise CheckpointNotFound(
                f"{str(folder)!r} has no {file.name}, this rank's part; it has {found}. Load it with as many devices "
                "as saved it, or save with state_dict_type='full'."
            )
        return self._file.load_checkpoint(file, map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the file or folder. Removing what is not there is allowed."""
        self._file.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the other IO finish."""
        self._file.teardown()


def _content(folder: Path) -> str:
    if folder.is_file():
        return "a file"
    return ", ".join(sorted(one.name for one in folder.iterdir())[:3]) if folder.is_dir() else ""


def _name(ranks: XLACollectives) -> str:
    return f"checkpoint_rank-{ranks.rank:08d}-of-{ranks.world_size:08d}.pth"
