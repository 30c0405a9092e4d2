"""A LightningModule under ``torch.compile``: run by the Trainer, taken back, and saved under its own names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.utilities.compile import from_compiled, is_compiled, to_uncompiled

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*validation is left out")


class Compiled(fulmen.LightningModule):
    """Notes, in each step, whether it is being compiled: that is true while dynamo reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.layer.weight.data.fill_(0.5)

    def forward(self, batch: Any) -> Any:
        return self.layer(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(batch).sum()
        self.log("loss", loss, prog_bar=True)
        self.log("mean", loss, on_step=False, on_epoch=True, batch_size=2)
        self.log_dict({"number": 2.5, "twice": loss * 2}, on_step=True, on_epoch=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self(batch).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(samples: int = 8) -> DataLoader[Any]:
    values = torch.arange(samples * 2, dtype=torch.float32).reshape(samples, 2)
    return DataLoader(values, batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return fulmen.Trainer(**{**quiet, **options})


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.proves("9.53", "14.6")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_trains_like_the_module_itself_as_one_graph_that_logs(backend: str) -> None:
    eager, expected = Compiled(), trainer()
    expected.fit(eager, loader(), loader())
    model, run = Compiled(), trainer()
    run.fit(torch.compile(model, backend=backend, fullgraph=True), loader(), loader())

    assert graphs() > 0, "nothing was compiled"
    assert breaks() == {}
    assert torch.equal(model.layer.weight, eager.layer.weight)
    assert run.lightning_module is model
    assert set(run.callback_metrics) == {
        "loss", "mean", "number", "number_step", "number_epoch", "twice", "twice_step", "twice_epoch", "val",
    } == set(expected.callback_metrics)  # fmt: skip
    for name, value in expected.callback_metrics.items():
        assert run.callback_metrics[name].item() == pytest.approx(value.item()), name


@pytest.mark.proves("9.53")
def test_validate_test_and_predict_take_a_compiled_module() -> None:
    model, eager = Compiled(), Compiled()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    run, expected = trainer(), trainer()

    for method, name in (("validate", "val"), ("test", "test")):
        ours = getattr(run, method)(compiled, loader(), verbose=False)
        assert ours == getattr(expected, method)(eager, loader(), verbose=False)
        assert list(ours[0]) == [name]
    ours = run.predict(compiled, loader())
    for mine, theirs in zip(ours, expected.predict(eager, loader()) or [], strict=True):
        assert torch.equal(mine, theirs)
    assert graphs() >= 3
    assert breaks() == {}


@pytest.mark.proves("9.53")
def test_a_compiled_module_can_be_made_and_unmade_by_hand() -> None:
    model = Compiled()
    names = list(model.state_dict())
    wrapper: Any = torch.compile(model, backend="eager")

    assert is_compiled(wrapper)
    assert not is_compiled(model)
    assert from_compiled(wrapper) is model
    assert from_compiled(wrapper) is model, "a second time changes nothing"
    assert "training_step" in vars(model)
    assert "predict_step" not in vars(model), "what nobody defined must not look defined"
    assert list(model.state_dict()) == names
    assert to_uncompiled(model) is model
    assert "training_step" not in vars(model)
    assert to_uncompiled(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]  # torch types it as a function


@pytest.mark.proves("9.53")
def test_what_is_not_a_compiled_lightning_module_is_named() -> None:
    plain: Any = torch.compile(nn.Linear(1, 1), backend="eager")

    with pytest.raises(ValueError, match=r"from_compiled\(\) got a Compiled, which torch.compile did not make. Pass"):
        from_compiled(Compiled())
    with pytest.raises(ValueError, match="a compiled Linear, which is no LightningModule"):
        from_compiled(plain)
    with pytest.raises(ValueError, match=r"to_uncompiled\(\) got a Compiled that is not compiled. Pass torch.compile"):
        to_uncompiled(Compiled())
    with pytest.raises(ValueError, match=r"to_uncompiled\(\) got a Linear, which is no LightningModule"):
        to_uncompiled(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a compiled Linear, which is no LightningModule"):
        trainer().fit(plain, loader())


@pytest.mark.proves("9.53")
def test_an_engine_that_runs_the_module_itself_refuses_a_compiled_one() -> None:
    from fulmen_strategies import SingleDeviceStrategy

    class Engine(SingleDeviceStrategy):
        def optimizer_step(self, optimizer: Any, module: Any, closure: Any = None) -> object:
            return optimizer.step(closure)

    compiled: Any = torch.compile(Compiled(), backend="eager")
    with pytest.raises(
        ValueError, match=r"model is a compiled Compiled, but strategy=.*Pass the module itself, or use"
    ):
        trainer(strategy=Engine("cpu")).fit(compiled, loader())


class Inside(Compiled):
    """Compiles a part of itself, as most people do."""

    def __init__(self, compile_it: bool = True) -> None:
        super().__init__()
        self.body: Any = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        if compile_it:
            self.body = torch.compile(self.body, backend="eager")

    def forward(self, batch: Any) -> Any:
        return self.layer(self.body(batch))


@pytest.mark.proves("9.53")
@pytest.mark.parametrize("saves_compiled", [True, False])
@pytest.mark.parametrize("loads_compiled", [True, False])
def test_weights_keep_their_names_whatever_is_compiled(
    saves_compiled: bool, loads_compiled: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.ckpt"
    saved = Inside(saves_compiled)
    run = trainer(max_epochs=1)
    run.fit(saved, loader())
    run.save_checkpoint(path)

    names = set(torch.load(path, weights_only=True)["state_dict"])
    assert names == {"layer.weight", "layer.bias", "body.0.weight", "body.0.bias"}
    loaded = Inside.load_from_checkpoint(path, compile_it=loads_compiled)
    expected = torch.cat([parameter.flatten() for parameter in saved.parameters()])
    assert torch.equal(torch.cat([parameter.flatten() for parameter in loaded.parameters()]), expected)
    resumed = Inside(loads_compiled)
    trainer(max_epochs=1).test(resumed, loader(), ckpt_path=path, verbose=False)
    assert torch.equal(torch.cat([parameter.flatten() for parameter in resumed.parameters()]), expected)


@pytest.mark.proves("9.53")
def test_names_written_by_lightning_for_a_compiled_part_are_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.ckpt"
    model = Inside(False)
    state = {name.replace("body.", "body._orig_mod."): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, path)

    for compile_it in (True, False):
        loaded = Inside.load_from_checkpoint(path, compile_it=compile_it)
        assert torch.equal(next(iter(loaded.body.parameters())), model.body[0].weight)


@pytest.mark.proves("9.53")
def test_what_a_graph_cannot_hold_is_logged_between_graphs() -> None:
    metrics = pytest.importorskip("torchmetrics")

    class WithMetric(Compiled):
        def __init__(self) -> None:
            super().__init__()
            self.error = metrics.MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("error", self.error, on_step=False, on_epoch=True)
            return self(batch).sum()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.error.update(float(batch_idx))

    run = trainer(max_epochs=1)
    run.fit(torch.compile(WithMetric(), backend="eager"), loader())

    assert run.callback_metrics["error"] == 1.5
    assert breaks(), "an object cannot be handed to a graph"


@pytest.mark.proves("9.53")
def test_toggling_optimizers_stays_outside_of_graphs() -> None:
    for name in ("toggle_optimizer", "untoggle_optimizer"):
        assert getattr(fulmen.LightningModule, name)._torchdynamo_disable
