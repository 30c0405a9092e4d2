"""Trained modules as artifacts that run without fulmen, each compared with the module before it is written.

Each name is imported when it is first used, so that ``fulmen --help`` need not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen_export.aoti import AOTInductorExporter as AOTInductorExporter
    from fulmen_export.onnx import OnnxExporter as OnnxExporter
    from fulmen_export.tensorrt import TensorRTExporter as TensorRTExporter
    from fulmen_export.torch_export import TorchExportExporter as TorchExportExporter
    from fulmen_export.torchscript import TorchScriptExporter as TorchScriptExporter

_HOME = {
    "AOTInductorExporter": "aoti",
    "OnnxExporter": "onnx",
    "TensorRTExporter": "tensorrt",
    "TorchExportExporter": "torch_export",
    "TorchScriptExporter": "torchscript",
}

__all__ = [
    "AOTInductorExporter",
    "OnnxExporter",
    "TensorRTExporter",
    "TorchExportExporter",
    "TorchScriptExporter",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _HOME:
        value: object = getattr(import_module(f"fulmen_export.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fulmen_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
