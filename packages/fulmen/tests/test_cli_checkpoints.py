"""Checkpoints of runs from the command line: rebuilt without it, merged into it, never a way to run foreign code."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningDataModule, LightningModule
from fulmen.cli import LightningArgumentParser, LightningCLI, OptimizerCallable, instantiate_module
from fulmen_protocols import CheckpointUnsafe, MisconfigurationException

DEFAULTS = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 1,
    "accelerator": "cpu",
    "limit_val_batches": 0,
    "logger": False,
}


class Encoder(nn.Module):
    def __init__(self, width: int = 2, act: str = "relu") -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)


class Wide(Encoder):
    def __init__(self, width: int = 8, inner: Encoder | None = None) -> None:
        super().__init__(width)
        self.inner = inner


class Net(LightningModule):
    def __init__(
        self,
        lr: float = 0.1,
        encoder: Encoder | None = None,
        optimizer: OptimizerCallable = torch.optim.SGD,
        features: int = 3,
        anything: Any = None,
        function: Any = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.encoder, self.optimizer, self.anything = lr, encoder, optimizer, anything
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).pow(2).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def loader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=2)

    train_dataloader = test_dataloader = loader


class Other(Net):
    pass


class Outer(LightningModule):
    """Holds a module of its own, which saves its arguments too."""

    def __init__(self, backbone: LightningModule, size: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.size = backbone, size
        self.own = Net(lr=0.9)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 2, transform: Encoder | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size, self.transform, self.features = batch_size, transform, 7

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=self.batch_size)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def cli(*argv: str, cls: type[LightningCLI] = LightningCLI, **options: Any) -> Any:
    options.setdefault("model_class", Net)
    options.setdefault("save_config_kwargs", {"overwrite": True})
    return cls(args=list(argv), trainer_defaults=DEFAULTS, seed_everything_default=1, **options)


def fit(*argv: str, **options: Any) -> Any:
    """Train by command line and write ``run.ckpt``."""
    built = cli("fit", *argv, **options)
    built.trainer.save_checkpoint("run.ckpt")
    return built


ENCODER = (f"--model.encoder={__name__}.Wide", "--model.encoder.width=5", "--model.encoder.inner=Encoder",
           "--model.encoder.inner.width=4")  # fmt: skip


@pytest.mark.proves("5.31", "12.11")
def test_a_checkpoint_rebuilds_nested_objects_and_their_weights() -> None:
    trained = fit(*ENCODER, "--model.optimizer=Adam", "--model.optimizer.lr=0.07").model

    loaded = Net.load_from_checkpoint("run.ckpt")

    assert isinstance(loaded.encoder, Wide)
    assert (loaded.encoder.layer.out_features, loaded.encoder.inner.layer.out_features) == (5, 4)
    assert torch.equal(loaded.encoder.inner.layer.weight, trained.encoder.inner.layer.weight)
    assert loaded.configure_optimizers().param_groups[0]["lr"] == 0.07


@pytest.mark.proves("12.11")
def test_the_file_holds_the_configuration_as_plain_data() -> None:
    fit(*ENCODER)

    hparams = torch.load("run.ckpt", weights_only=True)["hyper_parameters"]

    assert hparams["_instantiator"] == "fulmen.cli.instantiate_module"
    assert "_class_path" not in hparams
    assert hparams["encoder"]["class_path"] == f"{__name__}.Wide"
    assert hparams["encoder"]["init_args"]["width"] == 5


@pytest.mark.proves("12.11")
def test_a_base_class_rebuilds_the_class_that_was_chosen() -> None:
    fit(f"--model={__name__}.Other", "--model.lr=0.4", model_class=None)

    assert torch.load("run.ckpt", weights_only=True)["hyper_parameters"]["_class_path"] == f"{__name__}.Other"
    loaded = LightningModule.load_from_checkpoint("run.ckpt")
    assert (type(loaded), loaded.lr) == (Other, 0.4)
    assert type(Other.load_from_checkpoint("run.ckpt", lr=0.5)) is Other
    assert Other.load_from_checkpoint("run.ckpt", lr=0.5).lr == 0.5


@pytest.mark.proves("12.11")
def test_what_was_loaded_saves_the_configuration_again() -> None:
    fit(*ENCODER)
    loaded = Net.load_from_checkpoint("run.ckpt")
    from fulmen import Trainer

    trainer = Trainer(**DEFAULTS, enable_checkpointing=False)
    trainer.fit(loaded)
    trainer.save_checkpoint("again.ckpt")

    assert Net.load_from_checkpoint("again.ckpt").encoder.layer.out_features == 5


@pytest.mark.proves("12.11")
def test_the_data_is_rebuilt_too() -> None:
    fit(f"--data={__name__}.Data", "--data.batch_size=1", f"--data.transform={__name__}.Wide",
        "--data.transform.width=6")  # fmt: skip

    for cls in (Data, LightningDataModule):
        loaded = cls.load_from_checkpoint("run.ckpt")
        assert (type(loaded), loaded.batch_size, loaded.transform.layer.out_features) == (Data, 1, 6)


@pytest.mark.proves("12.11")
@pytest.mark.parametrize("chosen", [False, True])
def test_what_a_link_gave_is_saved(chosen: bool) -> None:
    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            target = "model.init_args.features" if chosen else "model.features"
            parser.link_arguments("data.features", target, apply_on="instantiate")

    words = [f"--model={__name__}.Net"] if chosen else []
    trained = fit(*words, cls=Linked, datamodule_class=Data, model_class=None if chosen else Net).model

    assert trained.hparams["features"] == 7
    assert torch.load("run.ckpt", weights_only=True)["hyper_parameters"]["features"] == 7
    assert Net.load_from_checkpoint("run.ckpt").hparams["features"] == 7


@pytest.mark.proves("12.11")
def test_modules_inside_a_module_keep_their_own_arguments() -> None:
    trained = fit_nothing(f"--model={__name__}.Outer", f"--model.backbone={__name__}.Other", "--model.backbone.lr=0.2")

    assert (trained.backbone.hparams["lr"], trained.own.hparams["lr"]) == (0.2, 0.9)
    assert "backbone" not in trained.backbone.hparams
    assert trained.hparams["backbone"]["class_path"] == f"{__name__}.Other"


def fit_nothing(*argv: str) -> Any:
    return cli(*argv, model_class=None, run=False).model


@pytest.mark.proves("12.1", "12.11")
def test_without_support_for_loading_the_arguments_themselves_are_saved() -> None:
    with pytest.warns(UserWarning, match="'encoder' is an nn.Module"):
        model = cli(*ENCODER, run=False, load_from_checkpoint_support=False).model

    assert model.hparams["encoder"] is model.encoder
    assert "_instantiator" not in model.hparams


def test_loggers_are_not_told_how_to_build_the_module() -> None:
    from fulmen.hparams import hyperparameters_for_loggers

    model = cli(f"--model={__name__}.Other", model_class=None, run=False).model

    assert "_class_path" in model.hparams
    assert not any(name.startswith("_") for name in hyperparameters_for_loggers(model) or {})


# ---------------------------------------------------------------------- what a file may not do


def tampered(hparams: dict[str, Any], **more: Any) -> str:
    """A checkpoint as somebody else could have written it."""
    content = {"state_dict": Net().state_dict(), "hyper_parameters": hparams, "hparams_name": "kwargs", **more}
    torch.save(content, "evil.ckpt")
    return "evil.ckpt"


OURS = "fulmen.cli.instantiate_module"
COMMAND = {"class_path": "subprocess.Popen", "init_args": {"args": "touch ran", "shell": True}}


@pytest.mark.proves("5.31", "12.11")
@pytest.mark.parametrize(
    "hparams",
    [
        {"anything": COMMAND},
        {"anything": {"class_path": "os.system", "init_args": {"command": "touch ran"}}},
        {"anything": [{"deep": COMMAND}]},
        {"encoder": {"class_path": f"{__name__}.Wide", "init_args": {"inner": COMMAND}}},
        {"optimizer": "os.system"},
        {"anything": {"class_path": f"{__name__}.os.system"}},
        {"_class_path": "subprocess.Popen"},
        {"_class_path": "this.module.runs.code"},
        {"encoder": {"class_path": "antigravity.Flight"}},
        {"optimizer": "antigravity.fly"},
    ],
)
@pytest.mark.parametrize("instantiator", [OURS, "lightning.pytorch.cli.instantiate_module"])
def test_a_file_cannot_choose_code_to_run(hparams: dict[str, Any], instantiator: str) -> None:
    path = tampered({**hparams, "_instantiator": instantiator})

    with pytest.raises(CheckpointUnsafe, match=r"evil\.ckpt"):
        Net.load_from_checkpoint(path)
    with pytest.raises(CheckpointUnsafe, match=r"evil\.ckpt"):
        cli("test", f"--ckpt_path={path}")

    assert not Path("ran").exists()
    assert "antigravity" not in sys.modules


@pytest.mark.proves("5.31")
def test_no_other_function_is_ever_called_because_a_file_names_it() -> None:
    path = tampered({"lr": 0.5, "_instantiator": "os.system"})

    assert Net.load_from_checkpoint(path).lr == 0.5


@pytest.mark.proves("5.31")
def test_who_trusts_a_file_may_say_so() -> None:
    partial = {"class_path": "functools.partial", "init_args": {"func": "builtins.int"}}
    path = tampered({"function": "os.path.join", "lr": 0.3, "_instantiator": OURS})
    assert isinstance(functools.partial, type)
    with pytest.raises(CheckpointUnsafe, match=r"function='os\.path\.join'.*weights_only=False"):
        Net.load_from_checkpoint(path)

    assert Net.load_from_checkpoint(path, weights_only=False).lr == 0.3
    assert Net.load_from_checkpoint(path, function=None).lr == 0.3
    with pytest.raises(CheckpointUnsafe, match=r"anything='functools\.partial'"):
        Net.load_from_checkpoint(tampered({"anything": partial, "_instantiator": OURS}))


def test_values_that_only_look_like_code_are_left_alone() -> None:
    path = tampered({"anything": "resnet18.v2", "lr": 0.3, "_instantiator": OURS})

    assert Net.load_from_checkpoint(path).anything == "resnet18.v2"


@pytest.mark.proves("12.11")
def test_files_of_lightning_s_command_line_are_built_by_ours() -> None:
    wide = {"class_path": f"{__name__}.Wide", "init_args": {"width": 9}}
    with pytest.warns(UserWarning, match="'encoder' is an nn.Module"):
        state = Net(encoder=Wide(9)).state_dict()
    path = tampered({"encoder": wide, "_instantiator": "pytorch_lightning.cli.instantiate_module"}, state_dict=state)

    assert Net.load_from_checkpoint(path).encoder.layer.out_features == 9


def test_a_configuration_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"does not build a Net.*lr"):
        instantiate_module(Net, {"lr": "high"})
    with pytest.raises(CheckpointUnsafe, match=r"'evil\.ckpt' was written for '.*Net', which is no subclass of Other"):
        Other.load_from_checkpoint(tampered({"_class_path": f"{__name__}.Net", "_instantiator": OURS}))


# ---------------------------------------------------------------------- --ckpt_path


@pytest.mark.proves("12.10")
def test_ckpt_path_brings_the_arguments_that_the_module_was_made_with() -> None:
    trained = fit(*ENCODER, "--model.lr=0.3")

    tested = cli("test", "--ckpt_path=run.ckpt", "--model.lr=0.8")

    assert tested.model.lr == tested.config.test.model.lr == 0.3
    assert tested.model.encoder.inner.layer.out_features == 4
    assert torch.equal(tested.model.encoder.layer.weight, trained.model.encoder.layer.weight)


@pytest.mark.proves("12.10")
def test_ckpt_path_brings_the_class_too() -> None:
    fit(f"--model={__name__}.Other", "--model.lr=0.3", model_class=None)

    tested = cli("test", "--ckpt_path=run.ckpt", f"--model={__name__}.Net", model_class=None)

    assert (type(tested.model), tested.model.lr) == (Other, 0.3)


@pytest.mark.proves("12.10")
@pytest.mark.parametrize("chosen", [False, True])
def test_a_checkpoint_of_a_run_without_command_line_is_merged_too(chosen: bool) -> None:
    path = tampered({"lr": 0.6})
    words = [f"--model={__name__}.Net"] if chosen else []

    tested = cli("test", f"--ckpt_path={path}", *words, model_class=None if chosen else Net)

    assert tested.model.lr == 0.6


@pytest.mark.proves("12.10")
def test_a_checkpoint_without_hyperparameters_or_no_file_changes_nothing() -> None:
    assert cli("test", f"--ckpt_path={tampered({})}", "--model.lr=0.7").model.lr == 0.7
    fit("--model.lr=0.2")
    words = ("--model.lr=0.7", "--trainer.fast_dev_run=true", "--trainer.default_root_dir=elsewhere")
    with pytest.warns(UserWarning, match="ckpt_path='last'"):
        assert cli("fit", "--ckpt_path=last", *words).model.lr == 0.7


@pytest.mark.proves("12.10")
def test_hyperparameters_that_do_not_fit_are_refused_with_the_file_s_name() -> None:
    path = tampered({"nonsense": 3})

    with pytest.raises(MisconfigurationException, match=r"--ckpt_path='evil\.ckpt'.*nonsense"):
        cli("test", f"--ckpt_path={path}")
