"""DeviceStatsMonitor in real runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import DeviceStatsMonitor
from fulmen_protocols.errors import MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STATS = {"cpu_percent", "cpu_vm_percent", "cpu_swap_percent"}


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


class Dashed(Rows):
    group_separator = "-"


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Model):
    validation_step = Model.test_step


class Board:
    """A vendor's accelerator: the CPU under another name, with a counter of its own."""

    asked = 0

    def name(self) -> str:
        return "board"

    def is_available(self) -> bool:
        return True

    def auto_device_count(self) -> int:
        return 1

    def parse_devices(self, devices: int | str | Sequence[int]) -> list[int]:
        return [0]

    def get_parallel_devices(self, devices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cpu")]

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...


class BoardWithStats(Board):
    def get_device_stats(self, device: torch.device) -> dict[str, float]:
        self.asked += 1
        return {"volts": 3.3, "asked": float(self.asked)}


def data(batches: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(2 * batches, 2)), batch_size=2)


def make(monitor: DeviceStatsMonitor, rows: Any = None, **flags: Any) -> tuple[Trainer, Any]:
    rows = Rows() if rows is None else rows
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"logger": rows, "log_every_n_steps": 2, "max_epochs": 1, "accelerator": "cpu", **quiet, **flags}
    return Trainer(callbacks=[monitor], **given), rows


@pytest.mark.proves("11.9")
def test_statistics_are_logged_before_and_after_the_batches_that_get_rows() -> None:
    trainer, rows = make(DeviceStatsMonitor())
    trainer.fit(Validated(), data(5), data(3))

    hooks = [(x, next(iter(row)).partition("/")[0]) for x, row in rows.rows]
    train = [(x, f"DeviceStatsMonitor.on_train_batch_{end}") for x in (1, 3) for end in ("start", "end")]
    validation = [(4, f"DeviceStatsMonitor.on_validation_batch_{end}") for end in ("start", "end")]
    assert hooks == [*train, *validation], "not in the sanity check"
    for _, row in rows.rows:
        (hook,) = {name.partition("/")[0] for name in row}
        assert set(row) == {f"{hook}/{stat}" for stat in STATS}
        assert all(0 <= value <= 100 for value in row.values())


@pytest.mark.proves("11.9")
def test_tests_have_statistics_too() -> None:
    trainer, rows = make(DeviceStatsMonitor())
    trainer.test(Model(), data(4), verbose=False)
    assert {name.partition("/")[0] for _, row in rows.rows for name in row} == {
        "DeviceStatsMonitor.on_test_batch_start",
        "DeviceStatsMonitor.on_test_batch_end",
    }


@pytest.mark.proves("11.9")
def test_only_the_statistics_that_were_named_are_logged() -> None:
    trainer, rows = make(DeviceStatsMonitor(filter_keys={"cpu_vm_percent"}))
    trainer.fit(Model(), data(2))
    assert [list(row) for _, row in rows.rows] == [
        ["DeviceStatsMonitor.on_train_batch_start/cpu_vm_percent"],
        ["DeviceStatsMonitor.on_train_batch_end/cpu_vm_percent"],
    ]


@pytest.mark.proves("11.9")
def test_a_name_that_no_statistic_has_is_warned_about_with_the_closest() -> None:
    trainer, _ = make(DeviceStatsMonitor(filter_keys={"cpu_percents"}))
    with pytest.warns(UserWarning, match=r"'cpu_percents'.*Did you mean 'cpu_percent'\?.*cpu_swap_percent"):
        trainer.fit(Model(), data(2))


@pytest.mark.proves("11.9")
def test_cpu_stats_false_logs_none_of_the_cpu() -> None:
    trainer, rows = make(DeviceStatsMonitor(cpu_stats=False))
    trainer.fit(Model(), data(2))
    assert rows.rows == []


@pytest.mark.proves("11.9")
def test_any_accelerators_own_statistics_are_logged_and_asked_for_at_rows_only() -> None:
    board = BoardWithStats()
    trainer, rows = make(DeviceStatsMonitor(), accelerator=board, log_every_n_steps=4)
    trainer.fit(Model(), data(7))
    assert [row for _, row in rows.rows] == [
        {f"DeviceStatsMonitor.on_train_batch_{end}/volts": 3.3, f"DeviceStatsMonitor.on_train_batch_{end}/asked": count}
        for end, count in (("start", 2.0), ("end", 3.0))
    ]


@pytest.mark.proves("11.9")
def test_an_accelerator_without_statistics_is_refused_before_training() -> None:
    trainer, _ = make(DeviceStatsMonitor(), accelerator=Board())
    with pytest.raises(MisconfigurationException, match=r"'board' reports no statistics.*cpu_stats=True"):
        trainer.fit(Model(), data(2))


def test_a_subclass_and_a_loggers_separator_show_in_the_names() -> None:
    class Mine(DeviceStatsMonitor): ...

    trainer, rows = make(Mine(), Dashed())
    trainer.fit(Model(), data(2))
    assert any(name.endswith("Mine.on_train_batch_start-cpu_percent") for name in rows.rows[0][1])


@pytest.mark.proves("11.9")
def test_a_logger_is_needed() -> None:
    trainer, _ = make(DeviceStatsMonitor(), logger=False)
    with pytest.raises(MisconfigurationException, match=r"DeviceStatsMonitor needs a logger.*logger=False"):
        trainer.fit(Model(), data(2))


@pytest.mark.proves("11.9")
def test_missing_psutil_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    trainer, _ = make(DeviceStatsMonitor())
    with pytest.raises(MissingPackage, match="pip install"):
        trainer.fit(Model(), data(2))


def test_a_single_name_as_text_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"filter_keys='volts'\) is text.*use \{'volts'\}"):
        DeviceStatsMonitor(filter_keys="volts")
