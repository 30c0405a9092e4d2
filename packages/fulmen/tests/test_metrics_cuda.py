"""The metric store on a CUDA device: no step waits for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fulmen._metric_read import HostSnapshot
from fulmen._reporting import Reporter
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


def test_a_row_reads_all_values_at_once() -> None:
    rows: list[dict[str, float]] = []

    class Rows:
        name, version = "rows", 0

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            rows.append(dict(metrics))

        def save(self) -> None: ...

    store = make_store()
    store.start_batch(torch.zeros(1, device="cuda"), 0, None)
    for index in range(10):
        log(store, f"x{index}", torch.full((), float(index), device="cuda"))
    Reporter(loggers=[Rows()]).report_step(store, batches_that_stepped=0, epoch=0)  # type: ignore[list-item]  # wrong on purpose
    assert rows == [{**{f"x{index}_step": float(index) for index in range(10)}, "epoch": 0}]
