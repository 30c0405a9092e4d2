"""The conformance kit on every exporter of this package that runs without an NVIDIA GPU."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from fulmen_conformance import ExporterConformance
from fulmen_export import AOTInductorExporter, OnnxExporter, TorchExportExporter, TorchScriptExporter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fulmen_protocols import Exporter

    Run = Callable[[Path, Tensor], Tensor]


class TestTorchExportExporter(ExporterConformance):
    @pytest.fixture
    def exporter(self) -> Exporter:
        return TorchExportExporter()

    @pytest.fixture
    def run(self) -> Run:
        def run(path: Path, x: Tensor) -> Tensor:
            with path.open("rb") as stream:
                return torch.export.load(stream).module()(x).detach()

        return run


class TestOnnxExporter(ExporterConformance):
    @pytest.fixture
    def exporter(self) -> Exporter:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library)
        return OnnxExporter()

    @pytest.fixture
    def run(self) -> Run:
        def run(path: Path, x: Tensor) -> Tensor:
            session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
            (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            return torch.from_numpy(output)

        return run


@pytest.mark.slow  # a C++ compiler runs for each export
@pytest.mark.timeout(1500)
class TestAOTInductorExporter(ExporterConformance):
    @pytest.fixture
    def exporter(self) -> Exporter:
        return AOTInductorExporter()

    @pytest.fixture
    def run(self) -> Run:
        def run(path: Path, x: Tensor) -> Tensor:
            return torch._inductor.aoti_load_package(str(path))(x)

        return run


class TorchScript(ExporterConformance):
    @pytest.fixture
    def exporter(self) -> Exporter:
        return TorchScriptExporter()

    @pytest.fixture
    def run(self) -> Run:
        def run(path: Path, x: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
                return torch.jit.load(str(path))(x).detach()

        return run


@pytest.mark.filterwarnings("ignore:PyTorch has deprecated TorchScript:DeprecationWarning")
class TestTorchScriptByTrace(TorchScript):
    @pytest.fixture
    def options(self) -> dict[str, object]:
        return {"method": "trace"}


@pytest.mark.filterwarnings("ignore:PyTorch has deprecated TorchScript:DeprecationWarning")
class TestTorchScriptBySource(TorchScript):
    @pytest.fixture
    def options(self) -> dict[str, object]:
        return {"method": "script"}
