"""ThroughputMonitor in real runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, ThroughputMonitor
from fulmen.callbacks._device_clock import DeviceClock
from fulmen.utilities.throughput import Throughput, measure_flops
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping


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

    def of(self, stage: str) -> list[tuple[int | None, dict[str, float]]]:
        return [(x, row) for x, row in self.rows if f"{stage}/time" in row]


class Model(LightningModule):
    flops_per_batch = 1000

    def __init__(self, train_s: float = 0.0, val_s: float = 0.0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.train_s, self.val_s = train_s, val_s

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(self.train_s)
        return self.layer(batch[0]).mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(self.val_s)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validated(Model):
    validation_step = Model.test_step


class WithoutFlops(Model):
    flops_per_batch = None  # type: ignore[assignment]  # as if it were not defined


class Wall(Callback):
    """The time that training takes with everything in it."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.began_s = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.spent_s = time.perf_counter() - self.began_s


def data(batches: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4 * batches, 2)), batch_size=4)


def size(batch: Any) -> int:
    return len(batch[0])


def make(monitor: Callback, *more: Callback, **flags: Any) -> tuple[Trainer, Rows]:
    rows = Rows()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"logger": rows, "log_every_n_steps": 2, "max_epochs": 1, "accelerator": "cpu", **quiet, **flags}
    return Trainer(callbacks=[*more, monitor], **given), rows


@pytest.mark.proves("11.18")
def test_training_has_rows_of_totals_then_of_rates_at_the_logging_interval() -> None:
    monitor = ThroughputMonitor(size, length_fn=lambda batch: batch[0].numel(), window_size=3, available_flops=1e15)
    trainer, rows = make(monitor)
    began = time.perf_counter()
    trainer.fit(Model(train_s=0.002), data(6))
    spent = time.perf_counter() - began

    found = rows.of("train")
    assert [x for x, _ in found] == [1, 3, 5]
    (_, first), _, (_, last) = found
    assert set(first) == {"train/time", "train/batches", "train/samples", "train/lengths", "epoch"}
    rates = {f"train/device/{name}_per_sec" for name in ("batches", "samples", "items", "flops")}
    assert set(last) == {*first, *rates, "train/device/mfu"}
    assert (last["train/batches"], last["train/samples"], last["train/lengths"]) == (6, 24, 48)
    assert 6 * 0.002 <= last["train/time"] <= spent
    per_second = last["train/device/batches_per_sec"]
    assert 0 < per_second <= 1 / 0.002
    assert last["train/device/samples_per_sec"] == pytest.approx(4 * per_second)
    assert last["train/device/items_per_sec"] == pytest.approx(8 * per_second)
    assert last["train/device/flops_per_sec"] == pytest.approx(1000 * per_second)
    assert last["train/device/mfu"] == pytest.approx(1000 * per_second / 1e15)
    assert float(trainer.logged_metrics["train/batches"]) == 6


@pytest.mark.proves("11.18")
def test_a_row_waits_for_the_step_of_its_accumulation() -> None:
    trainer, rows = make(ThroughputMonitor(size), accumulate_grad_batches=2, log_every_n_steps=1)
    trainer.fit(Model(), data(6))
    assert [(x, row["train/batches"]) for x, row in rows.of("train")] == [(0, 2), (1, 4), (2, 6)]


@pytest.mark.proves("11.18")
def test_validation_is_measured_by_itself_and_its_time_is_taken_off_trainings() -> None:
    wall = Wall()
    trainer, rows = make(ThroughputMonitor(size, window_size=2), wall, val_check_interval=2, log_every_n_steps=1)
    trainer.fit(Validated(val_s=0.1), data(6), data(2))

    train, val = rows.of("train"), rows.of("validate")
    assert [x for x, _ in val] == [1, 2, 3, 4, 5, 6], "over all validations, not the sanity check"
    assert [row["validate/batches"] for _, row in val] == [1, 2, 1, 2, 1, 2], "each validation starts anew"
    assert all(row["validate/time"] >= 0.2 for _, row in val[1::2])
    assert all(row["validate/device/batches_per_sec"] <= 1 / 0.1 for _, row in val[1::2])
    assert train[-1][1]["train/batches"] == 6
    assert train[-1][1]["train/time"] <= wall.spent_s - 0.6, "three validations of 0.2 s"


