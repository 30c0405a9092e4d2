"""What is in a checkpoint: the keys that Lightning writes for the same run, and what every state hook gave and gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback
from fulmen.plugins import MixedPrecision
from fulmen.profilers import SimpleProfiler
from fulmen_protocols import CheckpointError, CheckpointUnsafe

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")


def parts(module: Any, data: Any, callback: Any) -> tuple[Any, Any, Any]:
    """A module, a data module and a callback that derive from these bases, and use every place in a checkpoint."""

    class Model(module):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self, width: int = 3, options: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(4, width)
            self.events: list[str] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["of the module"] = list(checkpoint)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.events.append("module")
            self.loaded = checkpoint["of the module"]

    class Data(data):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self, rows: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.served = 0

        def train_dataloader(self) -> Any:
            self.served += 1
            return DataLoader(TensorDataset(torch.arange(32.0).reshape(8, 4) / 32), 4)

        def state_dict(self) -> dict[str, Any]:
            return {"served": self.served}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.loaded = state_dict["served"]

    class Keeps(callback):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            self.state: dict[str, Any] = {"list": [1]}

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.state = state_dict
            self.state["list"].append(2)

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["of the callback"] = 7

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            self.whole = checkpoint

    return Model, Data, Keeps


OURS = parts(fulmen.LightningModule, fulmen.LightningDataModule, Callback)


def trainer(package: Any, callback: Any, epochs: int, precision: Any = None, **options: Any) -> Any:
    return package.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[callback],
        plugins=[] if precision is None else [precision],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.proves("5.1", "5.3")
def test_the_keys_and_plain_values_are_those_that_lightning_writes(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision as Theirs

    found = {}
    theirs = parts(lightning.LightningModule, lightning.LightningDataModule, lightning.Callback)
    for name, package, (model, data, keeps), mixed in (
        ("ours", fulmen, OURS, MixedPrecision),
        ("theirs", lightning, theirs, Theirs),
    ):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]  # its type does not say so
        run = trainer(package, keeps(), 1, mixed("16-mixed", "cpu", scaler=scaler))
        run.fit(model(options={"deep": [1, "a"]}), datamodule=data(rows=5))
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        found[name] = torch.load(tmp_path / f"{name}.ckpt", weights_only=name == "ours")
    ours, theirs_file = found["ours"], found["theirs"]
    assert set(ours) - set(theirs_file) == {"fulmen"}
    assert set(theirs_file) - set(ours) == set()
    same = ("epoch", "global_step", "hparams_name", "hyper_parameters", "datamodule_hparams_name",
            "datamodule_hyper_parameters", "callbacks", "lr_schedulers", "of the callback")  # fmt: skip
    for key in same:
        assert _plain(ours[key]) == _plain(theirs_file[key]), key
    assert type(ours["hyper_parameters"]) is dict
    assert ours["hyper_parameters"] == {"width": 3, "options": {"deep": [1, "a"]}}
    scaler_keys = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    assert set(ours["MixedPrecision"]) == set(theirs_file["MixedPrecision"]) == scaler_keys
    data_key = next(key for key in ours if key.endswith("Data"))
    assert ours[data_key] == theirs_file[data_key] == {"served": 1}
    for key in ("state_dict", "optimizer_states"):
        assert _shape(ours[key]) == _shape(theirs_file[key]), key
    assert ours["of the module"][-1] == theirs_file["of the module"][-1] == "of the callback", "the module comes last"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "_get_lr_called_within_step"}
    return value


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype)
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    return [_shape(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.proves("5.3")
def test_a_configuration_of_omegaconf_comes_back_as_one_from_a_file_that_holds_plain_data(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")

    class Configured(fulmen.LightningModule):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config)
            self.layer = nn.Linear(4, config["net"]["width"])

        training_step, configure_optimizers = OURS[0].training_step, OURS[0].configure_optimizers

    module = Configured(omegaconf.OmegaConf.create({"net": {"width": 3}, "twice": "${net.width}"}))
    run = trainer(fulmen, Callback(), 1)
    run.fit(module, OURS[1]().train_dataloader())
    run.save_checkpoint(tmp_path / "a.ckpt")

    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"net": {"width": 3}, "twice": "${net.width}"}
    loaded = Configured.load_from_checkpoint(tmp_path / "a.ckpt", config={"net": {"width": 3}})
    assert torch.equal(loaded.layer.weight, module.layer.weight)


@pytest.mark.proves("5.7", "5.35")
def test_every_state_hook_gets_what_it_gave_and_callbacks_a_copy_of_their_own(tmp_path: Path) -> None:
    model, data, keeps = OURS
    first = trainer(fulmen, keeps(), 1)
    first.fit(model(), datamodule=data())
    first.save_checkpoint(tmp_path / "a.ckpt")

    again, module, datamodule = keeps(), model(), data()
    trainer(fulmen, again, 2).fit(module, datamodule=datamodule, ckpt_path=tmp_path / "a.ckpt")
    assert datamodule.loaded == 1
    assert again.state == {"list": [1, 2]}
    key = next(iter(again.whole["callbacks"]))
    assert again.whole["callbacks"][key] == {"list": [1]}, "what one callback changes is not what others see"
    assert again.whole["of the callback"] == 7
    assert module.loaded[-1] == "of the callback"

    class Other(data):  # type: ignore[misc, valid-type]  # the base class is chosen at run time: Lightning's or ours
        pass

    other = Other()
    trainer(fulmen, keeps(), 2).fit(model(), datamodule=other, ckpt_path=tmp_path / "a.ckpt")
    assert not hasattr(other, "loaded"), "the state of a data module of another name"


@pytest.mark.proves("5.7")
def test_an_evaluation_restores_no_optimizers_and_needs_none_in_the_file(tmp_path: Path) -> None:
    model, data, keeps = OURS

    class Tested(model):  # type: ignore[misc, valid-type]  # the base class is chosen at run time: Lightning's or ours
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("width", float(self.layer.out_features))

    first = trainer(fulmen, keeps(), 1)
    first.fit(Tested(), datamodule=data())
    first.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loader = data().train_dataloader()
    assert trainer(fulmen, keeps(), 1).test(Tested(), loader, tmp_path / "weights.ckpt", verbose=False)
    with pytest.raises(CheckpointError, match=r"weights\.ckpt holds weights only.*save_weights_only=True.*load_from"):
        trainer(fulmen, keeps(), 2).fit(Tested(), loader, ckpt_path=tmp_path / "weights.ckpt")


@pytest.mark.proves("5.10")
def test_a_save_is_profiled_under_its_name(tmp_path: Path) -> None:
    model, data, keeps = OURS
    profiler = SimpleProfiler()
    run = trainer(fulmen, keeps(), 1, profiler=profiler)
    run.fit(model(), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert len(profiler.recorded_durations["save_checkpoint"]) == 1


class Thing:
    """A class that a checkpoint may hold only if its loader says so."""


@pytest.mark.proves("5.15")
@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict", "load_from_checkpoint", "load", "load_raw"])
def test_every_way_to_load_takes_weights_only_and_runs_no_code_without_it(call: str, tmp_path: Path) -> None:
    model, data, keeps = OURS

    class Whole(model):  # type: ignore[misc, valid-type]  # the base class is chosen at run time: Lightning's or ours
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return None

        test_step = predict_step = validation_step

    first = trainer(fulmen, keeps(), 1)
    first.fit(Whole(), data().train_dataloader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save({**content, "thing": Thing(), "model": nn.Linear(2, 2).state_dict()}, tmp_path / "thing.ckpt")
    torch.save({"weight": nn.Parameter(torch.ones(2, 2)), "bias": torch.ones(2), "x": Thing()}, tmp_path / "raw.ckpt")

    def run(**options: Any) -> object:
        if call == "load_from_checkpoint":
            return Whole.load_from_checkpoint(tmp_path / "thing.ckpt", **options)
        if call in ("load", "load_raw"):
            fabric = fulmen.Fabric(accelerator="cpu", devices=1)
            linear = nn.Linear(2, 2)
            if call == "load":
                return fabric.load(tmp_path / "thing.ckpt", {"model": linear}, **options)
            return fabric.load_raw(tmp_path / "raw.ckpt", linear, strict=False, **options)
        again = trainer(fulmen, keeps(), 2)
        return getattr(again, call)(Whole(), data().train_dataloader(), ckpt_path=tmp_path / "thing.ckpt", **options)

    for options in ({}, {"weights_only": None}, {"weights_only": True}):
        with pytest.raises(CheckpointUnsafe, match=r"Thing.*pass weights_only=False"):
            run(**options)
    run(weights_only=False)
