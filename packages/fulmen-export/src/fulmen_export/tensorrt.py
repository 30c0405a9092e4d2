"""TensorRT, through torch_tensorrt: engines for NVIDIA GPUs."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from fulmen_export._compare import agree
from fulmen_export._destination import Target, staged
from fulmen_export._eager import Eager
from fulmen_export._inputs import Inputs, tensors_in
from fulmen_export._optional import need
from fulmen_export._refusal import unexportable
from fulmen_protocols.errors import BackendUnavailable, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

__all__ = ["TensorRTExporter"]

_WHAT = "exporter 'tensorrt'"
_ADVICE = "torch_tensorrt's settings say what it may leave to PyTorch (torch_executed_ops)."
_IRS = ("default", "dynamo", "ts")
_FORMATS = ("exported_program", "torchscript")


class TensorRTExporter:
    """Compiles with ``torch_tensorrt.compile``, writes what ``torch_tensorrt.save`` does; needs a CUDA device."""

    def export(
        self,
        module: nn.Module,
        args: tuple[object, ...] | None = None,
        path: Target = None,
        *,
        kwargs: Mapping[str, object] | None = None,
        dynamic_shapes: object = None,
        ir: Literal["default", "dynamo", "ts"] = "default",
        output_format: Literal["exported_program", "torchscript"] = "exported_program",
        retrace: bool = False,
        default_device: str | torch.device = "cuda",
        verify: bool = True,
        tolerance: float = 1e-2,
        **options: Any,
    ) -> Any:
        """See ``fulmen_protocols.Exporter.export``; returns the compiled module.

        Options of its own:
            kwargs: not there: TensorRT engines take positional arguments.
            dynamic_shapes: not there: give ``inputs=[torch_tensorrt.Input(min_shape=..., ...)]``.
            ir: the compiler's front end.
            output_format: of the file; ``ir="ts"`` makes TorchScript only.
            retrace: whether the file is made by tracing the compiled module anew.
            default_device: where a module that is not on CUDA is compiled.
            verify: whether to run the compiled module, and to compare it, before it is written.
            tolerance: as for the other formats. Engines compute in TensorFloat-32 by default, which keeps 10 bits.
            options: of ``torch_tensorrt.compile``.

        Raises:
            MissingPackage: torch_tensorrt is not installed.
            BackendUnavailable: there is no CUDA device.
        """
        library = cast("Any", need("torch_tensorrt", _WHAT, "torch-tensorrt (or 'fulmen-export[tensorrt]')"))
        for name, value, allowed in (("ir", ir, _IRS), ("output_format", output_format, _FORMATS)):
            if value not in allowed:
                raise MisconfigurationException(f"{_WHAT} got {name}={value!r}. It is one of {', '.join(allowed)}.")
        if ir == "ts" and path is not None and output_format != "torchscript":
            raise MisconfigurationException(
                f"{_WHAT} got ir='ts' and output_format={output_format!r}. Give output_format='torchscript'."
            )
        if kwargs or dynamic_shapes is not None:
            raise MisconfigurationException(
                f"{_WHAT} got kwargs={kwargs!r} and dynamic_shapes={dynamic_shapes!r}. Give positional arguments, and "
                "other sizes as inputs=[torch_tensorrt.Input(min_shape=..., opt_shape=..., max_shape=...)]."
            )
        inputs = Inputs.of(_WHAT, module, args, kwargs)
        home = next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))
        device = home if home.type == "cuda" else torch.device(default_device)
        if device.type != "cuda" or not torch.cuda.is_available():
            raise BackendUnavailable(
                f"{_WHAT} needs a CUDA device; the module is on {str(home)!r}, default_device={str(default_device)!r}, "
                f"and torch.cuda.is_available() is {torch.cuda.is_available()}. Run it on a machine with an NVIDIA GPU."
            )
        with staged(_WHAT, path, "model.ep") as file:
            module.to(device)
            try:
                with Eager(_WHAT, module) as eager:
                    sample = inputs.mapped(lambda tensor: tensor.to(device))
                    given = {"inputs": list(sample.copied().args), **options}
                    try:
                        compiled = library.compile(module, ir=ir, **given)
                    # The compiler raises anything.
                    except Exception as error:
                        raise unexportable(_WHAT, module, error, _ADVICE) from error
                    if verify:
                        agree(_WHAT, eager, lambda own: _run(compiled, own), [sample], tolerance)
                    if path is not None:
                        _save(library, compiled, file, list(sample.args), ir, output_format, retrace)
            finally:
                module.to(home)
        return compiled


def _run(compiled: Any, inputs: Inputs) -> list[Tensor]:
    return tensors_in(compiled(*inputs.args))


def _save(
    library: Any, compiled: Any, file: Path, sample: list[object], ir: str, output_format: str, retrace: bool
) -> None:
    if ir == "ts":  # torch_tensorrt.save does not take script modules (pytorch/TensorRT#3775)
        torch.jit.save(compiled, str(file))
    else:
        library.save(compiled, str(file), inputs=sample, output_format=output_format, retrace=retrace)
