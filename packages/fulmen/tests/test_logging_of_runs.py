"""Loggers of a Trainer: which there are, what they are told and when; and what ``self.log`` does inside a run."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen._loggers
from fulmen import Callback, LightningDataModule, LightningModule, Trainer
from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger's folder may be relative."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


class Told:
    """A logger that notes what it is told."""

    name, version, save_dir = "told", 0, "told_here"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.calls.append(("log_metrics", dict(metrics), step))

    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        self.calls.append(("log_hyperparams", dict(params)))

    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        self.calls.append(("log_graph", type(model).__name__))

    def save(self) -> None:
        self.calls.append(("save",))

    def finalize(self, status: str) -> None:
        self.calls.append(("finalize", status))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.calls.append(("after_save_checkpoint", Path(checkpoint_callback.best_model_path).exists()))

    def all(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class Model(LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def _loader(self) -> Any:
        return DataLoader(torch.ones(6, 4), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def make_trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            **options,
        }
    )


# -- which loggers there are ---------------------------------------------------------------------------------------


@pytest.mark.proves("6.1")
@pytest.mark.parametrize("logger", [True, None])
def test_the_default_logger_is_tensorboard_named_after_the_slurm_job(
    logger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    trainer = make_trainer(tmp_path, logger=logger)

    assert isinstance(trainer.logger, TensorBoardLogger)
    assert trainer.loggers == [trainer.logger]
    assert trainer.log_dir == str(tmp_path / "lightning_logs" / "version_0")

    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert make_trainer(tmp_path, logger=logger).logger.version == "4711"  # type: ignore[union-attr]  # known to be there
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert isinstance(make_trainer(tmp_path, logger=logger).logger.version, int)  # type: ignore[union-attr]  # known to be there


@pytest.mark.proves("6.1")
def test_without_tensorboard_the_default_logger_is_csv_which_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fulmen._loggers, "find_spec", lambda name: None)

    with pytest.warns(UserWarning, match=r"logger=True means TensorBoard.*pip install 'fulmen\[tensorboard\]'"):
        trainer = make_trainer(tmp_path, logger=True)
    assert isinstance(trainer.logger, CSVLogger)

    with caplog.at_level(logging.INFO):
        assert isinstance(make_trainer(tmp_path).logger, type(None))
        assert isinstance(make_trainer(tmp_path, logger=None).logger, CSVLogger)
    assert "logger: csv" in caplog.text


@pytest.mark.proves("6.1")
def test_loggers_may_be_none_one_or_several_and_are_replaced_in_a_quick_run(tmp_path: Path) -> None:
    one, other = Told(), Told()

    assert make_trainer(tmp_path, logger=False).loggers == []
    assert make_trainer(tmp_path, logger=[]).loggers == []
    assert make_trainer(tmp_path, logger=False).logger is None
    assert make_trainer(tmp_path, logger=one).loggers == [one]
    assert make_trainer(tmp_path, logger=iter([one, other])).loggers == [one, other]
    assert make_trainer(tmp_path, logger=(one, other)).logger is one

    quick = make_trainer(tmp_path, logger=[one, other], fast_dev_run=True)
    assert [type(logger).__name__ for logger in quick.loggers] == ["DummyLogger"]
    quick.fit(Model())
    quick.logger.experiment.add_text("any", thing=1)  # type: ignore[union-attr]  # known to be there
    assert one.calls == other.calls == []


@pytest.mark.proves("6.1")
@pytest.mark.parametrize("attribute", ["logger", "loggers"])
@pytest.mark.parametrize("moment", ["before", "on_train_start"])
def test_loggers_may_be_set_at_any_time(attribute: str, moment: str, tmp_path: Path) -> None:
    told = Told()

    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", float(batch_idx))
            return super().training_step(batch, batch_idx)

        def on_train_start(self) -> None:
            if moment == "on_train_start":
                setattr(self.trainer, attribute, told if attribute == "logger" else [told])

    trainer = make_trainer(tmp_path, log_every_n_steps=1)
    if moment == "before":
        setattr(trainer, attribute, told if attribute == "logger" else [told])
    trainer.fit(Logging())

    assert [row["x"] for row, _ in told.all("log_metrics")] == [0.0, 1.0, 2.0]
    assert told.all("finalize") == [("success",)]
    trainer.logger = None
    assert trainer.loggers == []


@pytest.mark.proves("6.29")
def test_the_folder_of_a_run_is_the_first_loggers_or_the_root(tmp_path: Path) -> None:
    csv = CSVLogger(str(tmp_path / "a"), name="n", version=3)

    assert make_trainer(tmp_path).log_dir == str(tmp_path)
    assert make_trainer(tmp_path, logger=[csv, Told()]).log_dir == str(tmp_path / "a" / "n" / "version_3")
    assert make_trainer(tmp_path, logger=[Told(), csv]).log_dir == "told_here"
    board = TensorBoardLogger(str(tmp_path / "b"), name="n", version="mine")
    assert make_trainer(tmp_path, logger=board).log_dir == str(tmp_path / "b" / "n" / "mine")


# -- what they are told --------------------------------------------------------------------------------------------


@pytest.mark.proves("6.7")
@pytest.mark.parametrize(("epochs", "top_k", "saves"), [(2, -1, 2), (2, 1, 2), (1, 0, 0)])
def test_loggers_hear_of_each_checkpoint_after_it_was_written(
    epochs: int, top_k: int, saves: int, tmp_path: Path
) -> None:
    one, other = Told(), Told()
    callback = ModelCheckpoint(tmp_path, save_top_k=top_k)
    trainer = make_trainer(
        tmp_path, logger=[one, other], callbacks=[callback], enable_checkpointing=True, max_epochs=epochs
    )
    trainer.fit(Model())

    for told in (one, other):
        assert told.all("after_save_checkpoint") == [(True,)] * saves
    without = type("Without", (Told,), {"after_save_checkpoint": None})()
    keep = ModelCheckpoint(tmp_path / "other")
    make_trainer(tmp_path, logger=without, callbacks=[keep], enable_checkpointing=True).fit(Model())
    assert without.all("finalize") == [("success",)]


@pytest.mark.proves("6.8")
@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_loggers_are_told_that_a_call_succeeded(call: str, tmp_path: Path) -> None:
    told, model, order = Told(), Model(), []

    class Last(Callback):
        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            order.append(told.all("finalize"))

    getattr(make_trainer(tmp_path, logger=told, callbacks=Last()), call)(model)

    assert order == [[]], "everybody is torn down before"
    assert told.all("finalize") == [("success",)]


@pytest.mark.proves("6.8")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_loggers_are_told_that_a_call_failed(error: type[BaseException], tmp_path: Path) -> None:
    class Fails(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise error("no")

    told = Told()
    with pytest.raises(error):
        make_trainer(tmp_path, logger=told).fit(Fails())
    assert told.all("finalize") == [("failed",)]


class Configured(Model):
    def __init__(self, lr: float = 0.5, layers: list[int] | None = None, logged: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters(logger=logged, ignore="logged")


class Data(LightningDataModule):
    def __init__(self, size: int = 3, lr: float = 0.5, logged: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters(logger=logged, ignore="logged")

    def setup(self, stage: str) -> None:
        self.hparams.size = 100

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(6, 4), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


@pytest.mark.proves("6.9")
def test_initial_hyperparameters_of_both_are_logged_once_after_setup_then_the_graph(tmp_path: Path) -> None:
    told = Told()

    class Changes(Configured):
        def setup(self, stage: str) -> None:
            self.hparams.lr = 7.0
            told.calls.append(("setup",))

        def on_train_start(self) -> None:
            told.calls.append(("on_train_start",))

    make_trainer(tmp_path, logger=told).fit(Changes(layers=[1, 2]), datamodule=Data())

    expected = {"lr": 0.5, "layers": [1, 2], "size": 3}
    assert told.calls[:5] == [
        ("setup",), ("log_hyperparams", expected), ("log_graph", "Changes"), ("save",), ("on_train_start",)
    ]  # fmt: skip
    assert len(told.all("log_hyperparams")) == 1


@pytest.mark.proves("6.9")
def test_hyperparameters_are_logged_as_each_owner_and_the_trainer_wants(tmp_path: Path) -> None:
    def logged(model: LightningModule, data: LightningDataModule, **options: Any) -> Told:
        told = Told()
        make_trainer(tmp_path, logger=told, **options).fit(model, datamodule=data)
        return told

    assert logged(Configured(logged=False), Data()).all("log_hyperparams") == [({"size": 3, "lr": 0.5},)]
    neither = logged(Configured(logged=False), Data(logged=False))
    assert neither.all("log_hyperparams") == []
    assert neither.all("log_graph") == [("Configured",)], "the graph has nothing to do with it"
    off = logged(Configured(), Data(), enable_autolog_hparams=False)
    assert off.all("log_hyperparams") == off.all("log_graph") == []

    with pytest.raises(MisconfigurationException, match=r"'lr' is 0.25 in Configured and 0.5 in Data.*logger=False"):
        logged(Configured(lr=0.25), Data())


# -- self.log inside a run -----------------------------------------------------------------------------------------


@pytest.mark.proves("6.15")
def test_hooks_that_take_turns_within_a_batch_keep_all_their_values(tmp_path: Path) -> None:
    # Lightning forgets what the first batch of an epoch logged when another hook logs in between.
    losses: list[float] = []

    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                loss = super().training_step(batch, batch_idx)
                losses.append(loss.item())
                self.log("loss", loss, on_epoch=True)
                self.manual_backward(loss)
                self.optimizers().step()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log("before", 2.0, on_epoch=True)

    trainer = make_trainer(tmp_path)
    trainer.fit(Manual())

    assert len(losses) == 6
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(sum(losses) / 6)
    assert trainer.callback_metrics["before_epoch"] == 2.0


@pytest.mark.proves("6.10")
def test_recorded_values_hold_no_graph_even_if_asked_to(tmp_path: Path) -> None:
    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("kept", loss, enable_graph=True, on_epoch=True)
            assert not self.trainer.callback_metrics["kept"].requires_grad
            return loss

    trainer = make_trainer(tmp_path)
    trainer.fit(Logging())
    assert not trainer.callback_metrics["kept_epoch"].requires_grad


@pytest.mark.proves("6.12")
def test_what_would_record_nothing_is_refused(tmp_path: Path) -> None:
    class Nothing(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", 1.0, on_step=False)

    with pytest.raises(
        MisconfigurationException, match=r"'x', on_step=False, on_epoch=False\) in training_step.*set one of them"
    ):
        make_trainer(tmp_path).fit(Nothing())


@pytest.mark.proves("6.11")
@pytest.mark.parametrize("value", [{"a": 1.0}, {"a": {"b": 1.0}}, [1.0], "1", None, 1j], ids=repr)
def test_values_that_cannot_be_logged_are_refused_by_name_and_kind(value: Any, tmp_path: Path) -> None:
    class Wrong(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("it", value)

    with pytest.raises(ValueError, match=rf"'it', \.\.\.\) got a {type(value).__name__}: log a number"):
        make_trainer(tmp_path).fit(Wrong())


@pytest.mark.proves("6.11")
def test_a_module_without_a_trainer_or_with_a_bare_one_logs_nothing_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ignored: it is not attached to a Trainer"):
        Model().log("x", 1.0)

    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", 1.0)
            return super().training_step(batch, batch_idx)

    bare = Trainer(accelerator="cpu", max_epochs=1, barebones=True, default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="ignored: its Trainer was made with barebones=True"):
        bare.fit(Logging())
    assert bare.callback_metrics == {}

    model = Model()
    make_trainer(tmp_path).fit(model)
    with pytest.raises(MisconfigurationException, match="outside of a run"):
        model.log("x", 1.0)


@pytest.mark.proves("6.24")
def test_a_name_shared_by_loaders_is_one_metric_of_those_that_logged_it(tmp_path: Path) -> None:
    class Several(Model):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("both", float(dataloader_idx), add_dataloader_idx=False)
            self.log(f"own_{dataloader_idx}", 1.0, add_dataloader_idx=False)

        def val_dataloader(self) -> Any:
            return [self._loader(), DataLoader(torch.ones(2, 4), batch_size=2)]  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    results = make_trainer(tmp_path).validate(Several(), verbose=False)

    # 6 samples of the first loader and 2 of the second.
    assert results == [{"both": 0.25, "own_0": 1.0}, {"both": 0.25, "own_1": 1.0}]


@pytest.mark.proves("6.25")
def test_what_loggers_know_ends_with_the_last_batch_of_the_epoch_also_if_it_got_no_row(tmp_path: Path) -> None:
    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("at", float(batch_idx))
            return super().training_step(batch, batch_idx)

    told = Told()
    trainer = make_trainer(tmp_path, logger=told, log_every_n_steps=2)
    trainer.fit(Logging(), DataLoader(torch.ones(6, 4), batch_size=2))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    assert [row["at"] for row, _ in told.all("log_metrics") if "at" in row] == [1.0]
    assert trainer.logged_metrics["at"] == trainer.callback_metrics["at"] == 2.0


@pytest.mark.proves("6.25")
def test_metrics_of_a_run_start_from_nothing_and_end_on_the_host(tmp_path: Path) -> None:
    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train", 1.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(batch_idx), prog_bar=True)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test", 3.0, prog_bar=True)

    seen: dict[str, tuple[set[str], ...]] = {}

    class Reads(Callback):
        def _read(self, trainer: Any, moment: str) -> None:
            views = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
            seen[moment] = tuple(set(view) for view in views)

        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            self._read(trainer, "sanity check")

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._read(trainer, "train start")

        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            self._read(trainer, "test start")

    told = Told()
    trainer = make_trainer(tmp_path, logger=told, callbacks=Reads(), log_every_n_steps=1)
    trainer.fit(Logging())

    assert seen["sanity check"] == ({"val"},) * 3
    assert seen["train start"] == (set(),) * 3
    assert told.all("log_metrics")[0] == ({"train": 1.0, "epoch": 0}, 0), "no row of the sanity check"
    assert {name: (value.device.type, value.item()) for name, value in trainer.callback_metrics.items()} == {
        "train": ("cpu", 1.0), "val": ("cpu", 1.0)
    }  # fmt: skip
    assert trainer.progress_bar_metrics == {"train": 1.0, "val": 1.0}
    assert all(type(value) is float for value in trainer.progress_bar_metrics.values())

    trainer.test(Logging(), verbose=False)
    assert seen["test start"] == (set(),) * 3
    assert set(trainer.callback_metrics) == {"test"}


@pytest.mark.proves("6.26")
@pytest.mark.parametrize("call", ["validate", "test"])
def test_results_are_printed_unless_told_otherwise(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Logging(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("some_value", 0.25, on_step=True, on_epoch=True)

        test_step = validation_step

    trainer = make_trainer(tmp_path)
    assert getattr(trainer, call)(Logging(), verbose=False) == [{"some_value_epoch": 0.25}]
    assert capsys.readouterr().out == ""
    getattr(trainer, call)(Logging())
    assert "some_value_epoch" in capsys.readouterr().out


# -- torchmetrics --------------------------------------------------------------------------------------------------


def torchmetrics() -> ModuleType:
    return pytest.importorskip("torchmetrics")  # type: ignore[no-any-return]  # Any by its nature


@pytest.mark.proves("6.19")
def test_metric_objects_start_each_evaluation_and_each_run_from_nothing(tmp_path: Path) -> None:
    counts: list[float] = []

    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torchmetrics().SumMetric()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.update(torch.ones(len(batch)))
            self.log("seen", self.seen)

        test_step = validation_step

        def on_validation_end(self) -> None:
            counts.append(self.trainer.callback_metrics["seen"].item())

    model = Counting()
    trainer = make_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(model)
    assert counts == [2.0, 6.0, 6.0], "the sanity check's batch is in none of the others"
    assert trainer.validate(model, verbose=False) == [{"seen": 6.0}]
    assert make_trainer(tmp_path).test(model, verbose=False) == [{"seen": 6.0}], "another Trainer, the same object"


@pytest.mark.proves("6.19")
def test_a_run_that_failed_leaves_nothing_behind_in_metric_objects(tmp_path: Path) -> None:
    class Fails(Model):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.fails = torchmetrics().SumMetric(), True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.update(torch.ones(len(batch)))
            self.log("seen", self.seen, on_step=False, on_epoch=True)
            if self.fails and batch_idx == 1:
                raise RuntimeError
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError):
        make_trainer(tmp_path).fit(model)
    model.fails = False
    trainer = make_trainer(tmp_path)
    trainer.fit(model)
    assert trainer.callback_metrics["seen"] == 6.0


@pytest.mark.proves("6.19")
def test_a_metric_object_is_found_by_identity_or_by_the_attribute_that_is_named(tmp_path: Path) -> None:
    class Held(Model):
        def __init__(self, attribute: str | None, inside: bool) -> None:
            super().__init__()
            metric = torchmetrics().MeanMetric()
            self.box = nn.ModuleDict({"m": metric}) if inside else nn.ModuleDict()
            self.attribute, self.hidden = attribute, [metric]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.hidden[0](2.0)
            self.log("m", self.hidden[0], metric_attribute=self.attribute, on_epoch=True)
            return super().training_step(batch, batch_idx)

    for attribute in (None, "box.m"):
        trainer = make_trainer(tmp_path)
        trainer.fit(Held(attribute, inside=True))
        assert trainer.callback_metrics["m_epoch"] == 2.0
    with pytest.raises(
        MisconfigurationException, match=r"'m', \.\.\.\) got a MeanMetric that is no attribute of Held.*"
    ):
        make_trainer(tmp_path).fit(Held(None, inside=False))
    with pytest.raises(
        MisconfigurationException, match=r"metric_attribute='layer'\): that attribute of Held is Linear"
    ):
        make_trainer(tmp_path).fit(Held("layer", inside=True))


@pytest.mark.proves("6.19")
@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        ({"a": 1}, {}, "logged as 'm' gave a dict.*log_dict the parts"),
        (torch.ones(3), {}, r"'m' computed a tensor of shape \(3,\).*logger=False, prog_bar=False"),
        (torch.ones(3), {"logger": False}, None),
    ],
)
def test_what_a_metric_object_computes_must_fit_where_it_goes(
    value: Any, options: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    class Computes(torchmetrics().Metric):  # type: ignore[misc,name-defined]  # the base class is chosen at run time: Lightning's or ours
        def update(self) -> None: ...

        def compute(self) -> Any:
            return value

    class Holds(Model):
        def __init__(self) -> None:
            super().__init__()
            self.m = Computes()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.m.update()
            self.log("m", self.m, **options)

    trainer = make_trainer(tmp_path)
    if words is None:
        trainer.validate(Holds(), verbose=False)
        assert trainer.callback_metrics["m"].tolist() == [1.0, 1.0, 1.0]
    else:
        with pytest.raises(ValueError, match=words):
            trainer.validate(Holds(), verbose=False)


def test_torchmetrics_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("POSSIBLE_USER_WARNINGS", "off")  # advice about the loaders is beside the point
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(tmp_path).fit(Model())
    assert "torchmetrics" not in sys.modules


# -- Fabric --------------------------------------------------------------------------------------------------------


@pytest.mark.proves("6.28")
def test_in_a_fabric_values_go_to_its_loggers_at_once_and_unreduced() -> None:
    from fulmen_fabric import Fabric

    told = Told()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[told])
    model = Model()
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert wrapped is not None

    model.log("a", torch.tensor([2.0], requires_grad=True), on_epoch=True, reduce_fx="sum", sync_dist=True)
    model.log_dict({"b": 1, "c": torch.tensor(0.5)}, prog_bar=True)
    model.log("b", 3.0)
    model.log("hidden", 1.0, logger=False)
    model.log_dict({"hidden": 1.0}, logger=False)

    assert told.all("log_metrics") == [({"a": 2.0}, None), ({"b": 1, "c": 0.5}, None), ({"b": 3.0}, None)]
    for value, found in (({"x": 1.0}, "dict"), ("1", "str"), (torch.ones(2), r"Tensor of shape \(2,\)")):
        with pytest.raises(ValueError, match=f"'d', ...\\) got a {found}; under a Fabric give a number"):
            model.log("d", value)
        with pytest.raises(ValueError, match="under a Fabric give a number"):
            model.log_dict({"d": value})
