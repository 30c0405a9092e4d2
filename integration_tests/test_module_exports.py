"""The export methods of a LightningModule, and ``fulmen export`` from what a Trainer saved."""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import lightning
import pytest
import torch
from torch import Tensor, nn

import fulmen
from fulmen.callbacks import EMAWeightAveraging, WeightAveraging
from fulmen.demos import BoringDataModule, BoringModel
from fulmen_checkpoint import ShardedCheckpointIO
from fulmen_protocols import ExportError, MisconfigurationException, MissingPackage
from fulmen_protocols.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable


class Net(fulmen.LightningModule):
    """Two layers, a child module with its own properties, and every transfer hook."""

    def __init__(self, width: int = 8, example: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters("width")
        self.first = nn.Linear(4, width)
        self.dropout = nn.Dropout(0.5)
        self.child = BoringModel()
        self.child.layer = nn.Linear(width, 2)
        self.example_input_array = example
        self.automatic_optimization = True
        self.hooks: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.child.layer(self.dropout(self.first(x)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.hooks.append("before")
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.hooks.append(f"to {device} of loader {dataloader_idx}")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.hooks.append("after")
        return batch


HOOKS = ["before", "to cpu of loader 0", "after"]


def needs_onnx() -> Any:
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    return pytest.importorskip("onnxruntime")


def run_onnx(model: bytes | str, *inputs: Tensor) -> Tensor:
    session = needs_onnx().InferenceSession(model, providers=["CPUExecutionProvider"])
    feed = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def load_script(file: Any) -> Any:
    return torch.jit.load(file)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.proves("7.1", "7.2", "7.3", "10.19")
@pytest.mark.parametrize("method", ["to_onnx", "to_torchscript", "to_tensorrt"])
def test_the_methods_take_what_lightnings_take(method: str) -> None:
    def parameters(cls: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(getattr(cls, method)).parameters.values()
        return [(parameter.name, parameter.default, parameter.kind) for parameter in found]

    assert parameters(fulmen.LightningModule) == parameters(lightning.LightningModule)


# -- ONNX ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("7.1", "10.19")
@pytest.mark.parametrize("place", ["text", "path", "stream", "url", "nowhere"])
def test_to_onnx_writes_anywhere_and_returns_the_program(place: str, tmp_path: Path) -> None:
    needs_onnx()
    net, x, stream = Net(), torch.randn(3, 4), io.BytesIO()
    places = {
        "text": str(tmp_path / "deep" / "net.onnx"),
        "path": tmp_path / "deep" / "net.onnx",
        "stream": stream,
        "url": f"memory://{tmp_path.name}/net.onnx",
        "nowhere": None,
    }

    program = net.to_onnx(places[place], x, dynamic_shapes="batch")

    assert isinstance(program, torch.onnx.ONNXProgram)
    file: bytes | None = None
    if place == "stream":
        file = stream.getvalue()
    elif place == "url":
        file = fsspec.open(places[place]).fs.cat_file(f"/{tmp_path.name}/net.onnx")
    elif place != "nowhere":
        file = (tmp_path / "deep" / "net.onnx").read_bytes()
    if file is None:
        assert list(tmp_path.iterdir()) == []
        program.save(tmp_path / "later.onnx")
        file = (tmp_path / "later.onnx").read_bytes()
    other = torch.randn(7, 4)
    close(run_onnx(file, other), net.eval()(other))


@pytest.mark.proves("7.1", "10.16", "10.19")
def test_to_onnx_takes_the_example_through_the_transfer_hooks_and_restores_every_mode(tmp_path: Path) -> None:
    needs_onnx()
    net = Net(example=torch.randn(3, 4)).train()
    net.child.eval()  # frozen by its user
    modes = [module.training for module in net.modules()]

    net.to_onnx(tmp_path / "net.onnx")

    assert net.hooks == HOOKS
    assert [module.training for module in net.modules()] == modes
    x = torch.randn(3, 4)
    close(run_onnx(str(tmp_path / "net.onnx"), x), net.eval()(x))


class Doubling(BoringDataModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.repeat(2, 1)


@pytest.mark.proves("7.1", "10.16")
@pytest.mark.filterwarnings("ignore:there is a validation loader", "ignore:both Doubling and Net define")
def test_a_datamodules_own_hook_wins_over_the_modules(tmp_path: Path) -> None:
    needs_onnx()
    net = Net()
    net.first = nn.Linear(32, 8)
    trainer = fulmen.Trainer(
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, datamodule=Doubling())
    net.hooks.clear()

    program = net.to_onnx(None, torch.randn(3, 32))

    assert program is not None
    assert program.exported_program is not None
    assert net.hooks == HOOKS[:2], "the module's other hooks run, its on_after_batch_transfer does not"
    assert [int(size) for size in program.model.graph.inputs[0].shape] == [6, 32]


@pytest.mark.proves("7.1")
def test_to_onnx_passes_options_on_and_has_the_old_exporter_too(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    needs_onnx()
    net, x = Net(), torch.randn(3, 4)
    names: dict[str, Any] = {"input_names": ["features"], "output_names": ["scores"]}
    axes = {"features": {0: "rows"}, "scores": {0: "rows"}}

    net.to_onnx(tmp_path / "new.onnx", x, opset_version=20, dynamic_axes=axes, **names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert net.to_onnx(tmp_path / "old.onnx", x, dynamo=False, dynamic_axes=axes, **names) is None

    for file in ("new.onnx", "old.onnx"):
        graph = onnx.load(tmp_path / file).graph
        assert [entry.name for entry in (*graph.input, *graph.output)] == ["features", "scores"]
        close(run_onnx(str(tmp_path / file), x[:2]), net.eval()(x[:2]))
    assert onnx.load(tmp_path / "new.onnx").opset_import[0].version == 20


# -- TorchScript ---------------------------------------------------------------------------------------------------


@pytest.mark.proves("7.2", "10.19")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["script", "trace"])
@pytest.mark.parametrize("attached", [False, True], ids=["unattached", "after a run"])
def test_to_torchscript_is_in_evaluation_mode_and_loads_in_plain_torch(
    method: Any, attached: bool, tmp_path: Path
) -> None:
    net, x = Net(example=torch.randn(3, 4)), torch.randn(5, 4)
    if attached:
        trainer = fulmen.Trainer(
            max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
        trainer.fit(net, [torch.randn(2, 4)])
        net.hooks.clear()
    net.train()

    made = net.to_torchscript(tmp_path / "deep" / "net.pt", method=method)

    assert isinstance(made, torch.jit.ScriptModule)
    assert not made.training
    assert net.training
    assert net.hooks == HOOKS
    loaded = load_script(str(tmp_path / "deep" / "net.pt"))
    expected = net.eval()(x)
    close(loaded(x), expected)
    close(made(x), expected)


@pytest.mark.proves("7.2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_to_torchscript_scripts_without_a_sample_and_saves_to_a_url(tmp_path: Path) -> None:
    net = Net()

    net.to_torchscript(f"memory://{tmp_path.name}/net.pt")

    content = fsspec.filesystem("memory").cat_file(f"/{tmp_path.name}/net.pt")
    x = torch.randn(5, 4)
    close(load_script(io.BytesIO(content))(x), net.eval()(x))


@pytest.mark.proves("7.2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_check_inputs_go_through_the_transfer_hooks() -> None:
    net = Net()

    net.to_torchscript(
        method="trace", example_inputs=torch.randn(3, 4), check_inputs=[(torch.randn(2, 4),), (torch.randn(6, 4),)]
    )

    assert net.hooks == 3 * HOOKS


@pytest.mark.proves("7.2")
def test_to_torchscript_says_that_it_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match=r"PyTorch has deprecated TorchScript.*'torch_export'") as caught:
        Net().to_torchscript()

    assert [entry.filename for entry in caught] == [__file__]


class AsksItsTrainer(Net):
    @property
    def rank(self) -> int:
        return self.trainer.global_rank


AsksItsTrainer.__jit_unused_properties__ = [*Net.__jit_unused_properties__, "rank"]


@pytest.mark.proves("7.2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_properties_that_ask_for_the_trainer_do_not_break_scripting() -> None:
    net = AsksItsTrainer(example=torch.randn(3, 4))

    net.to_torchscript()
    net.to_torchscript(method="trace")

    assert not fulmen.LightningModule._jit_is_scripting
    with pytest.raises(RuntimeError, match="is not attached to a Trainer"):
        _ = net.rank


@pytest.mark.proves("7.2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_failed_script_leaves_the_module_as_it_was() -> None:
    class Unscriptable(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(torch.from_numpy(x.detach().numpy()))

    net = Unscriptable().train()
    with pytest.raises(ExportError, match=r"cannot export Unscriptable.*test_module_exports\.py:\d+"):
        net.to_torchscript()

    assert net.training
    assert not fulmen.LightningModule._jit_is_scripting
    with pytest.raises(RuntimeError, match="is not attached"):
        _ = net.trainer


# -- samples -------------------------------------------------------------------------------------------------------


class TwoInputs(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch, batch).mean()


class OneDict(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layer(batch["x"]) * batch["scale"]


X, SCALE = torch.randn(3, 4), torch.rand(3, 1)


@pytest.mark.proves("7.4")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Net, X),
        (TwoInputs, (X, SCALE)),
        (TwoInputs, {"x": X, "scale": SCALE}),
        (OneDict, ({"x": X, "scale": SCALE},)),
        (OneDict, {"x": X, "scale": SCALE}),
    ],
    ids=["a tensor", "a tuple", "a dict of arguments", "a tuple of one dict", "the one dict"],
)
def test_an_example_is_a_tensor_a_tuple_or_a_dict(module: Callable[[], Any], example: Any, tmp_path: Path) -> None:
    net = module()
    net.example_input_array = example
    expected = (
        net.eval()(X) if module is Net else net(X, SCALE) if module is TwoInputs else net({"x": X, "scale": SCALE})
    )

    made = net.to_torchscript(tmp_path / "net.pt", method="trace")

    assert (tmp_path / "net.pt").exists()
    by_name = isinstance(example, dict) and module is TwoInputs
    got = made(**example) if by_name else made(*(example if isinstance(example, tuple) else (example,)))
    close(got, expected)


@pytest.mark.proves("7.4")
@pytest.mark.parametrize(
    ("module", "example"), [(Net, X), (TwoInputs, (X, SCALE)), (TwoInputs, {"x": X, "scale": SCALE})]
)
def test_the_example_serves_the_summary_and_the_graph_in_tensorboard(
    module: Callable[[], Any], example: Any, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fulmen.loggers import TensorBoardLogger
    from fulmen.utilities.model_summary import ModelSummary

    net = module()
    net.example_input_array = example
    summary = ModelSummary(net)
    assert [3, 4] in summary.in_sizes or [[3, 4]] in summary.in_sizes

    if isinstance(example, dict):
        return  # a graph is drawn by tracing, which takes no keywords
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is what draws, and torch has deprecated it
        trained(tmp_path, net, logger=logger, limit_train_batches=0)
    events = EventAccumulator(str(logger.log_dir))
    events.Reload()
    assert events.Graph().node


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.proves("7.1", "7.2", "7.3")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "flag", "options"),
    [
        ("to_onnx", "input_sample", {}),
        ("to_torchscript", "example_inputs", {"method": "trace"}),
        ("to_tensorrt", "input_sample", {}),
    ],
)
def test_without_an_example_an_export_is_refused(method: str, flag: str, options: dict[str, Any]) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"Net.{method}\(\) .*{flag}=None and example_input_array=None. Give {flag}="
    ):
        getattr(Net(), method)("file", **options)


@pytest.mark.proves("7.3", "10.19")
def test_to_tensorrt_without_its_library_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    net = Net(example=X).train()

    with pytest.raises(MissingPackage, match=r"needs torch_tensorrt, which is not .* pip install torch-tensorrt"):
        net.to_tensorrt("net.ep")

    assert net.training
    assert net.device.type == "cpu"


# -- plain inference, and the command ------------------------------------------------------------------------------


def trained(folder: Path, net: Any, logger: Any = False, **flags: Any) -> fulmen.Trainer:
    torch.manual_seed(0)
    trainer = fulmen.Trainer(
        max_epochs=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **flags,
    )
    trainer.fit(net, [torch.randn(4, 4) for _ in range(5)])
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


@pytest.mark.proves("7.7")
def test_a_loaded_module_is_a_plain_module_of_torch(tmp_path: Path) -> None:
    net = Net(width=6)
    trainer = trained(tmp_path, net)
    batches = [torch.randn(3, 4), torch.randn(3, 4)]

    loaded = Net.load_from_checkpoint(tmp_path / "last.ckpt").eval()

    assert isinstance(loaded, nn.Module)
    # The same weights in modules that never saw fulmen.
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    plain = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)).eval()
    plain[0].load_state_dict({"weight": state["first.weight"], "bias": state["first.bias"]})
    plain[2].load_state_dict({"weight": state["child.layer.weight"], "bias": state["child.layer.bias"]})
    with torch.no_grad():
        expected = [plain(batch) for batch in batches]
        assert all(torch.equal(loaded(batch), out) for batch, out in zip(batches, expected, strict=True))
    predicted = trainer.predict(loaded, batches)
    assert all(torch.equal(got, out) for got, out in zip(predicted, expected, strict=True))
    # torch.export takes it as it is.
    program = torch.export.export(loaded, (batches[0],))
    close(program.module()(batches[1]), expected[1])


@pytest.mark.proves("7.7")
def test_the_command_exports_the_average_from_an_averaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = Net(width=6)
    trained(tmp_path, net, callbacks=[WeightAveraging()])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not torch.equal(saved["state_dict"]["first.weight"], saved["current_model_state"]["first.weight"])
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.chdir(tmp_path)
    command = "export last.ckpt --format torch_export --input-shape 1,4 --dynamic-batch --output net.pt2"

    status = main([*command.split(), "--module", "test_module_exports:Net"])

    said = capsys.readouterr()
    assert status == 0, said.err
    x = torch.randn(3, 4)
    averaged = Net(width=6)
    averaged.load_state_dict(saved["state_dict"])
    close(torch.export.load(tmp_path / "net.pt2").module()(x), averaged.eval()(x))


@pytest.mark.proves("7.7", "7.8")
@pytest.mark.parametrize("averaged", [False, True])
def test_the_command_exports_from_a_sharded_checkpoint_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], averaged: bool
) -> None:
    net = Net(width=6)
    callbacks = [EMAWeightAveraging(decay=0.5)] if averaged else []
    trained(tmp_path, net, callbacks=callbacks, plugins=[ShardedCheckpointIO()])
    assert (tmp_path / "last.ckpt" / "manifest.json").is_file()
    saved = ShardedCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    if averaged:
        assert not torch.equal(saved["state_dict"]["first.weight"], saved["current_model_state"]["first.weight"])
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.chdir(tmp_path)
    command = "export last.ckpt --format torch_export --input-shape 1,4 --dynamic-batch --output net.pt2"

    status = main([*command.split(), "--module", "test_module_exports:Net"])

    assert status == 0, capsys.readouterr().err
    x = torch.randn(3, 4)
    same = Net(width=6)
    same.load_state_dict(saved["state_dict"])
    close(torch.export.load(tmp_path / "net.pt2").module()(x), same.eval()(x))


SHARDS = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from fulmen_checkpoint import ShardedCheckpointIO

dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[3]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = {"weight": torch.arange(12.0).reshape(4, 3) / 7, "bias": torch.tensor([1.0, -1.0, 0.5, 2.0])}
state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}
ShardedCheckpointIO().save_sharded({"state_dict": state}, sys.argv[1])
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.proves("7.7")
def test_the_command_exports_from_shards_that_two_ranks_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, meet = tmp_path / "shards", f"file://{tmp_path / 'meet'}"
    ranks = [subprocess.Popen([sys.executable, "-c", SHARDS, str(folder), meet, str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert len(list(folder.glob("*.distcp"))) == 2, "each rank wrote its own part"
    monkeypatch.chdir(tmp_path)
    command = "export shards --format torch_export --module torch.nn:Linear --init in_features=3 out_features=4"

    status = main([*command.split(), "--input-shape", "1,3", "--dynamic-batch", "--output", "net.pt2"])

    assert status == 0, capsys.readouterr().err
    x = torch.randn(5, 3)
    weight, bias = torch.arange(12.0).reshape(4, 3) / 7, torch.tensor([1.0, -1.0, 0.5, 2.0])
    close(torch.export.load(tmp_path / "net.pt2").module()(x), x @ weight.T + bias)


def test_the_command_is_listed_and_explained() -> None:
    script = Path(sys.executable).with_name("fulmen")
    listed = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    explained = subprocess.run([script, "export", "--help"], capture_output=True, text=True, check=True).stdout

    assert re.search(r"export +Export the model in a checkpoint: ONNX", listed)
    for flag in ("--module", "--format", "--output", "--input-shape", "--dynamic-batch", "onnx", "torchscript"):
        assert flag in explained
