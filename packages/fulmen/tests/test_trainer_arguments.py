"""Arguments of the Trainer that take objects, one or several, and the contradictions among them."""

from __future__ import annotations

import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, Timer, TQDMProgressBar
from fulmen_checkpoint import TorchCheckpointIO
from fulmen_fabric import PossibleUserWarning
from fulmen_loggers import CSVLogger
from fulmen_precision import MixedPrecision
from fulmen_protocols import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:.*validation is left out", "ignore:.*in evaluation mode")


class Line(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(samples: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.ones(samples, 2), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return fulmen.Trainer(**{**quiet, **options})


@pytest.mark.proves("9.3", "9.45", "A.5")
def test_logger_takes_one_several_true_or_none(tmp_path: Path) -> None:
    one, two = CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")

    assert trainer(logger=one).loggers == [one]
    several = trainer(logger=(logger for logger in (one, two)))
    assert several.loggers == [one, two]
    assert several.logger is one
    assert trainer(logger=False).logger is None
    assert trainer(logger=[]).loggers == []
    for default in (None, True):
        root = tmp_path / str(default)
        made = trainer(logger=default, default_root_dir=root)
        assert len(made.loggers) == 1
        assert made.log_dir == os.path.join(root, "lightning_logs", "version_0")


@pytest.mark.proves("9.3")
def test_a_logger_that_is_none_is_named_with_what_it_lacks() -> None:
    class NoLogger:
        pass

    for wrong in (NoLogger(), [NoLogger()]):
        with pytest.raises(
            MisconfigurationException, match=r"logger=.*NoLogger.*lacks.*log_metrics.*Pass a logger such"
        ):
            trainer(logger=wrong)
    with pytest.raises(TypeError, match=r"logger=7 cannot be used.*CSVLogger\('logs'\), a list of them, True or False"):
        trainer(logger=7)
    with pytest.raises(TypeError, match=r"logger='wandb' cannot be used: str does not satisfy Logger"):
        trainer(logger="wandb")


@pytest.mark.proves("9.5")
def test_only_a_fit_without_an_end_is_warned_that_it_has_1000_epochs() -> None:
    class Stops(Line):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = True

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch)

    made = trainer(max_epochs=None)
    made.predict(Stops(), loader())  # a warning would be an error
    with pytest.warns(UserWarning, match="ends after 1000 epochs. Give one of them, or max_epochs=-1") as caught:
        made.fit(Stops(), loader())
    assert caught[0].filename == __file__
    made.fit_loop.max_epochs = 2
    made.fit(Stops(), loader())


def test_a_fit_that_has_nothing_left_to_train_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(max_epochs=2)
    with caplog.at_level(logging.INFO, logger="fulmen"):
        made.fit(Line(), loader())
        assert "nothing is left" not in caplog.text
        made.fit(Line(), loader())
    assert "this run has 2 epochs and 8 steps behind it, and max_epochs=2. To go on" in caplog.text

    caplog.clear()
    made.fit_loop.max_epochs = 3
    made.fit(Line(), loader())
    assert made.global_step == 12
    assert "nothing is left" not in caplog.text


def test_warnings_of_callbacks_and_optimizers_name_the_line_of_the_user(tmp_path: Path) -> None:
    class Untrained(Line):
        def configure_optimizers(self) -> Any:
            return None

    (tmp_path / "of an earlier run").touch()
    callbacks = [ModelCheckpoint(tmp_path), EarlyStopping("nothing", strict=False)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(enable_checkpointing=True, callbacks=callbacks).fit(Untrained(), loader())

    for said in ("is not empty", "returned None", "monitor='nothing'"):
        [warning] = [one for one in caught if said in str(one.message)]
        assert warning.filename == __file__, said


@pytest.mark.proves("9.3", "A.5")
def test_callbacks_take_one_several_or_none_and_any_object_with_hooks() -> None:
    heard: list[str] = []

    class Duck:
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            heard.append("duck")

    timer = Timer()
    assert trainer(callbacks=None).callbacks == []
    assert trainer(callbacks=timer).callbacks == [timer]
    given = [timer, Duck()]
    made = trainer(callbacks=given)
    made.fit(Line(), loader())
    assert made.callbacks == given
    assert made.callbacks is not given, "the list that the user holds is not the one that grows"
    assert heard == ["duck"]


@pytest.mark.proves("9.3")
def test_plugins_take_one_or_several_and_refuse_two_of_a_kind() -> None:
    io, precision = TorchCheckpointIO(), MixedPrecision("bf16-mixed", "cpu")

    assert trainer(plugins=io).strategy.checkpoint_io is io
    made = trainer(plugins=[io, precision])
    assert (made.strategy.checkpoint_io, made.precision_plugin) == (io, precision)
    with pytest.raises(MisconfigurationException, match="plugins"):
        trainer(plugins=[io, TorchCheckpointIO()])
    with pytest.raises((MisconfigurationException, TypeError), match="plugins"):
        trainer(plugins=["no plugin", 7])


@pytest.mark.proves("9.12")
def test_the_switches_add_and_leave_out_what_they_name(tmp_path: Path) -> None:
    off = trainer()
    assert (off.checkpoint_callback, off.progress_bar_callback, off.callbacks) == (None, None, [])
    for value in (None, True):
        on = trainer(
            enable_checkpointing=value,
            enable_progress_bar=value,
            enable_model_summary=value,
            default_root_dir=tmp_path,
            log_every_n_steps=None,
        )
        kinds = {type(callback).__name__ for callback in on.callbacks}
        assert "ModelCheckpoint" in kinds
        assert kinds & {"RichProgressBar", "TQDMProgressBar"}
        assert kinds & {"RichModelSummary", "ModelSummary"}
        assert on.log_every_n_steps == 50
    own = ModelCheckpoint(dirpath=tmp_path)
    assert trainer(enable_checkpointing=True, callbacks=own).checkpoint_callbacks == [own]


@pytest.mark.proves("9.12")
def test_rows_are_written_every_n_steps(tmp_path: Path) -> None:
    made = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=3)
    made.fit(Line(), loader(16))
    assert made.log_dir is not None
    rows = Path(made.log_dir, "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    assert [row.split(",")[header.index("step")] for row in rows[1:]] == ["2", "5"]

    silent = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=0)
    silent.fit(Line(), loader(16))
    assert not Path(str(silent.log_dir), "metrics.csv").exists()


@pytest.mark.proves("9.12")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"enable_checkpointing": False, "callbacks": [ModelCheckpoint()]},
            "callbacks holds a ModelCheckpoint, but enable_checkpointing=False. Drop one of the two",
        ),
        (
            {"enable_progress_bar": False, "callbacks": [TQDMProgressBar()]},
            "callbacks holds a TQDMProgressBar, but enable_progress_bar=False. Drop one of the two",
        ),
        (
            {"enable_progress_bar": True, "callbacks": [TQDMProgressBar(), RichProgressBar()]},
            "callbacks holds 2 progress bars (TQDMProgressBar, RichProgressBar); keep one",
        ),
    ],
)
def test_a_switch_and_a_callback_that_contradict_each_other_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(says)):
        trainer(**options)


