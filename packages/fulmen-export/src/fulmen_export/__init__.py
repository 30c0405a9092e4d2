"""Trained modules as artifacts that run without fulmen, each compared with the module before it is written."""

from fulmen_export.aoti import AOTInductorExporter
from fulmen_export.onnx import OnnxExporter
from fulmen_export.tensorrt import TensorRTExporter
from fulmen_export.torch_export import TorchExportExporter
from fulmen_export.torchscript import TorchScriptExporter

__all__ = [
    "AOTInductorExporter",
    "OnnxExporter",
    "TensorRTExporter",
    "TorchExportExporter",
    "TorchScriptExporter",
]
