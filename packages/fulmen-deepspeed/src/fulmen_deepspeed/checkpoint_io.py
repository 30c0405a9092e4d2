"""DeepSpeedCheckpointIO: reads the folders that DeepSpeed's engine has written, as one plain checkpoint."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import torch

from fulmen_deepspeed import _folder
from fulmen_deepspeed.consolidation import consolidated
from fulmen_protocols.errors import CheckpointError, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from os import PathLike

__all__ = ["DeepSpeedCheckpointIO"]


class DeepSpeedCheckpointIO:
    """Reads DeepSpeed's folders where one process wants one checkpoint: ``load_from_checkpoint``, consolidation.

    It writes nothing: that takes the engine and all its ranks, which is what ``DeepSpeedStrategy`` does.
    """

    @staticmethod
    def recognises(names: Collection[str]) -> bool:
        """Whether a folder with these entries is one of DeepSpeed's."""
        return _folder.looks_like_folder_of_engine(names)

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Refuse.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{os.fspath(path)!r} cannot be written by DeepSpeedCheckpointIO: only the engine writes such folders, on "
            "every rank. Use strategy='deepspeed', or another checkpoint IO."
        )

    def load_checkpoint(
        self,
        path: str | PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """The whole model in float32 under ``state_dict``, and what the run saved beside it; no optimizer state.

        Raises:
            MissingPackage: DeepSpeed is not installed.
            CheckpointError: there is no whole checkpoint, or it would have to run code.
        """
        target = os.fspath(path)
        if "://" in target and not target.startswith("file://"):
            raise MisconfigurationException(
                f"{target!r} is a folder of DeepSpeed's on a remote storage, which its library cannot read. Copy it to "
                "a local path first."
            )
        checkpoint = consolidated(target.removeprefix("file://"), weights_only=weights_only)
        if map_location is not None and torch.device(map_location) != torch.device("cpu"):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {
                name: value.to(map_location) if isinstance(value, torch.Tensor) else value
                for name, value in state.items()
            }
        return checkpoint

    def verify_checkpoint(self, path: str | PathLike[str]) -> None:
        """Return if every file is there as it was written; raises ``CheckpointError`` otherwise."""
        _folder.check_whole(os.fspath(path).removeprefix("file://"))

    def remove_checkpoint(self, path: str | PathLike[str]) -> None:
        """Delete the folder. Removing what is not there is allowed."""
        target = os.fspath(path)
        if os.path.isdir(target):
            shutil.rmtree(target)
        elif os.path.lexists(target):
            os.remove(target)

    def teardown(self) -> None:
        """Nothing is pending."""
