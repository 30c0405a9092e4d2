"""XLACheckpointIO: brings a checkpoint's tensors to the host in one go, and lets another IO write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen_protocols.discovery import load
from fulmen_protocols.seams import CHECKPOINT_IOS
from fulmen_xla._host import to_host
from fulmen_xla._library import require

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    import torch

    from fulmen_protocols.checkpoint_io import CheckpointIO

__all__ = ["XLACheckpointIO"]


class XLACheckpointIO:
    """Writes what ``xm.save`` would: all tensors on the CPU, so that any machine can read the file.

    The file itself is another IO's work, with its format, its commit protocol and its storages.

    Args:
        checkpoint_io: writes and reads; None: the one that is registered as ``"torch"``.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        require("XLACheckpointIO")
        self.checkpoint_io: CheckpointIO | None = checkpoint_io

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Run what is recorded, bring every tensor to the host, and write."""
        self._writer().save_checkpoint(to_host(checkpoint), path, storage_options)

    def load_checkpoint(
        self,
        path: str | PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read; tensors go to ``map_location`` (None: CPU)."""
        return self._writer().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | PathLike[str]) -> None:
        """Delete. Removing what is not there is allowed."""
        self._writer().remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the other IO finish."""
        if self.checkpoint_io is not None:
            self.checkpoint_io.teardown()

    def verify_checkpoint(self, path: str | PathLike[str]) -> None:
        """Return if the checkpoint is whole; where the other IO cannot tell, if it can be read."""
        writer: Any = self._writer()
        if hasattr(writer, "verify_checkpoint"):
            writer.verify_checkpoint(path)
        else:
            writer.load_checkpoint(path)

    def _writer(self) -> CheckpointIO:
        if self.checkpoint_io is None:
            self.checkpoint_io = load(CHECKPOINT_IOS, "torch")
        return self.checkpoint_io
