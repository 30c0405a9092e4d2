"""ONNX: torch's own exporter, and a run of the result in onnxruntime before it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from fulmen_export._capture import capture, quiet
from fulmen_export._compare import agree
from fulmen_export._destination import Target, staged
from fulmen_export._eager import Eager
from fulmen_export._inputs import Inputs
from fulmen_export._optional import need, only_options_of, require
from fulmen_export._refusal import unexportable
from fulmen_export._shapes import Shapes, other_sizes
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import nn
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

__all__ = ["OnnxExporter"]

_WHAT = "exporter 'onnx'"
_INSTALL = "'fulmen[export]' (or 'fulmen-export[onnx]')"
_OURS = ("model", "args", "f", "kwargs", "dynamo", "dynamic_shapes", "verify")
_ADVICE = (
    "Compute it from operations that ONNX has, or translate it: custom_translation_table={torch.ops...: function}."
)
_OLD_ADVICE = "The exporter of dynamo=False knows fewer operations than that of dynamo=True, the default."


class _Session(Protocol):
    """``onnxruntime.InferenceSession``, as far as it is used."""

    def get_inputs(self) -> Sequence[Any]: ...
    def run(self, output_names: None, input_feed: Mapping[str, object]) -> Sequence[Any]: ...


class OnnxExporter:
    """Writes an ONNX model, runs it in onnxruntime and compares it with the module."""

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
        dynamo: bool = True,
        dynamic_axes: Mapping[str, object] | None = None,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        export_params: bool = True,
        keep_initializers_as_inputs: bool = False,
        external_data: bool = False,
        **options: Any,
    ) -> ONNXProgram | None:
        """See ``fulmen_protocols.Exporter.export``.

        Options of its own:
            verify: whether to run the model in onnxruntime, on the CPU, and to compare before it is written.
            tolerance: largest difference, relative to the largest magnitude in an output, or to 1 if that is smaller.
            dynamo: False takes torch's old exporter, built on TorchScript, which returns no program.
            dynamic_axes: the older way to say ``dynamic_shapes``: names of inputs to dimensions, which may be named.
            input_names: of the model's inputs; otherwise those of ``forward``'s parameters.
            output_names: of the model's outputs.
            export_params: False leaves the weights out; such a model cannot be run, so it needs ``verify=False``.
            keep_initializers_as_inputs: whether the weights are also inputs of the model.
            external_data: whether the weights go to a file of their own, ``PATH.data``; above 2 GB they always do.
            options: of ``torch.onnx.export``: ``opset_version``, ``custom_translation_table`` and so on.

        Returns:
            The program; None with ``dynamo=False``.

        Raises:
            MissingPackage: onnx, onnxscript or onnxruntime is not installed.
        """
        for library in ("onnx", "onnxscript", *(("onnxruntime",) if verify else ())):
            require(library, _WHAT, _INSTALL)
        only_options_of(cast("Callable[..., object]", torch.onnx.export), options, _WHAT, without=_OURS)
        if verify and not export_params:
            raise MisconfigurationException(
                f"{_WHAT} got export_params=False and verify=True: a model without weights cannot be run and compared. "
                "Give verify=False too."
            )
        inputs = Inputs.of(_WHAT, module, args, kwargs)
        shapes = _shapes(inputs, dynamic_shapes, dynamic_axes, dynamo, input_names, output_names)
        names = {"input_names": input_names, "output_names": output_names, "export_params": export_params}
        kept = {"keep_initializers_as_inputs": keep_initializers_as_inputs}
        with staged(_WHAT, path, "model.onnx") as file, Eager(_WHAT, module) as eager, quiet():
            eager.outputs(inputs)  # an error of forward's own comes as it is
            if dynamo:
                captured = capture(_WHAT, module, inputs, shapes)
                program = _translated(module, captured, shapes, {**names, **options})
                program.save(file, include_initializers=export_params, external_data=external_data, **cast("Any", kept))
                other = other_sizes(captured, shapes.at_least_two(inputs))
            else:
                program = None
                _old_export(module, inputs, file, {**names, **kept, "dynamic_axes": dynamic_axes, **options})
                other = shapes.grown(inputs)
            if verify:
                agree(_WHAT, eager, _runner(file), [inputs, other], tolerance)
        return program


def _shapes(
    inputs: Inputs,
    dynamic_shapes: object,
    dynamic_axes: Mapping[str, object] | None,
    dynamo: bool,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Shapes:
    if dynamic_shapes is not None and (dynamic_axes is not None or not dynamo):
        found = "dynamic_axes" if dynamic_axes is not None else "dynamo=False"
        raise MisconfigurationException(
            f"{_WHAT} got dynamic_shapes={dynamic_shapes!r} together with {found}. "
            f"Give {'one of the two' if dynamic_axes is not None else 'dynamic_axes to the old exporter'}."
        )
    if dynamic_axes is not None:
        return Shapes.of_axes(_WHAT, inputs, dynamic_axes, input_names or (), output_names or ())
    return Shapes(_WHAT, inputs, dynamic_shapes)


def _translated(
    module: nn.Module, captured: ExportedProgram, shapes: Shapes, options: Mapping[str, object]
) -> ONNXProgram:
    settings = {"verbose": False, "dynamic_shapes": shapes.names(), **options}
    try:
        return cast("ONNXProgram", torch.onnx.export(captured, (), dynamo=True, **cast("Any", settings)))
    # Translators, of torch and of users, raise anything.
    except Exception as error:
        raise unexportable(_WHAT, module, error, _ADVICE, captured) from error


def _old_export(module: nn.Module, inputs: Inputs, file: Path, options: Mapping[str, object]) -> None:
    sample = inputs.copied()
    try:
        torch.onnx.export(
            module, sample.args, str(file), kwargs=dict(sample.kwargs), dynamo=False, **cast("Any", options)
        )
    except Exception as error:
        raise unexportable(_WHAT, module, error, _OLD_ADVICE) from error


def _runner(file: Path) -> Callable[[Inputs], list[Tensor]]:
    runtime = cast("Any", need("onnxruntime", _WHAT, _INSTALL))
    session: _Session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> list[Tensor]:
        tensors = inputs.tensors()
        names = [entry.name for entry in session.get_inputs()][: len(tensors)]
        if len(names) < len(tensors):
            raise ValueError(
                f"the model has {len(names)} inputs for {len(tensors)} tensors: forward does not use some of them"
            )
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run
