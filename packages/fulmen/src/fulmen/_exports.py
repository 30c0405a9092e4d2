"""The export methods of a module. What writes a format is found by name; fulmen-export brings ours."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from fulmen._attached import AttachedModule
from fulmen._collection import move_to_device
from fulmen._module_hooks import DataHooks
from fulmen_protocols import EXPORTERS, MisconfigurationException, MissingPackage, available, load
from fulmen_protocols.discovery import forget

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from os import PathLike

    import torch
    from torch import nn
    from torch.jit import ScriptModule
    from torch.onnx import ONNXProgram

    from fulmen_protocols import Exporter

    Path = str | PathLike[str] | IO[bytes] | None

__all__ = ["Exports"]


class Exports:
    """``to_onnx``, ``to_torchscript`` and ``to_tensorrt``.

    What the three have in common: the module is exported in evaluation mode, and each submodule gets the mode back that
    it had. The sample goes through the transfer hooks, as a batch does. The artifact is run and compared with
    ``forward`` before it is written, in one step, to a path, a URL or a binary stream.
    """

    def to_onnx(self, file_path: Path = None, input_sample: Any = None, **kwargs: Any) -> ONNXProgram | None:
        """Export as ONNX.

        Args:
            file_path: path, URL or binary stream; None writes nothing.
            input_sample: a tensor; a tuple of positional arguments of ``forward``; or a dict, of keyword arguments if
                ``forward`` has them, otherwise its one argument. None: ``example_input_array``.
            kwargs: of the exporter, which are those of ``torch.onnx.export``: ``dynamic_shapes`` (``"batch"`` too),
                ``input_names``, ``opset_version``, ...; ``verify`` and ``tolerance`` of the comparison.

        Returns:
            The program; None with ``dynamo=False``, which takes torch's old exporter.

        Raises:
            MissingPackage: fulmen-export, onnx, onnxscript or onnxruntime is not installed.
            MisconfigurationException: there is no sample, or ``file_path`` cannot be written.
            ExportError: the module cannot be exported, or the artifact computes something else.
        """
        exporter = _exporter(self, "to_onnx", "onnx")
        sample = _sample(self, "to_onnx", "input_sample", input_sample)
        args, keywords = _arguments(self, sample)
        if kwargs.get("kwargs"):
            keywords = {**(keywords or {}), **_moved(self, kwargs["kwargs"])}
        options = {name: value for name, value in kwargs.items() if name != "kwargs"}
        program = exporter.export(cast("nn.Module", self), args, file_path, kwargs=keywords, **options)
        return cast("ONNXProgram | None", program)

    def to_torchscript(
        self,
        file_path: Path = None,
        method: Literal["script", "trace"] = "script",
        example_inputs: Any = None,
        **kwargs: Any,
    ) -> ScriptModule:
        """Export as TorchScript, which PyTorch has deprecated in favour of ``torch.export``.

        Args:
            file_path: path, URL or binary stream; None writes nothing.
            method: ``"script"`` compiles the source of ``forward``; ``"trace"`` records one run of it.
            example_inputs: as ``to_onnx``'s ``input_sample``. ``"script"`` only compares on it, and needs none.
            kwargs: of ``torch.jit.script`` or ``torch.jit.trace``; ``verify`` and ``tolerance`` of the comparison.

        Returns:
            The script module, in evaluation mode.

        Raises:
            MissingPackage: fulmen-export is not installed.
            MisconfigurationException: there is no sample to trace, ``method`` is none of the two, or ``file_path``
                cannot be written.
            ExportError: the module cannot be exported, or the artifact computes something else.
        """
        exporter = _exporter(self, "to_torchscript", "torchscript")
        optional = method == "script"
        sample = _sample(self, "to_torchscript", "example_inputs", example_inputs, optional=optional)
        args, keywords = (None, None) if sample is None else _arguments(self, sample)
        if kwargs.get("check_inputs") is not None:
            kwargs = {**kwargs, "check_inputs": [_transferred(self, one) for one in kwargs["check_inputs"]]}
        with _scripting():
            made = exporter.export(cast("nn.Module", self), args, file_path, kwargs=keywords, method=method, **kwargs)
        return cast("ScriptModule", made)

    def to_tensorrt(
        self,
        file_path: Path = None,
        input_sample: Any = None,
        ir: Literal["default", "dynamo", "ts"] = "default",
        output_format: Literal["exported_program", "torchscript"] = "exported_program",
        retrace: bool = False,
        default_device: str | torch.device = "cuda",
        **compile_kwargs: Any,
    ) -> Any:
        """Compile with TensorRT, on a CUDA device; the module is put back where it was.

        Args:
            file_path: path, URL or binary stream; None writes nothing.
            input_sample: as ``to_onnx``'s.
            ir: front end of the compiler; ``"ts"`` makes TorchScript.
            output_format: of the file.
            retrace: whether the file is made by tracing the compiled module anew.
            default_device: where a module that is not on CUDA is compiled.
            compile_kwargs: of ``torch_tensorrt.compile``; ``verify`` and ``tolerance`` of the comparison.

        Returns:
            The compiled module.

        Raises:
            MissingPackage: fulmen-export or torch_tensorrt is not installed.
            BackendUnavailable: there is no CUDA device.
            MisconfigurationException: there is no sample, or ``file_path`` cannot be written.
            ExportError: the module cannot be exported, or the artifact computes something else.
        """
        exporter = _exporter(self, "to_tensorrt", "tensorrt")
        args, keywords = _arguments(self, _sample(self, "to_tensorrt", "input_sample", input_sample))
        options = {"ir": ir, "output_format": output_format, "retrace": retrace, "default_device": default_device}
        module = cast("nn.Module", self)
        with _scripting(ir == "ts"):
            return exporter.export(module, args, file_path, kwargs=keywords, **options, **compile_kwargs)


def _exporter(module: object, method: str, name: str) -> Exporter:
    if name not in available(EXPORTERS):
        forget()  # in a notebook, perhaps it was installed a moment ago
    if name not in available(EXPORTERS):
        raise MissingPackage(
            f"{type(module).__name__}.{method}() needs the exporter {name!r}, and none is installed. "
            "Run: pip install 'fulmen[export]'"
        )
    return load(EXPORTERS, name)


def _sample(module: Any, method: str, flag: str, given: Any, *, optional: bool = False) -> Any:
    sample = module.example_input_array if given is None else given
    if sample is None:
        if optional:
            return None
        raise MisconfigurationException(
            f"{type(module).__name__}.{method}() runs forward once, and has nothing to run it on: {flag}=None and "
            f"example_input_array=None. Give {flag}=..., or set self.example_input_array."
        )
    return _transferred(module, sample)


def _transferred(module: Any, sample: Any) -> Any:
    """The sample after the transfer hooks, the datamodule's own before the module's, as in a run."""
    before, transfer, after = (
        _hook(module, name)
        for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )
    return after(transfer(before(sample, 0), module.device, 0), 0)


def _hook(module: Any, name: str) -> Any:
    datamodule: object = getattr(module._trainer, "datamodule", None)
    own = getattr(type(datamodule), name, None)
    return getattr(module if own is None or own is getattr(DataHooks, name) else datamodule, name)


def _moved(module: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return cast("dict[str, Any]", move_to_device(dict(values), module.device))


def _arguments(module: Any, sample: Any) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    """The positional and the keyword arguments that a sample stands for."""
    if isinstance(sample, dict):
        named = cast("dict[str, Any]", sample)
        try:
            inspect.signature(module.forward).bind(**named)
        except TypeError:
            return (named,), None  # a forward whose one argument is a dict
        return None, named
    if isinstance(sample, tuple):
        return tuple(cast("Iterable[Any]", sample)), None
    return (sample,), None


@contextmanager
def _scripting(active: bool = True) -> Generator[None]:
    # TorchScript reads every property of a module and its children; of the class, so that children know it too.
    AttachedModule._jit_is_scripting = active  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        AttachedModule._jit_is_scripting = False  # pyright: ignore[reportPrivateUsage]
