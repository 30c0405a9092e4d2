"""LearningRateMonitor in a real fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import LearningRateMonitor
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger without a folder has its run's log in the working folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


class Rows:
    name = "rows"
    version = 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Mapping[str, object]) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


class Model(LightningModule):
    def __init__(self, configure: Callable[[Model], Any]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.head = torch.nn.Linear(1, 1)
        self.configure = configure

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.head(self.layer(batch[0])).mean()

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def fit(monitor: LearningRateMonitor, configure: Callable[[Model], Any], **flags: Any) -> tuple[Trainer, Rows]:
    rows = Rows()
    trainer = Trainer(
        **{
            "max_epochs": 2,
            "logger": rows,
            "log_every_n_steps": 2,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [monitor],
            **flags,
        }
    )
    trainer.fit(Model(configure), DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2))
    return trainer, rows


def halving(model: Model) -> Any:
    optimizer = SGD(model.parameters(), lr=0.8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}}


@pytest.mark.proves("11.8")
def test_step_rates_are_logged_at_the_batches_that_get_rows_before_the_step_is_taken() -> None:
    trainer, rows = fit(LearningRateMonitor("step"), halving)
    assert rows.rows == [(x, {"lr-SGD": pytest.approx(0.8 * 0.5**x)}) for x in (1, 3, 5, 7)]
    assert float(trainer.callback_metrics["lr-SGD"]) == pytest.approx(0.8 * 0.5**7)


@pytest.mark.proves("11.8")
def test_epoch_rates_are_logged_at_the_epochs_start() -> None:
    monitor = LearningRateMonitor("epoch")
    _, rows = fit(monitor, halving)
    assert rows.rows == [(0, {"lr-SGD": 0.8}), (4, {"lr-SGD": pytest.approx(0.8 * 0.5**4)})]
    assert monitor.lrs["lr-SGD"] == [0.8, pytest.approx(0.05)]


@pytest.mark.proves("11.8")
def test_without_an_interval_each_scheduler_is_logged_at_its_own() -> None:
    def configure(model: Model) -> Any:
        first, second = SGD(model.layer.parameters(), lr=1.0), Adam(model.head.parameters(), lr=0.1)
        return [first, second], [
            {"scheduler": StepLR(first, 1, 0.5), "interval": "step"},
            {"scheduler": ExponentialLR(second, 0.5), "interval": "epoch", "name": "slow"},
        ]

    class Manual(Model):
        def __init__(self, configure: Callable[[Model], Any]) -> None:
            super().__init__(configure)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for optimizer in self.optimizers():
                optimizer.step()

    rows = Rows()
    trainer = Trainer(
        max_epochs=2,
        logger=rows,
        log_every_n_steps=4,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LearningRateMonitor()],
    )
    trainer.fit(Manual(configure), DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2))

    assert [row for _, row in rows.rows if "slow" in row] == [{"slow": 0.1}, {"slow": 0.1}]
    assert all(set(row) in ({"slow"}, {"lr-SGD"}) for _, row in rows.rows)


@pytest.mark.proves("11.8")
def test_optimizers_of_one_class_are_numbered_and_without_a_schedule_logged_at_steps_and_epochs() -> None:
    class Manual(Model):
        def __init__(self, configure: Callable[[Model], Any]) -> None:
            super().__init__(configure)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for optimizer in self.optimizers():
                optimizer.step()

    rows = Rows()
    trainer = Trainer(
        max_epochs=1,
        logger=rows,
        log_every_n_steps=2,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LearningRateMonitor(log_key_prefix="opt/")],
    )
    model = Manual(
        lambda model: [
            SGD(model.layer.parameters(), lr=0.5),
            Adam([model.head.weight], lr=0.25),
            SGD([model.head.bias], lr=0.125),
        ]
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2))
    row = {"opt/lr-SGD": 0.5, "opt/lr-Adam": 0.25, "opt/lr-SGD-1": 0.125}
    assert rows.rows == [(0, row), (1, row), (3, row)]


@pytest.mark.proves("11.8")
def test_parameter_groups_are_named_by_number_or_by_their_own_name() -> None:
    def configure(model: Model) -> Any:
        groups = [{"params": model.layer.parameters(), "lr": 0.1}, {"params": model.head.parameters(), "name": "head"}]
        return SGD(groups, lr=0.2)

    _, rows = fit(LearningRateMonitor("epoch", log_key_prefix="opt/"), configure, max_epochs=1)
    assert rows.rows == [(0, {"opt/lr-SGD/pg1": 0.1, "opt/lr-SGD/head": 0.2})]


@pytest.mark.proves("11.8")
def test_momentum_and_weight_decay_are_logged_when_asked_for() -> None:
    monitor = LearningRateMonitor("epoch", log_momentum=True, log_weight_decay=True)
    _, rows = fit(
        monitor, lambda model: Adam(model.parameters(), lr=0.1, betas=(0.7, 0.9), weight_decay=0.25), max_epochs=1
    )
    assert rows.rows == [(0, {"lr-Adam": 0.1, "lr-Adam-momentum": 0.7, "lr-Adam-weight_decay": 0.25})]
    assert monitor.last_momentum_values == {"lr-Adam-momentum": 0.7}


def test_a_learning_rate_that_is_a_tensor_is_logged_as_a_number() -> None:
    _, rows = fit(
        LearningRateMonitor("epoch"), lambda model: Adam(model.parameters(), lr=torch.tensor(0.5)), max_epochs=1
    )
    assert rows.rows == [(0, {"lr-Adam": 0.5})]


@pytest.mark.proves("11.8")
def test_groups_of_one_name_are_refused() -> None:
    def configure(model: Model) -> Any:
        return SGD([{"params": [p], "name": "same"} for p in model.parameters()], lr=0.1)

    with pytest.raises(MisconfigurationException, match="share a name"):
        fit(LearningRateMonitor(), configure)


@pytest.mark.proves("11.8")
def test_a_logger_is_needed() -> None:
    with pytest.raises(MisconfigurationException, match="needs a logger"):
        fit(LearningRateMonitor(), halving, logger=False)


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'batch'"):
        LearningRateMonitor("batch")
