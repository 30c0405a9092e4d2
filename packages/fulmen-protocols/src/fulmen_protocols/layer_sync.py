"""LayerSync: layers whose statistics are shared by the ranks of a run. Member names are Lightning's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerSync"]


@runtime_checkable
class LayerSync(Protocol):
    """Replaces layers of a model by ones that communicate, for a fit in several processes, and puts them back."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace layers in place and return the model. Called before the strategy places it."""
        ...

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo ``apply``, with what the layers have learned, and return the model."""
        ...
