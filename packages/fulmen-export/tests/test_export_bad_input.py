"""Each thing that cannot be exported is one clear error, before anything is written."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulmen_export import AOTInductorExporter, OnnxExporter, TensorRTExporter, TorchExportExporter, TorchScriptExporter
from fulmen_protocols import BackendNotFound, BackendUnavailable, ExportError, MisconfigurationException, MissingPackage

X = torch.randn(3, 4)


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a decision on values
            return x
        return x * 2


class LeavesTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = x.detach().numpy() * 2  # out of torch
        return torch.from_numpy(doubled)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 4) + 1


class Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x @ x.T)  # ONNX has no such operation


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(3, 4)


def line_of(text: str) -> str:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return f"{__file__}:{next(number for number, line in enumerate(lines, 1) if text in line)}"


def told(error: type[BaseException], call: Callable[[], object]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(error) as caught:
            call()
    return str(caught.value)


def test_what_cannot_be_captured_is_named_with_its_line(tmp_path: Path) -> None:
    exporter, path = TorchExportExporter(), tmp_path / "net.pt2"

    decides = told(ExportError, lambda: exporter.export(Decides(), (X,), path))
    leaves = told(ExportError, lambda: exporter.export(LeavesTorch(), (X,), path))
    fixed = told(ExportError, lambda: exporter.export(FixedBatch(), (X,), path, dynamic_shapes="batch"))

    assert line_of("if x.sum() > 0:  # a decision") in decides
    assert "cannot export Decides: operation item" in decides
    assert "torch.where" in decides
    assert line_of("doubled = x.detach()") in leaves
    assert "numpy" in leaves
    assert "dynamic_shapes={'x': {0: 'batch'}} asks for sizes that forward fixes" in fixed
    assert "constant (3)" in fixed
    assert list(tmp_path.iterdir()) == []


def test_an_operation_that_onnx_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)

    text = told(ExportError, lambda: OnnxExporter().export(Eigen(), (X,), tmp_path / "net.onnx"))

    assert "exporter 'onnx' cannot export Eigen: operation aten.linalg_eig" in text
    assert line_of("return torch.linalg.eigvals(x @ x.T)") in text
    assert "custom_translation_table" in text
    assert list(tmp_path.iterdir()) == []


def test_what_torchscript_cannot_compile_is_named_with_its_line(tmp_path: Path) -> None:
    text = told(ExportError, lambda: TorchScriptExporter().export(LeavesTorch(), (X,), tmp_path / "net.pt"))

    assert line_of("doubled = x.detach()") in text
    assert "method='trace'" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{}, {"dynamic_shapes": "batch"}])
def test_an_artifact_that_computes_something_else_is_not_written(options: dict[str, Any], tmp_path: Path) -> None:
    class Drifts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + next(numbers)

    numbers = iter(range(100))
    text = told(ExportError, lambda: TorchExportExporter().export(Drifts(), (X,), tmp_path / "net.pt2", **options))

    assert "exporter 'torch_export': the artifact of Drifts computes something else than forward" in text
    assert "inputs of (3, 4)" in text
    assert "verify=False" in text
    assert list(tmp_path.iterdir()) == []

    TorchExportExporter().export(Random(), (X,), tmp_path / "net.pt2", verify=False)
    assert (tmp_path / "net.pt2").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_size_that_a_trace_baked_in_is_found_on_another_batch(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / len(x)  # the tracer takes the number

    exporter = TorchScriptExporter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = told(
            ExportError,
            lambda: exporter.export(Normed(), (X,), tmp_path / "a.pt", method="trace", dynamic_shapes="batch"),
        )
        exporter.export(Normed(), (X,), tmp_path / "b.pt", method="trace")

    assert "inputs of (6, 4)" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.pt"]


def test_an_error_of_forward_itself_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        TorchExportExporter().export(nn.Linear(5, 2), (X,), tmp_path / "net.pt2")

    assert not isinstance(caught.value, ExportError)
    assert "raised by Linear.forward itself" in caught.value.__notes__[0]


def test_a_sample_that_is_missing_or_does_not_fit_is_refused() -> None:
    exporter = TorchExportExporter()

    missing = told(MisconfigurationException, lambda: exporter.export(nn.Linear(4, 2)))
    tensor = told(MisconfigurationException, lambda: exporter.export(nn.Linear(4, 2), X))  # type: ignore[arg-type]
    extra = told(MisconfigurationException, lambda: exporter.export(nn.Linear(4, 2), (X,), kwargs={"bias": X}))

    assert "args=None and kwargs=None" in missing
    assert "Give a sample" in missing
    assert "args of type Tensor. Give a tuple" in tensor
    assert "unexpected keyword argument 'bias'" in extra
    assert "Give the arguments of forward" in extra


def test_dynamic_shapes_that_say_nothing_are_refused() -> None:
    exporter = TorchExportExporter()

    word = told(MisconfigurationException, lambda: exporter.export(nn.Linear(4, 2), (X,), dynamic_shapes="all"))
    name = told(MisconfigurationException, lambda: exporter.export(nn.Linear(4, 2), (X,), dynamic_shapes={"imput": 0}))

    assert "dynamic_shapes='all'" in word
    assert "'batch'" in word
    assert "'imput'" in name
    assert "Did you mean 'input'?" in name


def test_an_unknown_option_is_refused_with_the_closest_name() -> None:
    text = told(MisconfigurationException, lambda: TorchExportExporter().export(nn.Linear(4, 2), (X,), strickt=True))

    assert "strickt=True" in text
    assert "Did you mean 'strict'?" in text


def test_a_path_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("it ran")

    (tmp_path / "file").write_text("")
    exporter = TorchExportExporter()

    below = told(MisconfigurationException, lambda: exporter.export(Never(), (X,), tmp_path / "file" / "net.pt2"))
    folder = told(MisconfigurationException, lambda: exporter.export(Never(), (X,), tmp_path))
    number = told(MisconfigurationException, lambda: exporter.export(Never(), (X,), 3))  # type: ignore[arg-type]
    protocol = told(BackendNotFound, lambda: exporter.export(Never(), (X,), "nowhere://net.pt2"))

    assert repr(str(tmp_path / "file" / "net.pt2")) in below
    assert "is not a folder" in below
    assert "Choose a place that this process may write" in below
    assert "it is a folder. Give the name of a file" in folder
    assert "got 3 as its path" in number
    assert "'nowhere'" in protocol


def test_a_disk_that_fails_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"of yesterday")

    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    text = told(MisconfigurationException, lambda: TorchExportExporter().export(nn.Linear(4, 2), (X,), path))

    assert "No space left on device" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.pt2"]
    assert path.read_bytes() == b"of yesterday"


def test_several_files_do_not_fit_into_a_stream(tmp_path: Path) -> None:
    import io

    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    text = told(
        MisconfigurationException,
        lambda: OnnxExporter().export(nn.Linear(4, 2), (X,), io.BytesIO(), external_data=True),
    )

    assert "made 2 files" in text
    assert "Give a path" in text


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_what_installs_it(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == library else _found(name))  # type: ignore[arg-type]

    text = told(MissingPackage, lambda: OnnxExporter().export(nn.Linear(4, 2), (X,)))

    assert f"exporter 'onnx' needs {library}, which is not installed. Run: pip install 'fulmen[export]'" in text


def _found(name: str) -> ModuleType:
    import importlib.machinery

    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def test_contradicting_onnx_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, _found(name))
    exporter, layer, axes = OnnxExporter(), nn.Linear(4, 2), {"input": {0: "n"}}

    both = told(
        MisconfigurationException, lambda: exporter.export(layer, (X,), dynamic_shapes="batch", dynamic_axes=axes)
    )
    old = told(MisconfigurationException, lambda: exporter.export(layer, (X,), dynamic_shapes="batch", dynamo=False))
    empty = told(MisconfigurationException, lambda: exporter.export(layer, (X,), export_params=False))
    axis = told(MisconfigurationException, lambda: exporter.export(layer, (X,), dynamic_axes={"inptu": {0: "n"}}))

    assert "dynamic_shapes='batch' together with dynamic_axes. Give one of the two" in both
    assert "dynamic_shapes='batch' together with dynamo=False. Give dynamic_axes" in old
    assert "export_params=False and verify=True" in empty
    assert "Give verify=False too" in empty
    assert "dynamic_axes for 'inptu'" in axis
    assert "Did you mean 'input'?" in axis


def test_without_a_compiler_aoti_says_so(tmp_path: Path) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        text = told(
            BackendUnavailable, lambda: AOTInductorExporter().export(nn.Linear(4, 2), (X,), tmp_path / "net.pt2")
        )

    assert "tried 'no-such-compiler'" in text
    assert "Install g++ or clang++" in text
    assert "CXX" in text
    assert list(tmp_path.iterdir()) == []


def test_weights_without_values_are_refused() -> None:
    text = told(ExportError, lambda: TorchExportExporter().export(nn.Linear(4, 2, device="meta"), (X,)))

    assert "'weight' is on the meta device, without values" in text
    assert "load_from_checkpoint" in text


def test_an_unknown_method_of_torchscript_is_refused() -> None:
    text = told(
        MisconfigurationException,
        lambda: TorchScriptExporter().export(nn.Linear(4, 2), (X,), method="compile"),  # type: ignore[arg-type]
    )
    assert "method='compile'. It is 'script' or 'trace'" in text

    unsampled = told(MisconfigurationException, lambda: TorchScriptExporter().export(nn.Linear(4, 2), method="trace"))
    assert "args=None and kwargs=None" in unsampled


@pytest.mark.proves("7.3")
def test_tensorrt_without_its_library_or_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, layer = TensorRTExporter(), nn.Linear(4, 2).train()

    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)  # type: ignore[arg-type]
    missing = told(MissingPackage, lambda: exporter.export(layer, (X,)))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", _found("torch_tensorrt"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    no_gpu = told(BackendUnavailable, lambda: exporter.export(layer, (X,)))
    cpu = told(BackendUnavailable, lambda: exporter.export(layer, (X,), default_device="cpu"))
    script = told(MisconfigurationException, lambda: exporter.export(layer, (X,), "net.ts", ir="ts"))
    front = told(MisconfigurationException, lambda: exporter.export(layer, (X,), ir="fx"))  # type: ignore[arg-type]
    named = told(MisconfigurationException, lambda: exporter.export(layer, kwargs={"input": X}))

    assert "Run: pip install torch-tensorrt" in missing
    assert "needs a CUDA device" in no_gpu
    assert "is_available() is False" in no_gpu
    assert "default_device='cpu'" in cpu
    assert "ir='ts' and output_format='exported_program'. Give output_format='torchscript'" in script
    assert "ir='fx'. It is one of default, dynamo, ts" in front
    assert "kwargs=" in named
    assert layer.training
    assert next(layer.parameters()).device.type == "cpu"
