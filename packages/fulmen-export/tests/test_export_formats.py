"""Every format on the usual kinds of network, run outside of fulmen on sizes that the sample did not have."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fulmen_export import AOTInductorExporter, OnnxExporter, TorchExportExporter, TorchScriptExporter


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)
        for _ in range(3):  # running statistics of their own
            self.norm(self.conv(torch.randn(4, 3, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lstm(self.table(ids))[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.attention(x, context, context, need_weights=False)[0]


class Collections(nn.Module):
    """A dict and a tuple in, a dict of a tensor and a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        hidden = self.layer(batch["x"]) * batch["scale"]
        return {"hidden": hidden, "pair": (hidden + pair[0], hidden - pair[1])}


class Named(nn.Module):
    """Dicts as TorchScript knows them: all values of one type."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": batch["x"] + batch["y"], "product": batch["x"] * batch["y"]}


def mlp(n: int) -> tuple[Any, ...]:
    return (torch.randn(n, 4),)


def images(n: int) -> tuple[Any, ...]:
    return (torch.randn(n, 3, 8, 8),)


def ids(n: int) -> tuple[Any, ...]:
    return (torch.randint(0, 11, (n, 7)),)


def sequences(n: int) -> tuple[Any, ...]:
    return torch.randn(n, 5, 8), torch.randn(n, 9, 8)


def nested(n: int) -> tuple[Any, ...]:
    return {"x": torch.randn(n, 4), "scale": torch.rand(n, 1)}, (torch.randn(n, 4), torch.randn(n, 4))


def named(n: int) -> tuple[Any, ...]:
    return ({"x": torch.randn(n, 4), "y": torch.randn(n, 4)},)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]] = {
    "MLP": (MLP, mlp),
    "convolution and batch norm": (Convolution, images),
    "LSTM": (Recurrent, ids),
    "attention": (Attention, sequences),
    "dicts and tuples": (Collections, nested),
}
cases = pytest.mark.parametrize(("make", "inputs"), CASES.values(), ids=CASES.keys())


def equals_the_module(run: Callable[..., Any], module: nn.Module, inputs: Callable[[int], tuple[Any, ...]]) -> None:
    module.eval()
    for size in (1, 3, 8):
        sample = inputs(size)
        got = [leaf for leaf in pytree.tree_leaves(run(*sample)) if isinstance(leaf, Tensor)]
        expected = pytree.tree_leaves(module(*sample))
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.proves("7.7")
@cases
def test_torch_export_archives_run_in_plain_torch(
    make: Callable[[], nn.Module], inputs: Callable[[int], tuple[Any, ...]], tmp_path: Path
) -> None:
    module = make()

    program = TorchExportExporter().export(module, inputs(3), tmp_path / "net.pt2", dynamic_shapes="batch")

    assert isinstance(program, torch.export.ExportedProgram)
    equals_the_module(torch.export.load(tmp_path / "net.pt2").module(), module, inputs)


@cases
def test_onnx_models_run_in_onnxruntime_on_other_batch_sizes(
    make: Callable[[], nn.Module], inputs: Callable[[int], tuple[Any, ...]], tmp_path: Path
) -> None:
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    runtime = pytest.importorskip("onnxruntime")
    module = make()

    program = OnnxExporter().export(module, inputs(3), tmp_path / "net.onnx", dynamic_shapes="batch")

    assert isinstance(program, torch.onnx.ONNXProgram)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert {entry.shape[0] for entry in session.get_inputs()} == {"batch"}

    def run(*sample: Any) -> list[Tensor]:
        tensors = pytree.tree_leaves(sample)
        feed = {entry.name: t.numpy() for entry, t in zip(session.get_inputs(), tensors, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    equals_the_module(run, module, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name != "dicts and tuples"] + ["a dict"])
def test_traces_load_in_plain_torch(name: str, tmp_path: Path) -> None:
    make, inputs = CASES.get(name, (Named, named))
    module = make()
    options = {"strict": False} if make is Named else {}  # torch's word for outputs that are dicts

    TorchScriptExporter().export(
        module, inputs(3), tmp_path / "net.pt", dynamic_shapes="batch", method="trace", **options
    )

    equals_the_module(torch.jit.load(str(tmp_path / "net.pt")), module, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["MLP", "convolution and batch norm", "LSTM"])
def test_scripts_load_in_plain_torch(name: str, tmp_path: Path) -> None:
    make, inputs = CASES[name]
    module = make()

    TorchScriptExporter().export(module, inputs(3), tmp_path / "net.pt", dynamic_shapes="batch")

    equals_the_module(torch.jit.load(str(tmp_path / "net.pt")), module, inputs)


ALONE = """
import sys, torch
kind, artifact, inputs, outputs = sys.argv[1:]
if kind == "aoti":
    import torch._inductor
    run = torch._inductor.aoti_load_package(artifact)
else:
    run = torch.export.load(artifact).module() if kind == "torch_export" else torch.jit.load(artifact)
