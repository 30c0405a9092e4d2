"""Reporter: rows, x axes and results, through a real CSV-like sink in memory."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen._reporting import Reporter, print_results
from fulmen.metrics import MetricStore, scope_for

if TYPE_CHECKING:
    from collections.abc import Mapping


class Alone:
    rank = 0
    world_size = 1


class Rows:
    """A logger that keeps its rows in a list."""

    name = "rows"
    version = 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.saves = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert all(type(value) in (float, int) for value in metrics.values())
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Mapping[str, object]) -> None: ...

    def save(self) -> None:
        self.saves += 1

    def finalize(self, status: str) -> None: ...


def make_store(stage: str = "train") -> MetricStore:
    store = MetricStore(device=torch.device("cpu"), collectives=Alone(), stage=stage)  # type: ignore[arg-type]  # a stand-in
    store.scope = scope_for({"train": "training_step", "test": "test_step"}.get(stage, "validation_step"))
    store.start_batch(torch.zeros(1, 2), 0, None)
    return store


def log(store: MetricStore, name: str, value: Any, **options: Any) -> None:
    given: dict[str, Any] = {
        "prog_bar": False,
        "logger": None,
        "on_step": None,
        "on_epoch": None,
        "reduce_fx": "mean",
        "sync_dist": False,
        "sync_dist_group": None,
        "add_dataloader_idx": True,
        "batch_size": None,
        "metric_attribute": None,
        "rank_zero_only": False,
        "module": None,
    }
    store.log(name, value, **{**given, **options})


@pytest.mark.proves("6.21")
def test_rows_come_every_n_batches_that_stepped_counted_from_one() -> None:
    reporter = Reporter(log_every_n_steps=3)
    assert [step for step in range(10) if reporter.is_due(step)] == [2, 5, 8]
    assert reporter.is_due(0, stopping=True)


@pytest.mark.proves("6.21")
def test_zero_steps_between_rows_means_none() -> None:
    reporter = Reporter(log_every_n_steps=0)
    assert not any(reporter.is_due(step, stopping=True) for step in range(100))


@pytest.mark.proves("6.22")
def test_a_training_row_holds_the_latest_values_and_the_epoch() -> None:
    logger, store = Rows(), make_store()
    reporter = Reporter(loggers=[logger])
    log(store, "loss", torch.tensor(0.5))
    log(store, "half", torch.tensor(0.25, dtype=torch.float64))
    log(store, "hidden", 1.0, logger=False)

    reporter.report_step(store, batches_that_stepped=49, epoch=2)

    assert logger.rows == [(49, {"loss": 0.5, "half": 0.25, "epoch": 2})]
    assert set(reporter.logged_metrics) == {"loss", "half"}


@pytest.mark.proves("6.22")
def test_a_metric_named_step_sets_the_x_axis() -> None:
    logger, store = Rows(), make_store()
    log(store, "step", 1234.0)
    log(store, "x", 1.0)
    Reporter(loggers=[logger]).report_step(store, batches_that_stepped=1, epoch=0)
    assert logger.rows == [(1234, {"x": 1.0, "epoch": 0})]


def test_a_users_own_epoch_is_kept() -> None:
    logger, store = Rows(), make_store()
    log(store, "epoch", 7.5)
    Reporter(loggers=[logger]).report_step(store, batches_that_stepped=1, epoch=0)
    assert logger.rows == [(1, {"epoch": 7.5})]


@pytest.mark.proves("6.22")
def test_the_training_epochs_row_is_at_its_last_batch() -> None:
    logger, store = Rows(), make_store()
    reporter = Reporter(loggers=[logger])
    log(store, "loss", torch.tensor(1.0), on_epoch=True)
    log(store, "loss", torch.tensor(3.0), on_epoch=True)
    store.reduce_epoch()

    reporter.report_train_epoch(store, batches_that_stepped=10, epoch=0)

    assert logger.rows == [(9, {"loss_epoch": 2.0, "epoch": 0})]
    assert logger.saves == 1
    assert {"loss", "loss_epoch"} <= set(reporter.callback_metrics)


@pytest.mark.proves("6.23")
def test_evaluation_steps_are_drawn_over_batches_seen_and_epochs_over_training_steps() -> None:
    logger, store = Rows(), make_store("validate")
    reporter = Reporter(loggers=[logger])
    for batch in range(3):
        for loader in (0, 1):
            store.start_batch(torch.zeros(2, 2), batch, loader)
            log(store, "x", torch.tensor(float(10 * loader + batch)), on_step=True, on_epoch=True)
            reporter.report_eval_step(store, batches_seen=batch, dataloader_idx=loader)
    store.reduce_epoch()
    reporter.report_eval_epoch(store, batches_that_stepped=20, epoch=4)

    steps = [(batch, {f"x_step/dataloader_idx_{loader}": 10.0 * loader + batch})
             for batch in range(3) for loader in (0, 1)]  # fmt: skip
    ends = (20, {"x_epoch/dataloader_idx_0": 1.0, "x_epoch/dataloader_idx_1": 11.0, "epoch": 4})
    assert logger.rows == [*steps, ends]


@pytest.mark.proves("6.25")
def test_the_sanity_check_tells_callbacks_and_no_logger() -> None:
    logger, store = Rows(), make_store("sanity_check")
    reporter = Reporter(loggers=[logger])
    log(store, "x", 1.0, on_step=True, on_epoch=True)
    reporter.report_eval_step(store, batches_seen=0)
    store.reduce_epoch()
    reporter.report_eval_epoch(store, batches_that_stepped=0, epoch=0)

    assert logger.rows == []
    assert reporter.callback_metrics["x"] == 1.0
    reporter.reset()
    assert reporter.callback_metrics == {}


def test_other_ranks_call_no_logger_and_still_know_the_metrics() -> None:
    logger, store = Rows(), make_store()
    reporter = Reporter(loggers=[logger], is_global_zero=False)
    log(store, "x", 1.0, on_epoch=True)
    reporter.report_step(store, batches_that_stepped=0, epoch=0)
    store.reduce_epoch()
    reporter.report_train_epoch(store, batches_that_stepped=1, epoch=0)

    assert (logger.rows, logger.saves) == ([], 0)
    assert set(reporter.logged_metrics) == {"x_step", "x_epoch"}


def test_saving_is_left_to_declared_moments() -> None:
    logger, store = Rows(), make_store()
    reporter = Reporter(loggers=[logger], save_interval_s=3600)
    for step in range(100):
        log(store, "x", 1.0)
        reporter.report_step(store, batches_that_stepped=step, epoch=0)
    assert logger.saves == 0

    eager = Reporter(loggers=[logger], save_interval_s=0)
    eager.report_step(store, batches_that_stepped=100, epoch=0)
    assert logger.saves == 1


def test_a_row_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, store = Rows(), make_store()
    reporter = Reporter(loggers=[logger])
    for index in range(10):
        log(store, f"x{index}", torch.tensor(float(index)), prog_bar=True)
    reads = []
    tolist, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append("tolist") or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append("item") or item(self))

    reporter.report_step(store, batches_that_stepped=0, epoch=0)

    assert reads == ["tolist"]
    assert logger.rows[0][1] == {**{f"x{index}": float(index) for index in range(10)}, "epoch": 0}


@pytest.mark.proves("6.25")
def test_the_three_views_follow_the_running_store_and_outlive_it() -> None:
    train, validate = make_store(), make_store("validate")
    reporter = Reporter()
    reporter.store = train
    log(train, "loss", torch.tensor(1.0), prog_bar=True)
    same = reporter.callback_metrics
    assert same == {"loss": 1.0}
    assert reporter.progress_bar_metrics == {"loss": 1.0}

    reporter.store = validate
    log(validate, "acc", torch.tensor(0.5), prog_bar=True)
    validate.reduce_epoch()
    assert reporter.callback_metrics == {"loss": 1.0, "acc": 0.5}
    assert reporter.callback_metrics is same, "integrations write into it"
    same["theirs"] = torch.tensor(9.0)

    reporter.to_cpu()
    assert reporter.callback_metrics == {"loss": 1.0, "acc": 0.5, "theirs": 9.0}
    assert reporter.progress_bar_metrics == {"loss": 1.0, "acc": 0.5}
    assert all(type(value) is float for value in reporter.progress_bar_metrics.values())


@pytest.mark.proves("6.26")
def test_results_are_the_logged_epoch_values_of_each_loader_and_of_the_epoch_hooks() -> None:
    store = make_store("test")
    for loader in (0, 1):
        store.start_batch(torch.zeros(2, 2), 0, loader)
        log(store, "x", torch.tensor(float(loader)), on_step=True, on_epoch=True)
        log(store, "hidden", 1.0, logger=False)
    store.scope = scope_for("on_test_epoch_end")
    log(store, "end", 3.0)
    store.reduce_epoch()

    results = Reporter().results(store, num_dataloaders=2)

    assert results == [
        {"x_epoch/dataloader_idx_0": 0.0, "end": 3.0},
        {"x_epoch/dataloader_idx_1": 1.0, "end": 3.0},
    ]
    assert Reporter().results(make_store("test")) == [{}]


@pytest.mark.proves("6.26")
def test_the_result_table_has_a_row_for_each_metric_and_a_column_for_each_loader() -> None:
    out = io.StringIO()
    print_results([{"x/dataloader_idx_0": 0.5, "end": 3.0}, {"x/dataloader_idx_1": 0.25, "end": 3.0}], "test", file=out)

    lines = [line.split() for line in out.getvalue().splitlines() if not line.startswith("-")]
    assert lines == [
        ["Test", "metric", "DataLoader", "0", "DataLoader", "1"],
        ["end", "3.0", "3.0"],
        ["x", "0.5", "0.25"],
    ]
    assert "\x1b" not in out.getvalue()


def test_a_table_too_wide_for_the_terminal_goes_on_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    out = io.StringIO()
    print_results([{f"a_rather_long_metric_name/dataloader_idx_{i}": float(i)} for i in range(6)], "validate", file=out)

    assert all(len(line) <= 60 for line in out.getvalue().splitlines())
    assert all(f"DataLoader {i}" in out.getvalue() for i in range(6))


def test_the_rich_table_holds_the_same_numbers() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    print_results([{"accuracy": 0.125}], "test", file=out)
    assert "0.125" in out.getvalue()
    assert "Test metric" in out.getvalue()
    assert "\u2502" in out.getvalue() or "\u2503" in out.getvalue()
