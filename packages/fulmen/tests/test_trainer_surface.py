"""What callbacks and other projects read from a Trainer, and what they may set."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fulmen
from fulmen.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from fulmen_data import CombinedLoader
from fulmen_loggers import CSVLogger

pytestmark = pytest.mark.filterwarnings("ignore:.*validation is left out", "ignore:log_every_n_steps")


class Line(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).sum()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("hidden", loss, logger=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch.mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", batch.mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch.sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


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
        "num_sanity_val_steps": 0,
    }
    return fulmen.Trainer(**{**quiet, **options})


@pytest.mark.proves("9.44", "A.1", "A.5")
def test_a_run_of_one_process_tells_where_and_what_it_runs() -> None:
    run, model = trainer(), Line()
    run.fit(model, loader())

    assert (run.global_rank, run.local_rank, run.node_rank, run.world_size) == (0, 0, 0, 1)
    assert (run.is_global_zero, run.num_nodes, run.num_devices) == (True, 1, 1)
    assert len(run.device_ids) == 1
    assert run.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}
    assert run.strategy.root_device == torch.device("cpu")
    assert run.accelerator.name() == "cpu"
    assert run.lightning_module is model
    assert run.model is model
    assert [type(optimizer) for optimizer in run.optimizers] == [torch.optim.SGD]
    assert type(run.lr_scheduler_configs[0].scheduler) is torch.optim.lr_scheduler.StepLR
    one = torch.tensor([1.0, 2.0])
    run.strategy.barrier("here")
    assert run.strategy.broadcast({"a": 1}) == {"a": 1}
    assert torch.equal(run.strategy.reduce(one), one)
    assert torch.equal(run.strategy.all_gather(one), one), "no first dimension for one process"
    assert run.strategy.reduce_boolean_decision(True)
    assert not run.strategy.reduce_boolean_decision(False, all=False)


@pytest.mark.proves("9.44")
def test_optimizers_can_be_replaced_during_a_run() -> None:
    class Replace(fulmen.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.0)]
                self.weight = pl_module.layer.weight.detach().clone()

    replace, model = Replace(), Line()
    run = trainer(max_epochs=2, callbacks=replace)
    run.fit(model, loader())

    assert run.optimizers[0].param_groups[0]["lr"] == 0.0
    assert torch.equal(model.layer.weight, replace.weight), "the new optimizer was used from its first batch on"


@pytest.mark.proves("9.45", "A.4")
def test_metrics_are_there_when_pruning_callbacks_read_them(tmp_path: Path) -> None:
    class Pruning(fulmen.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen["validation end"] = dict(trainer.callback_metrics)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen["train epoch end"] = dict(trainer.callback_metrics)

    seen: dict[str, Any] = {}
    run = trainer(callbacks=[Pruning()], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(Line(), loader(), loader())

    assert set(seen["validation end"]) >= {"val", "loss", "loss_step", "hidden"}
    assert set(seen["train epoch end"]) >= {"val", "loss_epoch"}
    assert all(isinstance(value, torch.Tensor) for value in run.callback_metrics.values())
    assert set(run.logged_metrics) == {"loss_step", "loss_epoch", "val"}, "what loggers were told"
    assert set(run.progress_bar_metrics) == {"loss_step", "loss_epoch"}
    assert isinstance(run.progress_bar_metrics["loss_step"], float)
    run.callback_metrics["own"] = torch.ones(())
    assert run.callback_metrics["own"] == 1, "the dict can be added to"
    assert run.log_dir == str(tmp_path / "lightning_logs" / "version_0")


@pytest.mark.proves("9.45", "A.5")
def test_objects_of_the_last_call_can_be_read() -> None:
    class Data(fulmen.LightningDataModule):
        def train_dataloader(self) -> Any:
            return train

        def val_dataloader(self) -> Any:
            return [val, val]

    train, val, test = loader(), loader(4), loader(2)
    data = Data()
    run = trainer()

    class Model(Line):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    run.fit(Model(), datamodule=data)
    assert run.datamodule is data
    assert run.train_dataloader is train
    assert run.val_dataloaders == [val, val]
    named = {"a": val, "b": test}
    for given in (named, CombinedLoader(named, "sequential")):
        run.validate(dataloaders=given, verbose=False)
        assert run.val_dataloaders == named
    run.test(dataloaders=test, verbose=False)
    run.predict(dataloaders=test)
    assert run.test_dataloaders is test
    assert run.predict_dataloaders is test
    assert run.train_dataloader is train
    assert run.num_test_batches == [1]


@pytest.mark.proves("9.46", "A.3")
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("training", RunningStage.TRAINING),
        ("validating", RunningStage.VALIDATING),
        ("testing", RunningStage.TESTING),
        ("predicting", RunningStage.PREDICTING),
        ("sanity_checking", RunningStage.SANITY_CHECKING),
    ],
)
def test_the_stage_can_be_read_and_set(name: str, stage: RunningStage) -> None:
    run = trainer()
    assert not getattr(run, name)
    setattr(run, name, True)
    assert run.state.stage is stage
    assert getattr(run, name)
    assert run.evaluating == (name in ("validating", "testing", "sanity_checking"))
    setattr(run, name, False)
    assert run.state.stage is None


@pytest.mark.proves("9.43", "A.3")
def test_states_are_lightnings_by_name_and_value() -> None:
    assert [status.value for status in TrainerStatus] == ["initializing", "running", "finished", "interrupted"]
    assert [fn.value for fn in TrainerFn] == ["fit", "validate", "test", "predict"]
    assert [stage.value for stage in RunningStage] == ["train", "sanity_check", "validate", "test", "predict"]
    prefixes = {stage.value: stage.dataloader_prefix for stage in RunningStage}
    assert prefixes == {
        "train": "train", "sanity_check": "val", "validate": "val", "test": "test", "predict": "predict",
    }  # fmt: skip
    evaluating = {stage.value for stage in RunningStage if stage.evaluating}
    assert evaluating == {"sanity_check", "validate", "test"}
    state = TrainerState()
    assert (state.status, state.fn, state.stage, state.finished, state.stopped) == (
        "initializing", None, None, False, False,
    )  # fmt: skip
    state.status = TrainerStatus.INTERRUPTED
    assert (state.finished, state.stopped) == (False, True)


@pytest.mark.proves("9.46", "A.2")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit_train_batches", 2),
        ("limit_val_batches", 0.5),
        ("limit_test_batches", 1),
        ("limit_predict_batches", 3),
        ("max_epochs", 7),
        ("min_epochs", 2),
        ("max_steps", 9),
        ("accumulate_grad_batches", 4),
        ("gradient_clip_val", 0.5),
        ("log_every_n_steps", 3),
        ("val_check_interval", 2),
        ("check_val_every_n_epoch", 3),
        ("should_stop", True),
        ("fast_dev_run", 2),
    ],
)
def test_a_setting_that_is_set_reads_back(name: str, value: object) -> None:
    run = trainer()
    setattr(run, name, value)

    assert getattr(run, name) == value


@pytest.mark.proves("9.46", "A.2")
def test_limits_that_are_set_before_a_call_hold_in_it() -> None:
    run, model = trainer(), Line()
    run.limit_train_batches, run.limit_val_batches = 3, 1
    run.fit(model, loader(), loader())
    assert (run.global_step, run.num_training_batches, run.num_val_batches) == (3, 3, [1])
    run.limit_predict_batches = 2
    assert len(run.predict(model, loader()) or ()) == 2


@pytest.mark.proves("9.47")
def test_the_number_of_steps_is_unbounded_where_the_data_have_no_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.ones(4, 2))

    class Asking(Line):
        def configure_optimizers(self) -> Any:
            estimates.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    estimates: list[float] = []
    trainer().fit(Asking(), DataLoader(Stream(), batch_size=2))
    trainer(max_epochs=-1, max_steps=1).fit(Asking(), DataLoader(Stream(), batch_size=2))

    assert estimates == [math.inf, 1]


@pytest.mark.proves("9.48")
def test_save_checkpoint_print_and_init_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = trainer(precision="bf16-true"), Line()
    with run.init_module():
        layer = nn.Linear(2, 2)
    with run.init_module(empty_init=True):
        empty = nn.Linear(2, 2)
    assert layer.weight.dtype is empty.weight.dtype is torch.bfloat16
    assert nn.Linear(2, 2).weight.dtype is torch.float32, "only inside the block"

    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    weights = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert (whole["global_step"], len(whole["optimizer_states"])) == (4, 1)
    assert "optimizer_states" not in weights
    assert torch.equal(weights["state_dict"]["layer.weight"], model.layer.weight)

    run.print("hello", 7, sep="-")
    assert capsys.readouterr().out == "hello-7\n"


@pytest.mark.proves("A.6")
def test_loops_and_connectors_answer_under_their_names(tmp_path: Path) -> None:
    class Watch(fulmen.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loop = trainer.fit_loop.epoch_loop
            progress = loop.batch_progress
            seen.append(
                (
                    progress.current.completed, progress.total.ready, progress.is_last_batch, loop.batch_idx,
                    loop._batches_that_stepped, loop.global_step, trainer._logger_connector.should_update_logs,
                    pl_module._current_fx_name, len(trainer.strategy._lightning_optimizers),
                )
            )  # fmt: skip
            saved.update(trainer._checkpoint_connector.dump_checkpoint())
            trainer._logger_connector.log_metrics({"by hand": torch.tensor(2.0)}, step=trainer.global_step)

    seen: list[Any] = []
    saved: dict[str, Any] = {}
    run = trainer(callbacks=[Watch()], max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    run.fit(Line(), loader(4), loader(2))

    name = "on_train_batch_end"
    assert seen == [
        (0, 1, False, 0, 0, 1, False, name, 1),
        (1, 2, True, 1, 1, 2, True, name, 1),
        (0, 3, False, 0, 2, 3, False, name, 1),
        (1, 4, True, 1, 3, 4, True, name, 1),
    ]
    assert saved["global_step"] == 4
    assert (run.fit_loop.max_epochs, run.fit_loop.max_batches, run.fit_loop.done) == (2, 2, True)
    assert run.fit_loop.epoch_progress.current.completed == 2
    assert run.fit_loop.epoch_loop.val_loop.max_batches == [1]
    rows = Path(str(run.log_dir), "metrics.csv").read_text()
    assert "by hand" in rows.splitlines()[0]

    run.validate(dataloaders=[loader(2)], verbose=False)
    run.test(dataloaders=[loader(2)], verbose=False)
    predictions = run.predict(dataloaders=loader(4))
    assert (run.validate_loop.num_dataloaders, run.test_loop.max_batches) == (1, [1])
    assert run.predict_loop.predictions == predictions
    assert not run._accelerator_connector.is_distributed
    assert run._accelerator_connector.cluster_environment is run.assembly.environment
    assert run._accelerator_connector.parallel_devices == [torch.device("cpu")]


@pytest.mark.proves("A.6")
def test_a_checkpoint_cannot_be_dumped_before_there_is_a_model() -> None:
    with pytest.raises(ValueError, match=r"dump_checkpoint\(\) needs a model.*Call fit, validate, test or predict"):
        trainer()._checkpoint_connector.dump_checkpoint()


@pytest.mark.proves("9.22")
def test_a_later_call_uses_the_module_and_refuses_when_there_never_was_one() -> None:
    run, model = trainer(), Line()
    run.fit(model, loader())
    for method in (run.validate, run.test, run.predict):
        method(dataloaders=loader(2))
        assert run.lightning_module is model
    for method in ("validate", "test", "predict"):
        with pytest.raises(TypeError, match=rf"trainer.{method}\(\) was called without a model.*Pass the model"):
            getattr(trainer(), method)(dataloaders=loader(2))


@pytest.mark.proves("9.20")
def test_fit_forgets_an_earlier_request_to_stop() -> None:
    run = trainer(max_epochs=2)
    run.should_stop = True
    run.fit(Line(), loader())

    assert (run.current_epoch, run.should_stop) == (2, False)


class Stream(IterableDataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples)


@pytest.mark.proves("A.2", "9.46")
def test_the_last_batch_is_known_in_its_own_step_where_schedules_of_manual_optimization_look() -> None:
    class Manual(Line):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((self.trainer.current_epoch, batch_idx, self.trainer.is_last_batch))

    seen: list[Any] = []
    counted = loader(8)
    stream = DataLoader(Stream([torch.ones(2)] * 4), batch_size=2)  # nobody knows how long it is
    for data, options in ((counted, {"limit_train_batches": 2}), (stream, {})):
        seen.clear()
        trainer(max_epochs=2, **options).fit(Manual(), data)
        assert seen == [(0, 0, False), (0, 1, True), (1, 0, False), (1, 1, True)]


@pytest.mark.proves("5.1")
def test_a_checkpoint_keeps_the_versions_of_layers_by_which_torch_reads_old_files(tmp_path: Path) -> None:
    class Normed(Line):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

    run = trainer()
    run.fit(Normed(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")

    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert state._metadata["norm"] == {"version": 2}
    assert run.strategy.lightning_module_state_dict().keys() == state.keys()


@pytest.mark.parametrize("validates", [True, False])
def test_configure_optimizers_can_ask_as_in_lightning_whether_there_will_be_a_validation(validates: bool) -> None:
    class Asking(Line):
        def configure_optimizers(self) -> Any:
            loop = self.trainer.fit_loop
            asked.append((loop._data_source.is_defined(), loop.epoch_loop.val_loop._data_source.is_defined()))
            return super().configure_optimizers()

    asked: list[Any] = []
    run = trainer()
    assert not run.fit_loop.epoch_loop.val_loop._data_source.is_defined()
    run.fit(Asking(), loader(), loader() if validates else None)

    assert asked == [(True, validates)]


def test_the_strategy_reads_a_checkpoint_and_a_module_finds_the_hyperparameters_in_it(tmp_path: Path) -> None:
    class Noting(Line):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].update(noted=4)
            assert checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] == "kwargs"

    run = trainer()
    run.fit(Noting(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")

    assert run.strategy.load_checkpoint(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"] == {
        "width": 3,
        "noted": 4,
    }
