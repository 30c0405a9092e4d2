"""From one format of checkpoints to another."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from fulmen_checkpoint.names import FORMATS
from fulmen_checkpoint.safetensors import SafetensorsCheckpointIO
from fulmen_checkpoint.storage import FsspecStorage
from fulmen_checkpoint.torch_io import TorchCheckpointIO
from fulmen_protocols.errors import CheckpointError, MisconfigurationException

if TYPE_CHECKING:
    from fulmen_checkpoint.names import Format
    from fulmen_protocols import CheckpointIO
    from fulmen_protocols.storage import Storage

__all__ = ["consolidate", "convert"]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Format | None = None,
    *,
    only_weights: bool = False,
    overwrite: bool = False,
    storage: Storage | None = None,
) -> None:
    """Write the checkpoint at ``source``, of whatever format, to ``target`` in the format ``to``.

    Args:
        source: a torch, Lightning or safetensors file, or a folder of ours or of ``torch.distributed.checkpoint``.
        target: a path or URL.
        to: None: safetensors for a name that ends so, else a torch file.
        only_weights: keep ``state_dict`` and drop the rest.
        overwrite: replace what is at ``target``.
        storage: where both live.

    Raises:
        MisconfigurationException: the format is unknown, or ``target`` is there already.
        CheckpointError: ``source`` cannot be read, or holds what the new format cannot keep.
    """
    where = FsspecStorage() if storage is None else storage
    path, out = os.fspath(source), os.fspath(target)
    chosen = to or ("safetensors" if out.endswith(".safetensors") else "torch")
    if chosen not in FORMATS:
        raise MisconfigurationException(f"to={to!r} is no format. There are: {', '.join(FORMATS)}.")
    if where.exists(out) and not overwrite:
        raise MisconfigurationException(
            f"{out!r} is there already. Choose another path, delete it first, or ask to overwrite it."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*carries no checksum")  # its advice is what is being done
        checkpoint = TorchCheckpointIO(where).load_checkpoint(path)
    if only_weights:
        if "state_dict" not in checkpoint:
            raise CheckpointError(
                f"{path!r} holds no 'state_dict' to keep: its keys are {', '.join(map(repr, checkpoint))}. Convert all "
                "of it instead."
            )
        checkpoint = {"state_dict": checkpoint["state_dict"]}
    _io(chosen, where).save_checkpoint(checkpoint, out)


def _io(to: Format, storage: Storage) -> CheckpointIO:
    if to == "sharded":
        from fulmen_checkpoint.sharded import ShardedCheckpointIO  # imports torch.distributed.checkpoint

        return ShardedCheckpointIO(storage)
    return SafetensorsCheckpointIO(storage) if to == "safetensors" else TorchCheckpointIO(storage)


def consolidate(
    folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, storage: Storage | None = None
) -> str:
    """Make one torch file of a folder of shards; returns its path, by default ``FOLDER.consolidated``.

    Raises:
        MisconfigurationException: ``folder`` is a file, or the output is there already.
        CheckpointError: ``folder`` is no whole checkpoint.
    """
    where = FsspecStorage() if storage is None else storage
    path = os.fspath(folder).rstrip("/")
    out = f"{path}.consolidated" if output is None else os.fspath(output)
    if where.exists(path) and not where.list(path):
        raise MisconfigurationException(
            f"{path!r} is no folder of shards. It can be loaded as it is, or converted with: fulmen checkpoint convert."
        )
    convert(path, out, "torch", storage=where)
    return out