torch.save([run(*sample) for sample in torch.load(inputs)], outputs)
assert not [name for name in sys.modules if name.startswith("fulmen")], "the artifact needs fulmen"
"""


def in_a_process_of_its_own(kind: str, artifact: Path, samples: list[tuple[Any, ...]], folder: Path) -> list[Any]:
    torch.save(samples, folder / "inputs.pt")
    command = [sys.executable, "-W", "ignore", "-c", ALONE, kind, artifact, folder / "inputs.pt", folder / "outputs.pt"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs.pt")


def same_as(module: nn.Module, samples: list[tuple[Any, ...]], outputs: list[Any]) -> None:
    for sample, got in zip(samples, outputs, strict=True):
        expected = module.eval()(*sample)
        for ours, theirs in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch_export", "torchscript"])
def test_artifacts_run_in_a_process_that_never_imports_fulmen(kind: str, tmp_path: Path) -> None:
    module, samples = Convolution(), [images(1), images(5)]
    exporter = TorchExportExporter() if kind == "torch_export" else TorchScriptExporter()
    exporter.export(module, images(2), tmp_path / "net.pt2", dynamic_shapes="batch")

    outputs = in_a_process_of_its_own(kind, tmp_path / "net.pt2", samples, tmp_path)

    same_as(module, samples, outputs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@cases
def test_compiled_packages_run_in_a_process_that_never_imports_fulmen(
    make: Callable[[], nn.Module], inputs: Callable[[int], tuple[Any, ...]], tmp_path: Path
) -> None:
    module, samples = make(), [inputs(1), inputs(5)]

    AOTInductorExporter().export(module, inputs(3), tmp_path / "net.pt2", dynamic_shapes="batch")

    same_as(module, samples, in_a_process_of_its_own("aoti", tmp_path / "net.pt2", samples, tmp_path))


def test_keyword_arguments_keep_their_names() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return x * scale + shift

    x, shift, scale = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 1)
    # Given in another order than that of the signature.
    program = TorchExportExporter().export(
        Scaled(), (x,), kwargs={"scale": scale, "shift": shift}, dynamic_shapes="batch"
    )

    assert torch.equal(program.module()(x[:2], shift=shift[:2], scale=scale[:2]), (x * scale + shift)[:2])


def test_named_dimensions_are_open_and_the_others_fixed(tmp_path: Path) -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    TorchExportExporter().export(
        Pool(), (torch.randn(2, 5, 4),), tmp_path / "net.pt2", dynamic_shapes={"x": {1: "length"}}
    )

    run = torch.export.load(tmp_path / "net.pt2").module()
    assert run(torch.ones(2, 9, 4)).shape == (2, 4)
    with pytest.raises(AssertionError, match=r"Guard failed|Expected input"):
        run(torch.ones(3, 9, 4))


def test_limits_of_a_dimension_are_kept_while_other_sizes_are_tried() -> None:
    batch = torch.export.Dim("batch", min=2, max=4)

    class Limited(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert 2 <= x.shape[0] <= 4, "outside of what was said"
            return x * 2

    TorchExportExporter().export(Limited(), (torch.randn(3, 4),), dynamic_shapes={"x": {0: batch}})


def test_buffers_that_forward_changes_are_as_before() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    module = Counts()
    program = TorchExportExporter().export(module, (torch.zeros(2),))

    assert module.calls == 0
    assert torch.equal(program.module()(torch.zeros(2)), torch.ones(2))


def test_half_precision_is_compared_as_finely_as_it_can_be(tmp_path: Path) -> None:
    module = MLP().to(torch.bfloat16)

    TorchExportExporter().export(module, (torch.randn(3, 4, dtype=torch.bfloat16),), tmp_path / "net.pt2")

    assert (tmp_path / "net.pt2").exists()


@pytest.mark.proves("7.2")
def test_torchscript_says_that_it_is_deprecated_at_the_callers_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TorchScriptExporter().export(MLP())

    ours = [entry for entry in caught if "PyTorch has deprecated TorchScript" in str(entry.message)]
    assert [entry.filename for entry in ours] == [__file__]
    assert ours[0].category is DeprecationWarning
    assert "torch_export" in str(ours[0].message)
    assert len(caught) == 1, "torch's own notices say the same"


def test_onnx_takes_the_options_of_torchs_own_exporter(tmp_path: Path) -> None:
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    onnx = pytest.importorskip("onnx")
    exporter = OnnxExporter()
    names = {"input_names": ["features"], "output_names": ["logits"]}

    exporter.export(MLP(), mlp(3), tmp_path / "a.onnx", dynamic_axes={"features": {0: "n"}, "logits": [0]}, **names)
    exporter.export(MLP(), mlp(3), tmp_path / "b.onnx", external_data=True, opset_version=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old exporter's
        old = exporter.export(
            MLP(), mlp(3), tmp_path / "c.onnx", dynamo=False, dynamic_axes={"features": {0: "n"}}, **names
        )

    assert old is None
    for file in ("a.onnx", "c.onnx"):
        graph = onnx.load(tmp_path / file).graph
        assert [entry.name for entry in (*graph.input, *graph.output)] == ["features", "logits"]
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    assert (tmp_path / "b.onnx.data").exists()
    assert onnx.load(tmp_path / "b.onnx").opset_import[0].version == 20
