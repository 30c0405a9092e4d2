"""Exporter: a trained module as an artifact that runs without fulmen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from typing import IO, Any

    from torch import nn

__all__ = ["Exporter"]


@runtime_checkable
class Exporter(Protocol):
    """Writes one artifact format."""

    def export(
        self,
        module: nn.Module,
        args: tuple[object, ...] | None = None,
        path: str | PathLike[str] | IO[bytes] | None = None,
        *,
        kwargs: Mapping[str, object] | None = None,
        dynamic_shapes: object = None,
        **options: Any,
    ) -> object:
        """Write ``module``, in evaluation mode, to ``path`` and return the program.

        The artifact is run, and its outputs are compared with the module's, before anything appears at ``path``: on an
        error the path keeps what it held. The module is left as it was: modes, weights, buffers, gradients, device.

        Args:
            module: on one device, not sharded.
            args: positional arguments of ``forward``, a sample to capture and to compare with. None together with
                ``kwargs=None``: there is no sample, which a format that captures by running refuses.
            path: where to: a path, any fsspec URL, a binary stream; None writes nothing.
            kwargs: keyword arguments of ``forward``, of the same sample.
            dynamic_shapes: None: the sample's shapes are the only ones; ``"batch"``: the first dimension of every
                tensor may have any size; otherwise what ``torch.export.export`` takes under this name, where a text
                in place of a ``Dim`` names a dynamic dimension. The artifact is compared on other sizes too.
            options: of this format.

        Raises:
            ExportError: the module cannot be exported, or the artifact computes something else.
            MisconfigurationException: bad arguments; no sample; ``path`` cannot be written.
            MissingPackage, BackendUnavailable: a library, a compiler or a device is not there.
        """
        ...
