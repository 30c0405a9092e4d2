"""SafetensorsCheckpointIO: one checkpoint in one safetensors file, without a pickle anywhere."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fulmen_checkpoint import _safetensors
from fulmen_checkpoint._fetch import storage_errors
from fulmen_checkpoint._tree import flatten
from fulmen_checkpoint.serializers import pack
from fulmen_checkpoint.storage import FsspecStorage
from fulmen_checkpoint.torch_io import TorchCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fulmen_protocols.storage import Storage

__all__ = ["SafetensorsCheckpointIO"]


class SafetensorsCheckpointIO:
    """Files that every reader of safetensors knows. Satisfies ``fulmen_protocols.CheckpointIO``.

    The tensors of ``state_dict`` have their own names there, those of optimizers and the rest longer ones
    (``optimizer_states.0.state.0.exp_avg``). Everything that is no tensor is JSON in the file's metadata, with a digest
    of the whole file. Tensors that share memory are written each for itself.

    Args:
        storage: where files live; by default every local path and every URL that fsspec knows.
        verify: compare each file with its digest before it is loaded.
        mmap: map files into memory instead of reading them; see ``TorchCheckpointIO``.
    """

    def __init__(self, storage: Storage | None = None, *, verify: bool = True, mmap: bool = True) -> None:
        self.storage: Storage = FsspecStorage() if storage is None else storage
        self._reader = TorchCheckpointIO(self.storage, verify=verify, mmap=mmap)

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write ``checkpoint`` so that ``path`` holds either the old content or all of the new, whatever happens.

        Raises:
            CheckpointUnsafe: an object in it is neither a tensor nor plain data; the message names its place.
            CheckpointError: the storage failed; ``path`` keeps what it held.
        """
        target = os.fspath(path)
        tree, tensors, _ = flatten(pack(checkpoint), target)
        storage = self.storage if storage_options is None else FsspecStorage(storage_options)
        with storage_errors(target, "written"), storage.write_atomic(target) as sink:
            _safetensors.write(sink, tensors, {"fulmen.tree": tree})

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read a whole checkpoint of any of our formats; see ``TorchCheckpointIO``.

        A safetensors file of someone else's gives ``{"state_dict": ...}``.
        """
        return self._reader.load_checkpoint(path, map_location, weights_only)

    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Return if every byte is as it was written; see ``TorchCheckpointIO.verify_checkpoint``."""
        self._reader.verify_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint. Removing what is not there is allowed."""
        self._reader.remove_checkpoint(path)

    def teardown(self) -> None:
        """Nothing is pending: every save is complete when it returns."""
