"""Modules and data modules inside runs: which of their methods are called, with what, and what their results do."""

from __future__ import annotations

import importlib.metadata
import logging
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fulmen import Callback, LightningDataModule, LightningModule, Trainer
from fulmen.callbacks import EarlyStopping, LearningRateMonitor, ModelSummary
from fulmen.optimizer import LightningOptimizer
from fulmen_protocols import EXPORTERS, MisconfigurationException, MissingPackage, discovery

if TYPE_CHECKING:
    from pathlib import Path


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
        return loader()

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def loader() -> DataLoader[Any]:
    return DataLoader(torch.arange(24.0).reshape(6, 4), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


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


CALLS = ["fit", "validate", "test", "predict"]

# -- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("10.1")
@pytest.mark.parametrize("with_index", [True, False])
def test_the_four_steps_get_batch_and_index_and_may_leave_the_index_out(with_index: bool, tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {}

    def step(name: str) -> Any:
        def note(self: Any, batch: Any, *rest: int) -> Any:
            seen.setdefault(name, []).append((batch[:, 0].tolist(), *rest))
            return self.layer(batch).square().mean()

        def long(self: Any, batch: Any, batch_idx: int) -> Any:
            return note(self, batch, batch_idx)

        def short(self: Any, batch: Any) -> Any:
            return note(self, batch)

        return long if with_index else short

    names = ("training_step", "validation_step", "test_step", "predict_step")
    model = type("Steps", (Model,), {name: step(name) for name in names})()
    trainer = make_trainer(tmp_path, num_sanity_val_steps=0)
    for call in ("fit", "test", "predict"):
        getattr(trainer, call)(model)

    values = [[0.0, 4.0], [8.0, 12.0], [16.0, 20.0]]
    expected = [(value, index) if with_index else (value,) for index, value in enumerate(values)]
    assert seen == dict.fromkeys(names, expected)


@pytest.mark.proves("10.1")
def test_evaluation_steps_get_the_index_of_their_loader_where_there_are_several(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def step(name: str) -> Any:
        def note(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 7) -> None:
            seen.append((name, batch_idx, dataloader_idx))

        return note

    several = lambda self: [loader(), loader()]  # noqa: E731
    stages = ("validate", "test", "predict")
    methods: dict[str, Any] = {f"{'validation' if s == 'validate' else s}_step": step(s) for s in stages}
    hooks = {f"{s}_dataloader": several for s in ("val", "test", "predict")}
    for stage in stages:
        make_trainer(tmp_path).__getattribute__(stage)(type("Several", (Model,), {**methods, **hooks})())
        expected = [(stage, batch_idx, index) for index in (0, 1) for batch_idx in range(3)]
        assert [entry for entry in seen if entry[0] == stage] == expected
        seen.clear()
        make_trainer(tmp_path).__getattribute__(stage)(type("One", (Model,), methods)())
        assert {entry[2] for entry in seen} == {7}, "with one loader the default holds"
        seen.clear()


@pytest.mark.proves("10.1")
def test_prediction_falls_back_to_forward_and_needs_one_of_the_two(tmp_path: Path) -> None:
    class Forward(LightningModule):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1)

    outputs: Any = make_trainer(tmp_path).predict(Forward(), loader())
    assert [output.tolist() for output in outputs] == [[6.0, 22.0], [38.0, 54.0], [70.0, 86.0]]
    with pytest.raises(MisconfigurationException, match="LightningModule has neither predict_step nor forward"):
        make_trainer(tmp_path).predict(LightningModule(), loader())


# -- hooks of the optimizer step -----------------------------------------------------------------------------------


@pytest.mark.proves("10.5")
def test_hooks_of_the_optimizer_step_get_what_they_act_on(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    class Hooks(Model):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            seen.append(("on_before_zero_grad", type(optimizer).__name__))

        def on_before_backward(self, loss: Any) -> None:
            seen.append(("on_before_backward", loss.requires_grad, self.layer.weight.grad))

        def backward(self, loss: Any) -> None:
            seen.append(("backward", loss.shape))
            (2 * loss).backward()

        def on_after_backward(self) -> None:
            seen.append(("on_after_backward", float(self.layer.weight.grad.norm()) > 0))  # type: ignore[union-attr]  # known to be there

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(("on_before_optimizer_step", type(optimizer).__name__))

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            seen.append(("optimizer_step", epoch, batch_idx, isinstance(optimizer, torch.optim.SGD)))
            assert isinstance(optimizer, LightningOptimizer)
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            seen.append(("optimizer_zero_grad", epoch, batch_idx, type(optimizer).__name__))
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            seen.append(("configure_gradient_clipping", gradient_clip_val, gradient_clip_algorithm))
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))  # type: ignore[misc]  # after a backward pass none is None
            seen.append(("norm", norm <= 0.125 + 1e-6))

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            seen.append(("lr_scheduler_step", type(scheduler).__name__, metric))
            super().lr_scheduler_step(scheduler, metric)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    make_trainer(tmp_path, gradient_clip_val=0.125, limit_train_batches=1, limit_val_batches=0).fit(Hooks())

    assert seen == [
        ("optimizer_step", 0, 0, True),
        ("on_before_zero_grad", "SGD"),
        ("optimizer_zero_grad", 0, 0, "SGD"),
        ("on_before_backward", True, None),
        ("backward", torch.Size([])),
        ("on_after_backward", True),
        ("on_before_optimizer_step", "SGD"),
        ("configure_gradient_clipping", 0.125, "norm"),
        ("norm", True),
        ("lr_scheduler_step", "StepLR", None),
    ]


@pytest.mark.proves("10.6")
@pytest.mark.parametrize("how", ["passes it on", "runs it first", "never"])
def test_an_own_optimizer_step_must_run_its_closure(how: str, tmp_path: Path) -> None:
    class Own(Model):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if how == "passes it on":
                optimizer.step(closure=optimizer_closure)
            elif how == "runs it first":
                optimizer_closure()
                optimizer.step()
            else:
                optimizer.step()

    torch.manual_seed(0)
    model = Own()
    expected = pickle.loads(pickle.dumps(model.layer))
    if how == "never":
        with pytest.raises(MisconfigurationException, match=r"did not run its closure.*optimizer.step\(closure="):
            make_trainer(tmp_path).fit(model)
        return
    make_trainer(tmp_path).fit(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for batch in loader():
        optimizer.zero_grad()
        expected(batch).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.layer.weight, expected.weight)


@pytest.mark.proves("10.6")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((0.25, "norm"), "gradient_clip_val=0.25, and the Trainer has gradient_clip_val=0.5. Set it in one place"),
        ((0.5, "value"), "gradient_clip_algorithm='value', and the Trainer has gradient_clip_algorithm='norm'"),
    ],
)
def test_clipping_otherwise_than_the_trainer_says_is_refused(given: Any, words: str, tmp_path: Path) -> None:
    class Clips(Model):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, *given)

    with pytest.raises(MisconfigurationException, match=words):
        make_trainer(tmp_path, gradient_clip_val=0.5).fit(Clips())


