"""LightningCLI in this process: what it parses, builds, saves and runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from jsonargparse import lazy_instance
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningDataModule, LightningModule, Trainer
from fulmen.callbacks import Callback
from fulmen.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerCallable,
    OptimizerCallable,
    ReduceLROnPlateau,
    SaveConfigCallback,
    instantiate_class,
)
from fulmen.loggers import CSVLogger
from fulmen.strategies import DDPStrategy
from fulmen_protocols import MisconfigurationException, MissingPackage

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 1,
    "accelerator": "cpu",
}


class Net(LightningModule):
    def __init__(self, width: int = 3, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)
        self.drawn = torch.rand(1).item()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).pow(2).mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.layer(batch[0]).pow(2).mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0])

    def loader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(8, self.layer.in_features)), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class WithOptimizer(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.setups: list[str] = []

    def setup(self, stage: str) -> None:
        self.setups.append(stage)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=self.batch_size)


class Plain:
    """Not a subclass of anything of ours."""

    def __init__(self, note: str = "n") -> None:
        self.note = note

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.note += "!"


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)


def cli(*argv: str, cls: type[LightningCLI] = LightningCLI, **options: Any) -> Any:
    defaults = {**QUIET, **options.pop("trainer_defaults", {})}
    options.setdefault("model_class", WithOptimizer)
    options.setdefault("seed_everything_default", 1)
    options.setdefault("run", False)
    options.setdefault("args", list(argv))
    return cls(trainer_defaults=defaults, **options)


# ---------------------------------------------------------------------- the Trainer's arguments


@pytest.mark.proves("12.2", "12.5")
def test_every_argument_of_the_trainer_is_there_and_typed(capsys: pytest.CaptureFixture[str]) -> None:
    import inspect

    names = set(inspect.signature(Trainer).parameters)
    assert set(vars(cli().config.trainer)) == names

    for name in sorted(
        names - {"accelerator", "strategy", "precision", "max_time", "default_root_dir", "model_registry"}
    ):
        if name in ("devices", "profiler", "gradient_clip_algorithm", "val_check_interval"):
            continue  # these take any text: a name, or a duration
        with pytest.raises(SystemExit):
            cli(f"--trainer.{name}=certainly wrong")
        assert f'"trainer.{name}"' in capsys.readouterr().err


def test_the_weighting_of_losses_is_an_argument_and_in_the_printed_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli("--trainer.loss_weighting=weights").trainer.loss_weighting == "weights"
    with pytest.raises(SystemExit):
        cli("--trainer.loss_weighting=weights", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["loss_weighting"] == "weights"


@pytest.mark.proves("12.2", "12.7")
def test_our_own_classes_are_known_by_their_short_names() -> None:
    built = cli(
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=loss",
        "--trainer.callbacks.patience=7",
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.logger+=CSVLogger",
        "--trainer.logger.save_dir=one",
        "--trainer.logger+=CSVLogger",
        "--trainer.logger.save_dir=two",
        "--trainer.strategy=DDPStrategy",
        "--trainer.accelerator=CPUAccelerator",
    )

    stopping, rates = built.trainer.callbacks[:2]
    assert (type(stopping).__name__, stopping.patience, stopping.monitor) == ("EarlyStopping", 7, "loss")
    assert type(rates).__name__ == "LearningRateMonitor"
    assert [type(logger) for logger in built.trainer.loggers] == [CSVLogger, CSVLogger]
    assert [logger.save_dir for logger in built.trainer.loggers] == ["one", "two"]
    assert isinstance(built.config_init.trainer.strategy, DDPStrategy)
    assert type(built.config_init.trainer.accelerator).__name__ == "CPUAccelerator"


@pytest.mark.proves("12.2")
def test_backends_are_still_chosen_by_name() -> None:
    built = cli("--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.precision=bf16-mixed")

    assert (built.config.trainer.strategy, built.config.trainer.accelerator) == ("ddp", "cpu")
    assert built.trainer.precision == "bf16-mixed"


@pytest.mark.proves("12.7")
def test_any_object_with_a_hook_is_a_callback() -> None:
    built = cli(f"--trainer.callbacks+={__name__}.Plain", "--trainer.callbacks.note=mine")
    built.trainer.fit(built.model)

    assert [one.note for one in built.trainer.callbacks if isinstance(one, Plain)] == ["mine!"]


def test_a_class_that_is_no_callback_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("--trainer.callbacks+=torch.nn.Linear")

    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "trainer.callbacks" in error
    assert "torch.nn.Linear" in error


def test_help_for_a_class_shows_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("--trainer.callbacks.help=EarlyStopping")

    assert stop.value.code == 0
    assert "patience" in capsys.readouterr().out


@pytest.mark.proves("12.1", "12.7")
def test_defaults_for_the_trainer_may_be_objects_and_callbacks_always_come() -> None:
    class Mine(Callback):
        pass

    always = Mine()
    defaults = {"logger": lazy_instance(CSVLogger, save_dir="logs"), "callbacks": always, "max_steps": 6}
    built = cli("--trainer.callbacks+=Timer", trainer_defaults=defaults)
    replaced = cli("--trainer.logger.save_dir=there", "--trainer.max_steps=5", trainer_defaults=defaults)

    assert [logger.save_dir for logger in (built.trainer.logger, replaced.trainer.logger)] == ["logs", "there"]
    assert [one.trainer.max_steps for one in (built, replaced)] == [6, 5]
    names = [type(one).__name__ for one in built.trainer.callbacks]
    assert names[:3] == ["Timer", "Mine", "SaveConfigCallback"]
    assert built.trainer.callbacks[1] is always


def test_defaults_that_no_configuration_can_hold_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"trainer_defaults\['logger'\] is a CSVLogger.*lazy_instance"):
        cli(trainer_defaults={"logger": CSVLogger("logs")})
    with pytest.raises(MisconfigurationException, match=r"'max_epoch', which Trainer.*Did you mean 'max_epochs'"):
        cli(trainer_defaults={"max_epoch": 3})


@pytest.mark.proves("12.2")
def test_a_function_with_a_written_annotation_stands_for_a_class() -> None:
    built = cli("--model.size=4", model_class=make_net)

    assert built.model.layer.in_features == 8
    # What the function was given is nothing that the class could be built from.
    assert built.model.hparams == {"width": 8, "lr": 0.1}


def make_net(size: int) -> Net:
    return Net(width=2 * size)


def test_a_function_without_annotation_is_refused() -> None:
    def make(size: int):  # type: ignore[no-untyped-def]  # untyped on purpose
        return Net(size)

    with pytest.raises(MisconfigurationException, match="return annotation"):
        cli(model_class=make)


def test_something_else_than_a_class_of_a_run_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"torch\.nn.*Linear.* for 'model'"):
        cli(model_class=nn.Linear)


def test_a_wrong_class_for_an_optimizer_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"add_optimizer_args got .*Linear.* for 'opt'"):
        LightningArgumentParser().add_optimizer_args(nn.Linear, "opt")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(MisconfigurationException, match=r"add_lr_scheduler_args got .*Adam"):
        LightningArgumentParser().add_lr_scheduler_args((torch.optim.Adam,))  # type: ignore[arg-type]  # wrong on purpose


# ---------------------------------------------------------------------- configuration


@pytest.mark.proves("12.3")
def test_the_printed_configuration_gives_the_same_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--model={__name__}.Net", "--model.width=4",
            "--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00",
            "--optimizer=Adam", "--optimizer.lr=0.5", f"--data={__name__}.Data", "--data.batch_size=3"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli(*argv, "--print_config", model_class=None)
    assert stop.value.code == 0
    Path("config.yaml").write_text(capsys.readouterr().out)

    direct, again = cli(*argv, model_class=None), cli("--config=config.yaml", model_class=None)

    del again.config["config"], direct.config["config"]
    assert again.config == direct.config
    assert again.datamodule.batch_size == 3


@pytest.mark.proves("12.3")
def test_the_saved_configuration_repeats_the_run() -> None:
    first = cli("fit", "--model.lr=0.3", "--trainer.max_steps=2", run=True, trainer_defaults={"default_root_dir": "a"})

    again = cli("fit", "--config=a/config.yaml", "--trainer.default_root_dir=b", run=True)

    assert again.trainer.global_step == first.trainer.global_step == 2
    assert torch.equal(again.model.layer.weight, first.model.layer.weight)
    written, rewritten = (yaml.safe_load(Path(f"{name}/config.yaml").read_text()) for name in "ab")
    rewritten["trainer"]["default_root_dir"] = "a"
    assert written == rewritten


@pytest.mark.proves("12.3")
@pytest.mark.parametrize("kind", ["list", "dict", "namespace"])
def test_arguments_may_be_words_a_dict_or_a_namespace(kind: str) -> None:
    from jsonargparse import Namespace

    args: ArgsType = ["--model.width=4", "--trainer.max_epochs=2"]
    if kind == "dict":
        args = {"model": {"width": 4}, "trainer": {"max_epochs": 2}}
    elif kind == "namespace":
        args = Namespace(model=Namespace(width=4), trainer=Namespace(max_epochs=2))

    built = cli(args=args)

    assert (built.model.layer.in_features, built.trainer.max_epochs) == (4, 2)


@pytest.mark.proves("12.3")
def test_without_args_those_of_the_process_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--model.width=6"])

    assert cli(args=None).model.layer.in_features == 6


def test_arguments_of_the_process_that_are_not_read_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--model.width=6"])

    with pytest.warns(UserWarning, match=r"--model\.width=6.*are not read"):
        assert cli("--model.width=4").model.layer.in_features == 4


@pytest.mark.proves("12.3")
def test_a_part_of_a_configuration_may_be_a_file_of_its_own() -> None:
    Path("model.yaml").write_text("width: 5\n")
    Path("callbacks.yaml").write_text("- class_path: EarlyStopping\n  init_args: {monitor: loss, patience: 9}\n")

    built = cli("--model=model.yaml", "--trainer.callbacks=callbacks.yaml")

    assert built.model.layer.in_features == 5
    assert built.trainer.callbacks[0].patience == 9


@pytest.mark.proves("12.3")
@pytest.mark.parametrize(("mode", "package"), [("jsonnet", "_jsonnet"), ("omegaconf", "omegaconf")])
def test_other_languages_of_configuration_work_where_they_are_installed(mode: str, package: str) -> None:
    pytest.importorskip(package)
    Path("config.yaml").write_text(
        '{model: {width: 2, lr: "${model.width}"}}'
        if mode == "omegaconf"
        else "local w = 2; {model: {width: w, lr: w}}"
    )

    built = cli("--config=config.yaml", parser_kwargs={"parser_mode": mode})

    assert (built.model.hparams.width, built.model.hparams.lr) == (2, 2.0)


def test_a_missing_language_of_configuration_is_named() -> None:
    with pytest.raises(MissingPackage, match=r"parser_mode='toml'.*pip install toml"):
        cli(parser_kwargs={"parser_mode": "toml"})


@pytest.mark.proves("12.3")
def test_help_of_a_subcommand_lists_all_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("fit", "--help", run=True)

    text = capsys.readouterr().out
    for argument in ("--config", "--print_config", "--trainer.max_epochs", "--model.width", "--data", "--optimizer",
                     "--lr_scheduler", "--ckpt_path", "--seed_everything"):  # fmt: skip
        assert argument in text
    assert "or 0 with a warning" in " ".join(text.split())


# ---------------------------------------------------------------------- extension points


class Recording(LightningCLI):
    order: ClassVar[list[str]] = []

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.order.append("default")
        super().add_default_arguments_to_parser(parser)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.order.append("core")
        super().add_core_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.order.append("own")

    def before_instantiate_classes(self) -> None:
        self.order.append(f"before {hasattr(self, 'model')}")

    def instantiate_classes(self) -> None:
        self.order.append("instantiate")
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.order.append("trainer")
        return super().instantiate_trainer(max_epochs=2, **kwargs)

    def after_instantiate_classes(self) -> None:
        self.order.append(f"after {hasattr(self, 'trainer')}")

    def before_fit(self) -> None:
        self.order.append("before_fit")

    def after_fit(self) -> None:
        self.order.append(f"after_fit {self.trainer.current_epoch}")

    def before_validate(self) -> None:
        self.order.append("before_validate")

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        self.order.append(f"validate {sorted(kwargs)}")


@pytest.mark.proves("12.4")
def test_the_methods_to_override_are_called_in_order() -> None:
    Recording.order.clear()

    cli("fit", cls=Recording, run=True)

    parser = ["default", "core", "own"]
    assert Recording.order == [
        *parser * 4, "before False", "instantiate", "trainer", "after True", "before_fit", "after_fit 2",
    ]  # fmt: skip


@pytest.mark.proves("12.4")
def test_a_method_named_like_a_subcommand_replaces_it() -> None:
    Recording.order.clear()

    cli("validate", cls=Recording, run=True)

    assert Recording.order[-2:] == ["before_validate", "validate ['ckpt_path', 'verbose', 'weights_only']"]


@pytest.mark.proves("12.2", "12.4")
def test_a_subcommand_may_be_added() -> None:
    class Tuning(Trainer):
        def sweep(self, model: LightningModule, datamodule: object = None, steps: int = 3) -> None:
            """Try several. And more."""
            self.swept = (model, steps)

    class WithSweep(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {**LightningCLI.subcommands(), "sweep": {"model", "datamodule"}}

    built = cli("sweep", "--steps=5", cls=WithSweep, trainer_class=Tuning, run=True)

    assert built.trainer.swept == (built.model, 5)
    with pytest.raises(MisconfigurationException, match=r"'sweep', and Trainer has no such method"):
        cli("sweep", cls=WithSweep, run=True)


@pytest.mark.proves("12.4", "12.6")
def test_configure_optimizers_may_be_overridden() -> None:
    class Frequent(LightningCLI):
        @staticmethod
        def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    built = cli("--optimizer=SGD", "--optimizer.lr=1", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1",
                "--lr_scheduler.gamma=0.5", model_class=Net, cls=Frequent)  # fmt: skip
    built.trainer.fit(built.model)

    assert built.trainer.optimizers[0].param_groups[0]["lr"] == 0.25


@pytest.mark.proves("12.2")
@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_a_subcommand_gives_module_data_and_its_own_arguments_to_the_trainer(subcommand: str) -> None:
    class Loaders(Data):
        val_dataloader = test_dataloader = predict_dataloader = Data.train_dataloader

    ran = cli(subcommand, datamodule_class=Loaders, run=True)

    stages = {"fit": ["fit"], "validate": ["validate"], "test": ["test"], "predict": ["predict"]}
    assert (ran.subcommand, ran.datamodule.setups) == (subcommand, stages[subcommand])
    assert ran.trainer.datamodule is ran.datamodule
    assert ran.trainer.lightning_module is ran.model


# ---------------------------------------------------------------------- optimizers


@pytest.mark.proves("12.6")
def test_an_automatic_optimizer_trains_as_the_same_one_in_code() -> None:
    built = cli("--optimizer=Adam", "--optimizer.lr=0.2", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.9",
                model_class=Net, trainer_defaults={"max_epochs": 3})  # fmt: skip
    weight = built.model.layer.weight.detach().clone()
    bias = built.model.layer.bias.detach().clone()
    built.trainer.fit(built.model)

    raw = nn.Linear(3, 1)
    raw.load_state_dict({"weight": weight, "bias": bias})
    optimizer = torch.optim.Adam(raw.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for _ in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            raw(torch.ones(4, 3)).pow(2).mean().backward()
            optimizer.step()
        schedule.step()
    assert torch.equal(built.model.layer.weight, raw.weight)
    assert torch.equal(built.model.layer.bias, raw.bias)


@pytest.mark.proves("12.6")
def test_a_plateau_by_its_short_name_needs_the_value_it_follows(capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = ("--optimizer=SGD", "--optimizer.lr=1", "--lr_scheduler=ReduceLROnPlateau")
    built = cli(*optimizer, "--lr_scheduler.monitor=loss", "--lr_scheduler.patience=4", model_class=Net)
    made = built.model.configure_optimizers()

    assert isinstance(made["lr_scheduler"]["scheduler"], ReduceLROnPlateau)
    assert (made["lr_scheduler"]["monitor"], made["lr_scheduler"]["scheduler"].patience) == ("loss", 4)
    with pytest.raises(SystemExit):
        cli(*optimizer, model_class=Net)
    assert "monitor" in capsys.readouterr().err


@pytest.mark.proves("12.6")
def test_replacing_a_module_s_own_configure_optimizers_is_said() -> None:
    with pytest.warns(UserWarning, match=r"WithOptimizer\.configure_optimizers is replaced .* torch\.optim\.Adam"):
        built = cli("--optimizer=Adam")

    assert isinstance(built.model.configure_optimizers(), torch.optim.Adam)


@pytest.mark.proves("12.6")
def test_parameters_that_are_made_later_are_optimized_too() -> None:
    class Late(Net):
        def __init__(self) -> None:
            LightningModule.__init__(self)

        def configure_model(self) -> None:
            if not hasattr(self, "layer"):
                self.layer = nn.Linear(3, 1)

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=4)

        val_dataloader = train_dataloader

    built = cli("--optimizer=SGD", "--optimizer.lr=0.1", model_class=Late)
    built.trainer.fit(built.model)

    assert built.trainer.global_step == 2


@pytest.mark.proves("12.6")
def test_two_automatic_optimizers_are_refused() -> None:
    class Two(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_optimizer_args(torch.optim.Adam, "one")
            parser.add_optimizer_args(torch.optim.SGD, "two")

    with pytest.raises(MisconfigurationException, match=r"\['one', 'two', 'lr_scheduler'\] with link_to='AUTOMATIC'"):
        cli("--one.lr=1", "--two.lr=1", cls=Two)


class Injected(Net):
    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.SGD,
        schedule: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ) -> None:
        super().__init__()
        self.optimizer, self.schedule = optimizer, schedule

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [self.schedule(optimizer)]


@pytest.mark.proves("12.6")
def test_optimizers_and_schedules_are_injected_as_callables() -> None:
    built = cli("--model.optimizer=Adam", "--model.optimizer.lr=0.01", "--model.schedule=StepLR",
                "--model.schedule.step_size=3", model_class=Injected)  # fmt: skip
    (optimizer,), (schedule,) = built.model.configure_optimizers()

    assert (type(optimizer).__name__, optimizer.param_groups[0]["lr"]) == ("Adam", 0.01)
    assert (type(schedule).__name__, schedule.step_size) == ("StepLR", 3)


@pytest.mark.proves("12.12")
def test_instantiate_class_builds_what_a_configuration_names() -> None:
    parameters = list(nn.Linear(1, 1).parameters())

    optimizer = instantiate_class(parameters, {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}})
    pair = instantiate_class((2, 3), {"class_path": "torch.nn.Linear"})

    assert optimizer.param_groups[0]["lr"] == 0.5
    assert (pair.in_features, pair.out_features) == (2, 3)
    for path in ("torch.optim.SDG", "Adam", "nowhere.Adam"):
        with pytest.raises(MisconfigurationException, match=f"class_path='{path}'.*full path"):
            instantiate_class(parameters, {"class_path": path})


# ---------------------------------------------------------------------- seeds, attributes, saving


@pytest.mark.proves("12.9")
@pytest.mark.parametrize(
    ("default", "environment", "expected"), [(True, None, 0), (True, "13", 13), (7, None, 7), (7, "13", 7)]
)
def test_the_seed_is_set_before_anything_is_built_and_recorded(
    default: bool | int, environment: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", environment)
    if default is True and environment is None:
        with pytest.warns(UserWarning, match="using 0"):
            built = cli(model_class=Drawing, seed_everything_default=default)
    else:
        built = cli(model_class=Drawing, seed_everything_default=default)

    assert built.config.seed_everything == expected
    import os

    assert os.environ["PL_SEED_WORKERS"] == "1"
    torch.manual_seed(expected)
    assert built.model.drawn == torch.rand(1).item()


class Drawing(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.drawn = torch.rand(1).item()


@pytest.mark.proves("12.9")
def test_no_seed_leaves_the_generators_alone() -> None:
    import os

    torch.manual_seed(123)
    built = cli(model_class=Drawing, seed_everything_default=False)

    torch.manual_seed(123)
    assert built.model.drawn == torch.rand(1).item()
    assert built.config.seed_everything is False
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.proves("12.12")
def test_what_the_object_holds() -> None:
    built = cli("fit", f"--data={__name__}.Data", "--model.width=3", run=True)

    assert built.subcommand == "fit"
    assert isinstance(built.parser, LightningArgumentParser)
    assert built.config.fit.data.class_path.endswith("Data")
    assert built.config_init.fit.model is built.model
    assert built.config_init.fit.data is built.datamodule
    assert built.config_dump["model"] == {"width": 3, "lr": 0.1}
    assert isinstance(built.trainer, Trainer)
    assert cli().subcommand is None
    assert cli().datamodule is None


@pytest.mark.proves("11.21", "12.8")
def test_the_configuration_is_written_beside_the_results_and_never_over_another() -> None:
    cli("fit", "--model.width=4", run=True, trainer_defaults={"default_root_dir": "out"})
    written = yaml.safe_load(Path("out/config.yaml").read_text())

    assert (written["model"]["width"], written["seed_everything"]) == (4, 1)
    assert Path("out/config.yaml").read_text().startswith("# fulmen==")
    with pytest.raises(RuntimeError, match=r"found 'out/config\.yaml'.*overwrite"):
        cli("fit", run=True, trainer_defaults={"default_root_dir": "out"})
    cli("fit", run=True, trainer_defaults={"default_root_dir": "out"}, save_config_kwargs={"overwrite": True})
    assert yaml.safe_load(Path("out/config.yaml").read_text())["model"]["width"] == 3


@pytest.mark.proves("12.8")
def test_with_a_logger_each_run_has_a_configuration_of_its_own() -> None:
    for _ in range(2):
        cli("fit", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", run=True)

    assert sorted(str(path) for path in Path("logs").rglob("config.yaml")) == [
        f"logs/lightning_logs/version_{n}/config.yaml" for n in range(2)
    ]


@pytest.mark.proves("11.21", "12.8")
def test_it_is_written_once_under_any_name_and_not_in_a_quick_run() -> None:
    built = cli("fit", run=True, save_config_kwargs={"config_filename": "run.yaml"})
    built.trainer.test(built.model)
    assert Path("run.yaml").is_file()

    cli("fit", "--trainer.fast_dev_run=true", run=True)
    cli("fit", run=True, save_config_callback=None)
    assert not Path("config.yaml").exists()


@pytest.mark.proves("12.8")
def test_several_files_stay_several() -> None:
    Path("in").mkdir()
    Path("in/model.yaml").write_text("width: 5\n")
    Path("in/main.yaml").write_text("model: model.yaml\n")

    cli("fit", "--config=in/main.yaml", run=True, save_config_kwargs={"multifile": True},
        trainer_defaults={"default_root_dir": "out"})  # fmt: skip

    assert yaml.safe_load(Path("out/config.yaml").read_text())["model"] == "model.yaml"
    assert yaml.safe_load(Path("out/model.yaml").read_text())["width"] == 5


@pytest.mark.proves("11.21", "12.8")
def test_save_config_may_store_it_elsewhere() -> None:
    stored: list[Any] = []

    class Elsewhere(SaveConfigCallback):
        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            stored.append((self.parser.dump(self.config), stage))

    cli(
        "fit",
        "--model.width=4",
        run=True,
        save_config_callback=Elsewhere,
        save_config_kwargs={"save_to_log_dir": False},
    )

    ((text, stage),) = stored
    assert (yaml.safe_load(text)["model"]["width"], stage) == (4, "fit")
    assert not Path("config.yaml").exists()
    with pytest.raises(MisconfigurationException, match="save_to_log_dir=False"):
        cli(save_config_kwargs={"save_to_log_dir": False})


@pytest.mark.proves("12.8")
def test_it_is_written_to_a_url_too() -> None:
    import fsspec  # type: ignore[import-untyped]  # it has no types

    cli("fit", "--model.width=4", run=True, trainer_defaults={"default_root_dir": "memory://runs/one"})

    with fsspec.open("memory://runs/one/config.yaml", "r") as stream:
        assert yaml.safe_load(stream)["model"]["width"] == 4
