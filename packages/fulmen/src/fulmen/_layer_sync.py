"""Layers of a fit that communicate: by the user's LayerSync plugin, of which torch's synchronised batch norm is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._preparation import give_back_batch_norms, synchronise_batch_norms
from fulmen.states import TrainerFn
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from torch import nn

    from fulmen._session import Session

__all__ = ["TorchSyncBatchNorm", "apply", "revert"]


class TorchSyncBatchNorm:
    """Batch norm over all ranks, as a plugin: the same as ``sync_batchnorm=True``. The name is Lightning's."""

    def __init__(self) -> None:
        self._replaced: dict[str, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace every batch norm of ``model``, in place."""
        self._replaced = synchronise_batch_norms(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the model's own layers back, with what they have learned."""
        give_back_batch_norms(model, self._replaced)
        self._replaced = {}
        return model


def apply(session: Session) -> None:
    """Let the plugin replace layers, before the strategy places the module: in a fit of several processes.

    Raises:
        MisconfigurationException: the plugin made another module instead.
    """
    plugin = session.assembly.layer_sync
    if plugin is None or session.world.world_size == 1 or session.fn is not TrainerFn.FITTING:
        return
    session.is_layer_synced = True
    if plugin.apply(session.module) is not session.module:
        raise MisconfigurationException(
            f"{type(plugin).__name__}.apply() returned another module than the one it was given. Replace layers inside "
            "the module, in place, and return it."
        )


def revert(session: Session) -> None:
    """Undo ``apply``."""
    plugin = session.assembly.layer_sync
    if plugin is not None and session.is_layer_synced:
        session.is_layer_synced = False
        plugin.revert(session.module)
