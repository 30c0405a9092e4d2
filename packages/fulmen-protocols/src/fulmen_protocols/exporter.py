"""Exporter: a trained module as an artifact that runs without fulmen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from os import PathLike

    from torch import nn

__all__ = ["Exporter"]


@runtime_checkable
class Exporter(Protocol):
    """Writes one artifact format."""

    def export(
        self, module: nn.Module, sample: tuple[object, ...], path: str | PathLike[str], **options: object
    ) -> object:
        """Write ``module``, traced with the positional arguments ``sample``, to ``path`` and return the program.

        The artifact's outputs are compared with the module's before this returns.
        """
        ...