@pytest.mark.proves("9.18")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_checkpointing", True),
        ("enable_progress_bar", True),
        ("enable_model_summary", True),
        ("logger", True),
        ("num_sanity_val_steps", 2),
        ("num_sanity_val_steps", -1),
        ("log_every_n_steps", 5),
        ("fast_dev_run", True),
        ("detect_anomaly", True),
    ],
)
def test_barebones_refuses_what_it_turns_off(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"barebones=True turns {name} off, but it was given as {value!r}; drop one"):
        fulmen.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "barebones": True, name: value})


@pytest.mark.proves("9.18")
def test_barebones_takes_the_same_flags_when_they_say_off() -> None:
    made = fulmen.Trainer(
        accelerator="cpu",
        max_epochs=1,
        barebones=True,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        num_sanity_val_steps=0,
        log_every_n_steps=0,
        fast_dev_run=False,
        detect_anomaly=False,
    )

    assert made.barebones
    assert (made.callbacks, made.loggers, made.log_every_n_steps, made.num_sanity_val_steps) == ([], [], 0, 0)


@pytest.mark.proves("9.19")
def test_hyperparameters_are_logged_unless_told_otherwise(tmp_path: Path) -> None:
    class WithHyperparameters(Line):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    for enabled in (True, False):
        made = trainer(logger=CSVLogger(tmp_path), enable_autolog_hparams=enabled, max_epochs=1)
        with_rows = pytest.warns(PossibleUserWarning, match="log_every_n_steps=50")
        with with_rows:
            made.fit(WithHyperparameters(width=7), loader())
        written = Path(str(made.log_dir), "hparams.yaml")
        assert (written.exists() and "width: 7" in written.read_text()) == enabled


@pytest.mark.proves("9.19")
def test_a_model_registry_is_refused_with_what_to_use_instead() -> None:
    with pytest.raises(MisconfigurationException, match=r"model_registry='team/model'.*another storage URL instead"):
        trainer(model_registry="team/model")
    with pytest.raises(TypeError, match="suggest_integrations='no' must be True or False"):
        trainer(suggest_integrations="no")


