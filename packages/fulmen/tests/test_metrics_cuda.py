"""The metric store on a CUDA device: no step waits for it."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fulmen import LightningModule, Trainer
from fulmen._metric_read import HostSnapshot
from fulmen._reporting import Reporter
from fulmen.callbacks import LearningRateMonitor
from fulmen.loggers import CSVLogger
from fulmen.metrics import MetricStore, scope_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Alone:
    rank = 0
    world_size = 1


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    # Pinned memory is taken once, which waits by itself.
    torch.empty(16, dtype=torch.float64, pin_memory=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_store(stage: str = "train") -> MetricStore:
    store = MetricStore(device=torch.device("cuda"), collectives=Alone(), stage=stage)  # type: ignore[arg-type]  # a stand-in
    store.scope = scope_for("training_step" if stage == "train" else "validation_step")
    return store


def log(store: MetricStore, name: str, value: Any, reduce_fx: str = "mean", *, on_step: bool = True) -> None:
    store.log(
        name, value, True, None, on_step, True, reduce_fx, False, None, True, None, None, False, module=None
    )  # fmt: skip


@pytest.mark.usefixtures("waiting_is_an_error")
def test_two_hundred_ragged_steps_wait_for_nothing_and_are_right() -> None:
    store, reporter = make_store(), Reporter(log_every_n_steps=0)
    reporter.store = store
    host = np.random.default_rng(0).normal(size=200).astype(np.float32)
    on_device = torch.empty(200, device="cuda")
    torch.cuda.set_sync_debug_mode("default")
    on_device.copy_(torch.from_numpy(host))
    torch.cuda.set_sync_debug_mode("error")
    batches = [torch.zeros(1 + step % 7, 2, device="cuda") for step in range(200)]

    for step, batch in enumerate(batches):
        store.start_batch(batch, step, None)
        for op in ("mean", "sum", "min", "max"):
            log(store, op, on_device[step] * 1.0, op)
        log(store, "number", float(host[step]))
        if step % 10 == 0:
            reporter.progress_bar_metrics  # noqa: B018
    store.reduce_epoch()
    metrics = dict(reporter.callback_metrics)

    torch.cuda.set_sync_debug_mode("default")
    sizes = [len(batch) for batch in batches]
    expected = {
        "mean": np.average(host.astype(np.float64), weights=sizes),
        "number": np.average(host.astype(np.float64), weights=sizes),
        "sum": host.astype(np.float64).sum(),
        "min": host.min(),
        "max": host.max(),
    }
    for name, value in expected.items():
        assert metrics[name].device.type == "cuda"
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("waiting_is_an_error")
def test_evaluation_in_inference_mode_waits_for_nothing() -> None:
    store, reporter = make_store("validate"), Reporter()
    with torch.inference_mode():
        for step in range(100):
            store.start_batch(torch.zeros(1 + step % 3, 2, device="cuda"), step, None)
            log(store, "x", torch.ones((), device="cuda"))
            reporter.report_eval_step(store, batches_seen=step)
        store.reduce_epoch()
    torch.cuda.set_sync_debug_mode("default")
    assert float(store.callback_metrics["x_epoch"]) == 1.0


@pytest.mark.usefixtures("waiting_is_an_error")
def test_a_snapshot_answers_at_once_and_is_exact_one_reading_later() -> None:
    snapshot = HostSnapshot()
    value = torch.full((), math.pi, device="cuda", dtype=torch.float64)

    assert snapshot.update({"x": value, "host": 2.0}) == {"host": 2.0}
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    assert snapshot.update({"x": value, "host": 3.0}) == {"x": math.pi, "host": 3.0}


def test_values_of_the_host_and_of_the_device_make_one_mean() -> None:
    store = make_store()
    store.start_batch(torch.zeros(1), 0, None)
    for _ in range(70):
        log(store, "x", torch.ones((), device="cuda"))
        log(store, "x", torch.full((), 3.0))
    store.reduce_epoch()
    assert float(store.callback_metrics["x_epoch"]) == pytest.approx(2.0)


class Rows:
    """A logger that keeps what it is given."""

    name, version = "rows", 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def save(self) -> None: ...


def busy() -> None:
    """Keep the device from coming to what is queued next, for some tenths of a second."""
    torch.cuda._sleep(10**9)


@pytest.mark.usefixtures("waiting_is_an_error")
def test_a_row_comes_by_itself_and_holds_what_was_logged_then() -> None:
    logger: Any = Rows()
    store, reporter = make_store(), Reporter(loggers=[logger])
    (take_arrived,) = reporter.step_hooks(store.device)
    value = torch.zeros(10, device="cuda")

    def arrives() -> None:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        take_arrived()

    def row(at: int) -> None:
        store.start_batch(torch.zeros(1, device="cuda"), at, None)
        value.copy_(torch.arange(10, device="cuda") + at)
        for index in range(10):
            log(store, f"x{index}", value[index])
        reporter.report_step(store, batches_that_stepped=at, epoch=0)
        reporter.log_metrics({"lr": 0.5}, x=at, epoch=0)
        value.fill_(-1.0)
        take_arrived()

    row(0)  # loads the kernels and pins memory, for which the driver waits until the device is idle
    arrives()
    logger.rows.clear()
    busy()
    row(1)
    assert logger.rows == []
    arrives()
    values = {f"x{index}_step": index + 1.0 for index in range(10)}
    assert logger.rows == [(1, {**values, "epoch": 0}), (1, {"lr": 0.5, "epoch": 0})]


def test_what_is_on_its_way_is_there_when_the_epoch_is_reported_or_a_checkpoint_asks() -> None:
    logger: Any = Rows()
    store, reporter = make_store(), Reporter(loggers=[logger])
    for step in range(2):
        store.start_batch(torch.zeros(1, device="cuda"), step, None)
        busy()
        log(store, "x", torch.full((), float(step), device="cuda"))
        reporter.report_step(store, batches_that_stepped=step, epoch=0)
        if step == 0:
            reporter.settle()
            assert logger.rows == [(0, {"x_step": 0.0, "epoch": 0})]
    store.reduce_epoch()
    reporter.report_train_epoch(store, batches_that_stepped=2, epoch=0)
    assert logger.rows[1:] == [(1, {"x_step": 1.0, "epoch": 0}), (1, {"x_epoch": 0.5, "epoch": 0})]


def test_a_fit_with_loggers_and_a_row_each_step_waits_for_nothing_and_logs_what_a_raw_loop_computes(
    tmp_path: Path,
) -> None:
    data = [torch.full((2, 1), float(index), device="cuda") for index in range(12)]

    class Line(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            torch.cuda.set_sync_debug_mode("error" if batch_idx > 2 else "default")
            loss = (batch * self.weight - 1).pow(2).mean()
            self.log("loss", loss, prog_bar=True)
            return loss

        def on_train_epoch_end(self) -> None:
            torch.cuda.set_sync_debug_mode("default")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    trainer = Trainer(
        accelerator="cuda",
        devices=1,
        max_epochs=1,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path),
        callbacks=[LearningRateMonitor("step")],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(Line(), data)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    weight = torch.ones(1, device="cuda", requires_grad=True)
    losses = []
    for batch in data:
        loss = (batch * weight - 1).pow(2).mean()
        losses.append(float(loss.detach()))
        (grad,) = torch.autograd.grad(loss, weight)
        weight = (weight - 1e-3 * grad).detach().requires_grad_()
    with (Path(trainer.log_dir or "") / "metrics.csv").open(encoding="utf-8") as stream:
        logged = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(stream) if row["loss"]}
    assert list(logged) == list(range(12))
    assert list(logged.values()) == pytest.approx(losses, rel=1e-6)
