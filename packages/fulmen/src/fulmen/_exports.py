"""The export methods of a module: their names exist, and say what does the work until fulmen-export does."""

from __future__ import annotations

from typing import Any, NoReturn

from fulmen_protocols import MissingPackage

__all__ = ["Exports"]


class Exports:
    """``to_onnx``, ``to_torchscript`` and ``to_tensorrt``: refused, each with the call of torch that does the same."""

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Not there yet.

        Raises:
            MissingPackage: always, with what to install and to call.
        """
        self._refuse(
            "to_onnx",
            "pip install onnx onnxscript, then torch.onnx.export(model.eval(), args, path, dynamo=True)",
        )

    def to_torchscript(
        self, file_path: Any = None, method: str = "script", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """Not there yet.

        Raises:
            MissingPackage: always, with what to call.
        """
        self._refuse(
            "to_torchscript", "torch.export.export(model.eval(), args), or torch.jit.trace(model.eval(), args)"
        )

    def to_tensorrt(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Not there yet.

        Raises:
            MissingPackage: always, with what to install and to call.
        """
        self._refuse(
            "to_tensorrt", "pip install torch-tensorrt, then torch_tensorrt.compile(model.eval(), inputs=[...])"
        )

    def _refuse(self, method: str, instead: str) -> NoReturn:
        raise MissingPackage(
            f"{type(self).__name__}.{method}() needs an exporter, which fulmen does not have yet. "
            f"Use instead: {instead}."
        )