@pytest.mark.proves("11.18")
def test_what_the_window_lets_go_takes_its_pause_along() -> None:
    wall = Wall()
    trainer, rows = make(ThroughputMonitor(size, window_size=2), wall, val_check_interval=1, log_every_n_steps=6)
    trainer.fit(Validated(val_s=0.1), data(6), data(1))
    ((_, row),) = rows.of("train")
    assert row["train/batches"] == 6
    assert row["train/time"] <= wall.spent_s - 0.6, "six validations of 0.1 s"


@pytest.mark.proves("11.18")
def test_test_validate_and_predict_are_measured_too() -> None:
    trainer, rows = make(ThroughputMonitor(size, window_size=2))
    trainer.test(Model(), data(4), verbose=False)
    trainer.validate(Validated(), data(4), verbose=False)
    trainer.predict(Model(), data(4))
    for stage in ("test", "validate", "predict"):
        (_, first), (x, last) = rows.of(stage)
        assert x == 4
        assert (first[f"{stage}/batches"], last[f"{stage}/samples"]) == (2, 16)
        assert f"{stage}/device/flops_per_sec" in last


@pytest.mark.proves("11.18")
def test_a_module_without_flops_per_batch_is_told_once() -> None:
    trainer, rows = make(ThroughputMonitor(size, window_size=2))
    with pytest.warns(UserWarning, match="WithoutFlops has no flops_per_batch") as caught:
        trainer.fit(WithoutFlops(), data(6))
    assert sum("flops_per_batch" in str(warning.message) for warning in caught) == 1
    assert not any("flops" in name or "mfu" in name for _, row in rows.rows for name in row)


@pytest.mark.proves("11.18")
def test_on_a_device_without_a_known_peak_there_is_no_mfu() -> None:
    monitor = ThroughputMonitor(size, window_size=2)
    trainer, rows = make(monitor)
    trainer.fit(Model(), data(4))
    assert monitor.available_flops is None
    assert "train/device/flops_per_sec" in rows.of("train")[-1][1]
    assert not any("mfu" in name for _, row in rows.rows for name in row)


@pytest.mark.proves("11.18")
def test_the_separator_also_stands_behind_the_stage() -> None:
    trainer, rows = make(ThroughputMonitor(size, window_size=2, separator="|"))
    trainer.fit(Model(), data(4))
    assert {"train|time", "train|device|batches_per_sec"} <= set(rows.rows[-1][1])


def test_counts_may_be_tensors_and_flops_a_property() -> None:
    class Counting(Model):
        @property
        def flops_per_batch(self) -> int:  # type: ignore[override]  # with other arguments, on purpose
            with torch.device("meta"):
                layer, x = torch.nn.Linear(2, 1), torch.randn(4, 2)
            return measure_flops(layer, lambda: layer(x), torch.Tensor.sum)

    monitor = ThroughputMonitor(lambda batch: torch.tensor(size(batch)), lambda batch: batch[0].sum(), window_size=2)
    trainer, rows = make(monitor)
    trainer.fit(Counting(), data(4))
    row = rows.of("train")[-1][1]
    assert (row["train/samples"], row["train/lengths"]) == (16, 32)
    assert row["train/device/flops_per_sec"] == pytest.approx(2 * 16 * row["train/device/batches_per_sec"])


def test_without_logging_nothing_is_measured() -> None:
    def never(batch: Any) -> int:
        raise AssertionError("asked for a size")

    trainer, rows = make(ThroughputMonitor(never), log_every_n_steps=0)
    trainer.fit(Validated(), data(4), data(1))
    assert rows.rows == []


@pytest.mark.parametrize(
    ("arguments", "message"), [({"window_size": 1}, "window_size=1"), ({"available_flops": -1}, "available_flops=-1")]
)
def test_what_throughput_refuses_is_refused_before_a_run(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ThroughputMonitor(size, **arguments)


def test_a_clock_reads_many_marks_later() -> None:
    clock = DeviceClock(torch.device("cpu"))
    marks = []
    for _ in range(3):
        time.sleep(0.01)
        marks.append(clock.mark())
    seconds = [*clock.read(marks[:1]), *clock.read(marks[1:])]
    assert seconds == sorted(seconds)
    assert seconds[0] >= 0.01
    assert seconds[2] - seconds[0] >= 0.02


def test_the_names_are_where_people_look_for_them() -> None:
    import fulmen_fabric
    from fulmen.utilities import spike, throughput

    assert throughput.get_available_flops is fulmen_fabric.get_available_flops
    assert throughput.Throughput is Throughput is fulmen_fabric.Throughput
    assert spike.TrainingSpikeException is fulmen_fabric.TrainingSpikeException
