"""torch.export: a .pt2 archive that plain torch loads, in Python or for further compilers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_export._capture import capture, quiet
from fulmen_export._compare import agree
from fulmen_export._destination import Target, staged
from fulmen_export._eager import Eager
from fulmen_export._inputs import Inputs, tensors_in
from fulmen_export._shapes import Shapes, other_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.export import ExportedProgram

__all__ = ["TorchExportExporter"]

_WHAT = "exporter 'torch_export'"


class TorchExportExporter:
    """Writes what ``torch.export.save`` writes. Load it with ``torch.export.load(path).module()``."""

    def export(
        self,
        module: nn.Module,
        args: tuple[object, ...] | None = None,
        path: Target = None,
        *,
        kwargs: Mapping[str, object] | None = None,
        dynamic_shapes: object = None,
        verify: bool = True,
        tolerance: float = 1e-5,
        **options: Any,
    ) -> ExportedProgram:
        """See ``fulmen_protocols.Exporter.export``.

        Options of its own:
            verify: whether to load the archive and to compare it with the module before it is written.
            tolerance: largest difference, relative to the largest magnitude in an output, or to 1 if that is smaller.
            options: of ``torch.export.export``: ``strict`` and so on.
        """
        inputs = Inputs.of(_WHAT, module, args, kwargs)
        shapes = Shapes(_WHAT, inputs, dynamic_shapes)
        with staged(_WHAT, path, "model.pt2") as file, Eager(_WHAT, module) as eager, quiet():
            eager.outputs(inputs)  # an error of forward's own comes as it is, not as torch.export tells it
            program = capture(_WHAT, module, inputs, shapes, options)
            # torch.export.save wants its own ending; the artifact may have any name.
            with open(file, "wb") as stream:
                torch.export.save(program, stream)
            if verify:
                with open(file, "rb") as stream:
                    loaded = cast("Any", torch.export.load(stream).module())
                samples = [inputs, other_sizes(program, shapes.at_least_two(inputs))]
                agree(_WHAT, eager, lambda own: tensors_in(loaded(*own.args, **own.kwargs)), samples, tolerance)
        return program