@pytest.mark.proves("9.19")
def test_no_integration_is_ever_suggested(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fulmen"):
        for suggest in (True, False):
            trainer(suggest_integrations=suggest)

    assert "litlogger" not in caplog.text
    assert "litmodels" not in caplog.text


@pytest.mark.proves("2.17")
def test_one_line_at_the_start_says_what_is_used_and_what_could_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fulmen"):
        trainer(precision="bf16-mixed")

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    others = "also usable: cuda" if torch.cuda.is_available() else "no accelerator was found"
    dtypes = "parameters float32, optimizer state float32, products bfloat16, gradients summed in float32"
    assert f"running on 1 x cpu with single_device, bf16-mixed ({dtypes}); {others}." in lines[0]
    assert "strategy='auto' chose 'single_device'" in lines[0]


@pytest.mark.proves("2.17")
@pytest.mark.parametrize("as_object", [False, True])
def test_a_gpu_that_is_left_unused_is_mentioned(as_object: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fulmen_accelerators import CPUAccelerator

    for name, value in {"is_available": True, "device_count": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1, raising=False)
    accelerator: Any = CPUAccelerator() if as_object else "cpu"
    with pytest.warns(PossibleUserWarning, match="accelerator='cpu' was asked for while 'cuda' can be used here"):
        trainer(accelerator=accelerator)


@pytest.mark.proves("3.21", "9.44")
def test_the_precision_in_use_can_be_read() -> None:
    plain, mixed, half = trainer(), trainer(precision="bf16-mixed"), trainer(precision="16-mixed")

    assert (plain.precision, plain.scaler) == ("32-true", None)
    assert (mixed.precision, mixed.scaler) == ("bf16-mixed", None)
    assert half.precision == "16-mixed"
    assert isinstance(half.scaler, torch.amp.GradScaler)
    assert half.precision_plugin.scaler is half.scaler  # type: ignore[attr-defined]  # its type does not say so
    assert type(mixed.precision_plugin) is MixedPrecision


@pytest.mark.proves("9.45", "A.5")
def test_callbacks_and_loggers_can_be_found_by_what_they_are(tmp_path: Path) -> None:
    stop, other_stop = EarlyStopping("loss"), EarlyStopping("other", strict=False)
    save, other_save = ModelCheckpoint(monitor="loss"), ModelCheckpoint(save_last=True)
    made = trainer(
        enable_checkpointing=True,
        enable_progress_bar=True,
        callbacks=[save, stop, other_stop, other_save, TQDMProgressBar()],
        default_root_dir=tmp_path,
    )

    assert (made.early_stopping_callback, made.early_stopping_callbacks) == (stop, [stop, other_stop])
    assert (made.checkpoint_callback, made.checkpoint_callbacks) == (save, [save, other_save])
    assert type(made.progress_bar_callback) is TQDMProgressBar
    assert made.default_root_dir == str(tmp_path)
    assert made.log_dir == str(tmp_path)
    assert made.ckpt_path is None
    assert made.datamodule is None
    assert (made.callback_metrics, made.logged_metrics, made.progress_bar_metrics) == ({}, {}, {})
    logger = CSVLogger(tmp_path)
    made.logger = logger
    assert made.loggers == [logger]
    made.logger = None
    assert made.loggers == []


@pytest.mark.proves("9.54")
@pytest.mark.parametrize("package", ["lightning.pytorch.core.module", "pytorch_lightning.core.module"])
def test_objects_of_the_other_framework_are_refused_with_the_import_to_change(package: str) -> None:
    theirs = type("LightningModule", (nn.Module,), {"__module__": package})
    model = type("Model", (theirs,), {})()
    data = type("LightningDataModule", (), {"__module__": package.replace("module", "datamodule")})()

    with pytest.raises(TypeError, match=f"model is a Model.*that of {package.split('.')[0]}. Import LightningModule"):
        trainer().fit(model, loader())
    with pytest.raises(TypeError, match=r"train_dataloaders is a LightningDataModule.*Import LightningDataModule from"):
        trainer().fit(Line(), data)
    with pytest.raises(TypeError, match=r"datamodule is a LightningDataModule.*Import LightningDataModule from"):
        trainer().fit(Line(), datamodule=data)


@pytest.mark.proves("9.54")
def test_optimizer_idx_is_refused_with_what_replaces_it() -> None:
    class Old(Line):
        def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Any:  # type: ignore[override]  # with other arguments, on purpose
            return None

    with pytest.raises(MisconfigurationException, match=r"takes optimizer_idx, which no longer exists. Set self.autom"):
        trainer().fit(Old(), loader())