# -- configure_model, setup, data ----------------------------------------------------------------------------------


class Late(LightningModule):
    made: int = 0

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer: nn.Linear | None = None

    def configure_model(self) -> None:
        type(self).made += 1
        if self.layer is None:
            self.layer = nn.Linear(self.hparams.width, 2)

    def forward(self, x: Any) -> Any:
        assert self.layer is not None
        return self.layer(x.to(self.dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def val_dataloader(self) -> Any:
        return loader()


@pytest.mark.proves("10.7")
@pytest.mark.parametrize("call", CALLS)
def test_configure_model_makes_the_model_in_each_call_in_the_runs_dtype(call: str, tmp_path: Path) -> None:
    model, Late.made = Late(), 0
    trainer = make_trainer(tmp_path, precision="bf16-true")
    getattr(trainer, call)(model, loader())
    first: Any = model.layer
    assert Late.made == 1
    assert first.weight.dtype == torch.bfloat16

    getattr(trainer, call)(model, loader())
    assert Late.made == 2
    assert model.layer is first, "called again, it left the model alone"


@pytest.mark.proves("10.7")
def test_a_late_model_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    model = Late(width=4)
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "late.ckpt")

    again: Any = Late.load_from_checkpoint(tmp_path / "late.ckpt")
    assert torch.equal(again.layer.weight, model.layer.weight)  # type: ignore[union-attr]  # known to be there
    make_trainer(tmp_path).validate(again, loader(), verbose=False)
    make_trainer(tmp_path, max_epochs=2).fit(Late(), loader(), ckpt_path=tmp_path / "late.ckpt")


@pytest.mark.proves("10.7")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_configure_sharded_model_is_refused_with_what_replaced_it(call: str, both: bool, tmp_path: Path) -> None:
    old: dict[str, Any] = {"configure_sharded_model": lambda self: None}
    if both:
        old["configure_model"] = lambda self: None
    ending = "It defines both; keep configure_model" if both else "already made."
    with pytest.raises(
        MisconfigurationException, match=f"Old defines configure_sharded_model.*Rename it to configure_model.*{ending}"
    ):
        getattr(make_trainer(tmp_path), call)(type("Old", (Model,), old)())


class Noted(LightningDataModule):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def prepare_data(self) -> None:
        self.calls.append(("datamodule", "prepare_data"))

    def setup(self, stage: str) -> None:
        self.calls.append(("datamodule", "setup", stage))

    def teardown(self, stage: str) -> None:
        self.calls.append(("datamodule", "teardown", stage))

    def _loader(self) -> Any:
        self.calls.append(("datamodule", "loader"))
        return loader()

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


@pytest.mark.proves("10.8")
@pytest.mark.parametrize("call", CALLS)
def test_data_is_prepared_then_set_up_and_torn_down_with_the_stage_of_the_call(call: str, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Prepares(Model):
        def prepare_data(self) -> None:
            calls.append(("module", "prepare_data"))

        def setup(self, stage: str) -> None:
            calls.append(("module", "setup", stage))

        def teardown(self, stage: str) -> None:
            calls.append(("module", "teardown", stage))

    options = {"limit_val_batches": 0} if call == "fit" else {}
    getattr(make_trainer(tmp_path, **options), call)(Prepares(), datamodule=Noted(calls))
    assert calls == [
        ("datamodule", "prepare_data"),
        ("module", "prepare_data"),
        ("datamodule", "setup", call),
        ("module", "setup", call),
        ("datamodule", "loader"),
        ("datamodule", "teardown", call),
        ("module", "teardown", call),
    ]


@pytest.mark.proves("10.9")
def test_callbacks_of_the_module_join_and_replace_those_of_their_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(EarlyStopping): ...

    given = [EarlyStopping("a"), LearningRateMonitor(), Callback()]
    own: list[Any] = [Mine("b", check_on_train_epoch_end=False, strict=False), ModelSummary()]

    class Configures(Model):
        def configure_callbacks(self) -> Any:
            return own

    trainer = make_trainer(tmp_path, callbacks=given, logger=True)
    with caplog.at_level(logging.INFO):
        trainer.validate(Configures(), verbose=False)

    # A plain Callback is a base of everything, and is kept.
    assert trainer.callbacks == [*given[1:], *own]
    assert "Mine, ModelSummary of the module replace the Trainer's EarlyStopping" in caplog.text
    trainer.validate(Configures(), verbose=False)
    assert trainer.callbacks == [*given[1:], *own], "a second call changes nothing"


@pytest.mark.proves("10.9")
def test_one_callback_may_be_returned_alone(tmp_path: Path) -> None:
    ran: list[str] = []

    class Hello(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            ran.append("on_fit_start")

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            ran.append(f"setup {stage}")

    class Configures(Model):
        def configure_callbacks(self) -> Any:
            return Hello()

    make_trainer(tmp_path).fit(Configures())
    assert ran == ["setup fit", "on_fit_start"]


# -- configure_optimizers ------------------------------------------------------------------------------------------


def sgd(model: Any, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def step_lr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)


def form(name: str, model: Any) -> Any:
    optimizer = sgd(model)
    if name in ("optimizer", "list", "dict", "dicts"):
        return {
            "optimizer": optimizer,
            "list": [optimizer],
            "dict": {"optimizer": optimizer},
            "dicts": [{"optimizer": optimizer}],
        }[name]
    scheduler = step_lr(optimizer)
    return {
        "lists": ([optimizer], [scheduler]),
        "list and scheduler": ([optimizer], scheduler),
        "dict with scheduler": {"optimizer": optimizer, "lr_scheduler": scheduler},
        "dict with config": {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}},
        "dicts with scheduler": [{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}],
        "lists of configs": ([optimizer], [{"scheduler": scheduler, "name": "mine", "frequency": 1}]),
    }[name]


@pytest.mark.proves("10.10")
@pytest.mark.parametrize(
    ("name", "rate"),
    [
        *((name, 0.1) for name in ("optimizer", "list", "dict", "dicts")),
        *(
            (name, 0.025)
            for name in (
                "lists",
                "list and scheduler",
                "dict with scheduler",
                "dict with config",
                "dicts with scheduler",
                "lists of configs",
            )
        ),
    ],
)
def test_every_form_trains_with_its_optimizer_and_schedule(name: str, rate: float, tmp_path: Path) -> None:
    class Configured(Model):
        def configure_optimizers(self) -> Any:
            return form(name, self)

    model = Configured()
    before = model.layer.weight.detach().clone()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(model)
    assert not torch.equal(model.layer.weight, before)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.proves("10.10")
def test_no_optimizer_runs_the_steps_and_changes_nothing(tmp_path: Path) -> None:
    class Without(Model):
        def configure_optimizers(self) -> None:
            return None

    model = Without()
    before = model.layer.weight.detach().clone()
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="configure_optimizers returned None"):
        trainer.fit(model)
    assert torch.equal(model.layer.weight, before)
    assert trainer.global_step == 3


@pytest.mark.proves("10.11")
@pytest.mark.parametrize(
    ("config", "rate"),
    [
        ({"interval": "step", "frequency": 2}, 0.1 * 0.5**2),  # after batches 2 of both epochs of 3
        ({"interval": "step"}, 0.1 * 0.5**6),
        ({"interval": "epoch", "frequency": 2}, 0.1 * 0.5),
        ({}, 0.1 * 0.5**2),
    ],
)
def test_interval_and_frequency_say_when_a_schedule_steps(config: dict[str, Any], rate: float, tmp_path: Path) -> None:
    class Configured(Model):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": step_lr(optimizer), **config}}

    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(Configured())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.proves("10.11")
@pytest.mark.parametrize("strict", [True, False])
def test_a_schedule_whose_value_is_not_logged_is_an_error_or_waits(strict: bool, tmp_path: Path) -> None:
    class Configured(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train_loss", 1.0)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self)
            watched = {"scheduler": plateau(optimizer), "monitor": "train_los", "strict": strict}
            return {"optimizer": optimizer, "lr_scheduler": watched}

    trainer = make_trainer(tmp_path)
    words = "ReduceLROnPlateau watches 'train_los', which has not been logged. Did you mean 'train_loss'"
    if strict:
        with pytest.raises(MisconfigurationException, match=f"{words}.*'strict': False"):
            trainer.fit(Configured())
    else:
        with pytest.warns(UserWarning, match=f"{words}.*not stepped this time"):
            trainer.fit(Configured())


# -- batches on their way ------------------------------------------------------------------------------------------


def transfers(who: str, calls: list[str]) -> dict[str, Any]:
    def hook(name: str) -> Any:
        def call(self: Any, batch: Any, *args: Any) -> Any:
            calls.append(f"{who}.{name}{args}")
            return batch + 1

        return call

    return {
        name: hook(name) for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    }


@pytest.mark.proves("10.16")
def test_hooks_of_the_transfer_change_the_batch_in_order(tmp_path: Path) -> None:
    calls: list[str] = []
    model = type("Transfers", (Model,), transfers("module", calls))()
    seen: list[float] = []
    model.predict_step = lambda batch, batch_idx: seen.append(batch[0, 0].item())
    make_trainer(tmp_path, limit_predict_batches=1).predict(model)

    device = torch.device("cpu")
    assert calls == [
        "module.on_before_batch_transfer(0,)",
        f"module.transfer_batch_to_device({device!r}, 0)",
        "module.on_after_batch_transfer(0,)",
    ]
    assert seen == [3.0]


@pytest.mark.proves("10.16")
def test_the_datamodules_hook_wins_over_the_modules_which_is_said(tmp_path: Path) -> None:
    calls: list[str] = []
    hooks = transfers("module", calls)
    model = type("Transfers", (Model,), hooks)()
    name = "on_after_batch_transfer"
    data = type("Data", (Noted,), {name: transfers("datamodule", calls)[name]})([])

    with pytest.warns(UserWarning, match=f"both Data and Transfers define {name}: the datamodule's is called"):
        make_trainer(tmp_path, limit_predict_batches=1).predict(model, datamodule=data)
    assert [call.partition("(")[0] for call in calls] == [
        "module.on_before_batch_transfer", "module.transfer_batch_to_device", f"datamodule.{name}"
    ]  # fmt: skip


# -- properties and helpers ----------------------------------------------------------------------------------------


@pytest.mark.proves("10.18")
def test_a_module_knows_its_run_while_it_lasts(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Knows(Model):
        def __init__(self) -> None:
            super().__init__()
            self.child = Model()

        def setup(self, stage: str) -> None:
            seen["device in setup"] = (self.device, self.child.device)

        def on_train_epoch_end(self) -> None:
            seen["counts"] = (self.current_epoch, self.global_step, self.global_rank, self.local_rank)
            seen["trainer"] = self.trainer is self.child.trainer
            seen["loggers"] = (self.logger is self.loggers[0], len(self.loggers))
            seen["rest"] = (self.fabric, self.device_mesh, self.on_gpu, self.dtype, self.automatic_optimization)

    model = Knows()
    assert (model.current_epoch, model.global_step, model.global_rank, model.local_rank) == (0, 0, 0, 0)
    assert (model.logger, model.loggers, model.example_input_array, model.strict_loading) == (None, [], None, True)
    with pytest.raises(RuntimeError, match="Knows is not attached to a Trainer"):
        _ = model.trainer
    make_trainer(tmp_path, max_epochs=2, logger=True).fit(model)

    cpu = torch.device("cpu")
    assert seen == {
        "device in setup": (cpu, cpu),
        "counts": (1, 6, 0, 0),
        "trainer": True,
        "loggers": (True, 1),
        "rest": (None, None, False, torch.float32, True),
    }
    assert model.half().dtype == torch.float16
    assert model.child.dtype == torch.float16
    assert model.to(torch.float64).dtype == torch.float64


@pytest.mark.proves("10.19")
@pytest.mark.parametrize(
    ("method", "exporter"), [("to_onnx", "onnx"), ("to_torchscript", "torchscript"), ("to_tensorrt", "tensorrt")]
)
def test_exports_without_an_exporter_say_what_installs_it(
    method: str, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **kw: () if kw.get("group") == EXPORTERS.group else installed(**kw),
    )
    discovery.forget()
    words = rf"Model.{method}\(\) needs the exporter '{exporter}', and none is installed. Run: .*'fulmen\[export\]'"
    try:
        with pytest.raises(MissingPackage, match=words):
            getattr(Model(), method)("file")
    finally:
        monkeypatch.undo()
        discovery.forget()


# -- the data module -----------------------------------------------------------------------------------------------


@pytest.mark.proves("10.21")
def test_a_data_module_supplies_everything_keeps_its_state_and_hears_of_errors(tmp_path: Path) -> None:
    class Stateful(Noted):
        position, trained_by = 0, None

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.position = state_dict["position"]

        def setup(self, stage: str) -> None:
            self.trained_by = self.trainer  # type: ignore[assignment]  # a stand-in

        def on_exception(self, exception: BaseException) -> None:
            self.calls.append(exception)

    data = Stateful([])
    data.position = 5
    trainer = make_trainer(tmp_path)
    trainer.fit(Model(), datamodule=data)
    assert data.trained_by is trainer
    assert trainer.datamodule is data
    trainer.save_checkpoint(tmp_path / "data.ckpt")

    again = Stateful([])
    make_trainer(tmp_path, max_epochs=2).fit(Model(), datamodule=again, ckpt_path=tmp_path / "data.ckpt")
    assert again.position == 5

    error = RuntimeError("no")

    class Fails(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise error

    failing = Stateful([])
    with pytest.raises(RuntimeError):
        make_trainer(tmp_path).fit(Fails(), datamodule=failing)
    assert failing.calls[-1] is error
