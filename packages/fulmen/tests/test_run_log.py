"""The run's log is written first, survives the death of the process, and feeds every logger without slowing the run."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from fulmen import Callback, LightningModule, Trainer
from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.runlog import LogDelivery, read_run, replay
from fulmen.runlog._reader import records
from fulmen.runlog._record import decode, encode, encode_row
from fulmen.runlog._writer import EventLog
from fulmen.runlog.commands import main
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Whether a save falls into an outage, and is said to wait, is chance; what is said at the end is not.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not take what is logged")

STEPS = 12
QUICK = LogDelivery(finalize_timeout_s=2, retry_s=0.01, longest_retry_s=0.05)


class Model(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(2, width)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> DataLoader[torch.Tensor]:
    data: Any = torch.arange(float(STEPS * 2)).reshape(STEPS, 2) / STEPS
    return DataLoader(data, batch_size=1)


def trainer_for(folder: Path, logger: Any, delivery: LogDelivery | None = QUICK, **options: Any) -> Trainer:
    trainer = Trainer(
        logger=logger,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "log_every_n_steps": 1, "enable_checkpointing": False, **options},
    )
    if delivery is not None:
        trainer.log_delivery = delivery
    return trainer


class Sink:
    """A logger of somebody else: what it is asked to do is decided by ``act``."""

    name: str | None = "sink"
    version: int | str | None = "v1"

    def __init__(self, act: Callable[[Sink, int], None] | None = None) -> None:
        self.act = act
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.told: list[str] = []
        self.threads: set[int] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.threads.add(threading.get_ident())
        if self.act is not None:
            self.act(self, len(self.rows))
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        self.told.append(f"hparams {dict(params)}")

    def save(self) -> None:
        self.threads.add(threading.get_ident())

    def finalize(self, status: str) -> None:
        self.told.append(status)

    @property
    def steps(self) -> list[int | None]:
        return [step for step, metrics in self.rows if "loss" in metrics]


def folder_of_sink(folder: Path) -> Path:
    return folder / "sink" / "v1"


def logged(folder: Path) -> list[int]:
    rows = [located.record for located in read_run(str(folder)).rows]
    return [int(str(row["x"])) for row in rows if "loss" in row["values"]]  # type: ignore[operator]  # known to be there


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def box_of(trainer: Trainer, logger: object) -> Any:
    """What brings rows to ``logger``: the only thing that knows when a logger catches up after a run."""
    return vars(trainer)["_reporter"].delivery._boxes[id(logger)][1]


# ---------------------------------------------------------------------- the log itself


def test_the_log_holds_settings_rows_rates_checkpoints_and_the_outcome(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(monitor="loss", mode="min")
    trainer = trainer_for(tmp_path, CSVLogger(tmp_path), callbacks=[checkpoints], enable_checkpointing=True)

    trainer.fit(Model(width=5), loader())

    log = read_run(str(trainer.log_dir))
    assert log.status == "success"
    assert log.hparams == {"width": 5}
    assert [row.record["x"] for row in log.rows] == list(range(STEPS))
    with_table = table(Path(str(trainer.log_dir), "metrics.csv"))
    assert [row.record["values"]["loss"] for row in log.rows] == [float(row["loss"]) for row in with_table]  # type: ignore[index]  # known to be there
    assert log.states[0]["lr"] == {"SGD": 0.1}
    assert log.checkpoints[-1]["path"] == checkpoints.best_model_path
    assert log.checkpoints[-1]["score"] == pytest.approx(float(log.rows[-1].record["values"]["loss"]))  # type: ignore[index]  # known to be there
    assert log.begins[0]["fn"] == "fit"
    assert log.stages["training"] > 0


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_run_log import CSVLogger, Model, Trainer, loader, trainer_for

class Dies(Model):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 7:
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path({folder!r})
trainer_for(folder, CSVLogger(folder, version="run")).fit(Dies(), loader())
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_where_the_page_lies_is_said_once_however_many_calls_write_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, model = trainer_for(tmp_path, CSVLogger(tmp_path)), Model()
    with caplog.at_level(logging.INFO, logger="fulmen"):
        for _ in range(2):
            trainer.fit(model, loader())
        trainer.logger = CSVLogger(tmp_path, version="another")
        trainer.fit(model, loader())

    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("report:")]
    pages = [tmp_path / "lightning_logs" / version / "report.html" for version in ("version_0", "another")]
    assert said == [f"report: {page}" for page in pages]
    assert all(page.exists() for page in pages)


def test_a_killed_process_loses_no_row_and_its_page_can_still_be_made(tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    folder = tmp_path / "lightning_logs" / "run"

    assert ended.returncode == -9, ended.stderr
    # The row of batch 7 is written after on_train_batch_end, so 0 to 6 were logged.
    assert logged(folder) == list(range(7))
    assert read_run(str(folder)).status == "unfinished"
    assert main(["report", str(folder)]) == 0
    assert "running or killed" in (folder / "report.html").read_text()


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_half_a_line_is_skipped_and_does_not_swallow_the_next_one(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.jsonl"
    log = EventLog(str(path))
    for number in range(3):
        log.append({"kind": "metrics", "t": 0.0, "x": number, "values": {"loss": number}})
    log.close()
    path.write_bytes(path.read_bytes()[:-cut])

    again = EventLog(str(path))
    again.append({"kind": "metrics", "t": 0.0, "x": 3, "values": {"loss": 3}})
    again.close()

    found = [located.record["x"] for located in records(str(path))]
    # Cutting the line feed alone leaves a whole record.
    assert found == ([0, 1, 2, 3] if cut == 1 else [0, 1, 3])


def test_numbers_that_json_lacks_and_any_hyperparameter_come_back() -> None:
    line = encode({"kind": "metrics", "values": {"a": math.nan, "b": -math.inf, "c": 0.1}, "what": object})
    record = decode(line)

    assert json.loads(line, parse_constant=pytest.fail) == record
    assert record is not None
    assert record["values"] == {"a": "nan", "b": "-inf", "c": 0.1}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.text(), st.floats() | st.integers() | st.booleans() | st.just(10**400), max_size=5),
    st.floats(0, 2e9),
    st.integers(0, 2**40),
)
def test_a_row_is_written_quickly_as_any_record_is(values: dict[str, float], time_s: float, x: int) -> None:
    slowly = encode({"kind": "metrics", "t": time_s, "x": x, "at": x + 1, "of": "step", "values": values})

    assert encode_row(time_s, x, x + 1, "step", values) == slowly


def test_a_row_of_numbers_that_are_not_pythons_own_is_written_too() -> None:
    line = encode_row(1.5, np.int64(3), 4, "step", {"100%": np.float64(0.1), "a": np.float32(0.5)})  # type: ignore[arg-type]

    record = decode(line)
    assert record is not None
    assert (record["x"], record["values"]) == (3, {"100%": 0.1, "a": 0.5})


def test_nan_reaches_log_and_table_as_nan(tmp_path: Path) -> None:
    class Diverges(Model):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("odd", math.nan if batch_idx == 3 else 1.0)
            return loss

    trainer = trainer_for(tmp_path, CSVLogger(tmp_path))
    trainer.fit(Diverges(), loader())
    rows = read_run(str(trainer.log_dir)).rows

    assert [row.record["values"]["odd"] for row in rows][2:5] == [1.0, "nan", 1.0]  # type: ignore[index]  # known to be there
    assert table(Path(str(trainer.log_dir), "metrics.csv"))[3]["odd"] == "nan"


@pytest.mark.filterwarnings("ignore:.*barebones=True")
@pytest.mark.parametrize("options", [{"logger": False}, {"logger": None, "barebones": True}, {"fast_dev_run": 2}])
def test_without_loggers_there_is_no_log_no_page_and_no_thread(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"log_every_n_steps": None if "barebones" in options else 1, **options}
    before = set(threading.enumerate())

    trainer = trainer_for(tmp_path, options.pop("logger", None), enable_checkpointing=None, **options)
    trainer.fit(Model(), loader())

    assert not list(tmp_path.rglob("run.jsonl"))
    assert not list(tmp_path.rglob("report.html"))
    assert {thread for thread in threading.enumerate() if thread.name.startswith("fulmen-")} <= before


def test_a_folder_that_cannot_be_written_is_one_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen: list[int] = []

    class Watches(Model):
        def on_train_start(self) -> None:
            seen.append(1)

    with pytest.raises(MisconfigurationException, match=r"log cannot be written at '.*file.*run\.jsonl'.*Choose"):
        trainer_for(tmp_path / "file", Sink()).fit(Watches(), loader())

    assert not seen


# ---------------------------------------------------------------------- loggers out of band


@pytest.mark.proves("6.8")
def test_rows_arrive_in_order_from_another_thread_and_are_complete_when_fit_returns(tmp_path: Path) -> None:
    sink = Sink()

    trainer_for(tmp_path, sink).fit(Model(), loader())

    assert sink.steps == list(range(STEPS))
    assert sink.told == ["hparams {'width': 3}", "success"]
    assert threading.get_ident() not in sink.threads


def test_a_logger_that_asks_for_the_calling_thread_gets_it(tmp_path: Path) -> None:
    class Here(Sink):
        needs_calling_thread = True

    sink = Here()
    trainer_for(tmp_path, sink).fit(Model(), loader())

    assert sink.steps == list(range(STEPS))
    assert sink.threads == {threading.get_ident()}


def away(error: type[Exception], while_: Callable[[Sink, int], bool]) -> Callable[[Sink, int], None]:
    def act(sink: Sink, count: int) -> None:
        if while_(sink, count):
            raise error("nobody answers")

    return act


@pytest.mark.parametrize("threaded", [True, False])
def test_what_a_sink_missed_is_delivered_once_and_in_order_when_it_returns(tmp_path: Path, threaded: bool) -> None:
    tries: list[int] = []

    def fails_a_while(_: Sink, count: int) -> bool:
        tries.append(count)
        return 3 <= len(tries) <= 5

    class Chosen(Sink):
        needs_calling_thread = not threaded

    sink = Chosen(away(ConnectionError, fails_a_while))
    # A short queue as well: most of the backlog comes from the log.
    delivery = LogDelivery(queue_rows=3, finalize_timeout_s=20, retry_s=0.01, longest_retry_s=0.05)
    trainer_for(tmp_path, sink, delivery).fit(Model(), loader())

    assert sink.steps == list(range(STEPS))
    assert sink.told[-1] == "success"


def test_a_sink_that_always_raises_costs_no_step_and_replay_delivers_it_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = Sink(away(ConnectionError, lambda _, __: True))
    trainer = trainer_for(tmp_path, [CSVLogger(tmp_path, version="run"), sink])

    with pytest.warns(UserWarning, match="Sink did not get everything that was logged"):
        trainer.fit(Model(), loader())

    folder = tmp_path / "lightning_logs" / "run"
    assert trainer.global_step == STEPS
    assert logged(folder) == list(range(STEPS))
    assert len(table(folder / "metrics.csv")) == STEPS, "the other logger has everything"
    assert main(["replay", str(folder)]) == 1
    assert "Sink did not get everything, but it cannot be opened by name" in capsys.readouterr().err

    well = Sink()  # the first one's thread is still trying
    assert replay(str(folder), well) >= STEPS
    assert well.steps == list(range(STEPS))


def test_a_sink_that_never_answers_stops_neither_the_run_nor_its_end(tmp_path: Path) -> None:
    release = threading.Event()

    def wait(_: Sink, __: int) -> None:
        release.wait(60)

    sink = Sink(wait)
    trainer = trainer_for(tmp_path, sink)

    with pytest.warns(UserWarning, match=r"has not answered for .* s\. Deliver it later with fulmen\.runlog\.replay\("):
        trainer.fit(Model(), loader())

    assert not release.is_set()
    assert not sink.rows, "it was still blocked when fit returned"
    assert trainer.global_step == STEPS
    assert logged(folder_of_sink(tmp_path)) == list(range(STEPS))
    release.set()  # it comes back, and its backlog with it
    assert box_of(trainer, sink).wait_finished(20)
    assert sink.steps == list(range(STEPS))
    assert sink.told[-1] == "success"


def test_a_backlog_longer_than_the_queue_is_read_from_the_log(tmp_path: Path) -> None:
    release = threading.Event()

    class Frees(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            release.set()

    def wait(_: Sink, __: int) -> None:
        release.wait(60)

    sink = Sink(wait)
    delivery = LogDelivery(queue_rows=2, finalize_timeout_s=20)
    trainer_for(tmp_path, sink, delivery, callbacks=[Frees()]).fit(Model(), loader())

    assert sink.steps == list(range(STEPS))


def test_a_row_that_a_sink_refuses_is_named_and_the_others_arrive(tmp_path: Path) -> None:
    def picky(sink: Sink, count: int) -> None:
        if count == 4 and not sink.told.count("refused"):
            sink.told.append("refused")
            raise ValueError("no such number here")

    sink = Sink(picky)
    with pytest.warns(UserWarning, match=r"Sink refused 1 of the run's records, the first as record: ValueError"):
        trainer_for(tmp_path, sink).fit(Model(), loader())

    assert sink.steps == [step for step in range(STEPS) if step != 4]


def test_a_row_that_keeps_failing_is_passed_over_when_the_sink_takes_the_next(tmp_path: Path) -> None:
    class Poisoned(Sink):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            if step == 4:
                raise RuntimeError("this row is broken")
            super().log_metrics(metrics, step)

    sink = Poisoned()
    delivery = LogDelivery(finalize_timeout_s=20, retry_s=0.01, longest_retry_s=0.02)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer_for(tmp_path, sink, delivery).fit(Model(), loader())

    assert sorted(step for step in sink.steps if step is not None) == [step for step in range(STEPS) if step != 4]
    assert any("refused 1 of the run's records, the first as record: RuntimeError" in str(w.message) for w in said)


VANISHES = """
import sys, warnings
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_run_log import Callback, CSVLogger, Model, TensorBoardLogger, loader, trainer_for

folder = Path({folder!r})
share = folder / "share"
second = {logger}

class Unplugs(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            second.save()  # so that what came before is there, though the run has not noted it
            share.rename(folder / "kept")
            share.write_text("")  # nothing can be made below it

trainer = trainer_for(folder, [CSVLogger(folder, version="run"), second], callbacks=[Unplugs()])
trainer.fit(Model(), loader())
print("steps", trainer.global_step)
"""


TABLE = 'CSVLogger(share, version="run", flush_logs_every_n_steps=1)'


def test_a_folder_that_vanishes_under_a_logger_stops_nothing_and_replay_fills_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = VANISHES.format(tests=str(Path(__file__).parent), folder=str(tmp_path), logger=TABLE)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    folder, share = tmp_path / "lightning_logs" / "run", tmp_path / "share"

    assert f"steps {STEPS}" in ended.stdout
    assert "CSVLogger did not get everything that was logged" in ended.stderr
    assert f"fulmen log replay {folder}" in ended.stderr
    assert len(table(folder / "metrics.csv")) == STEPS
    share.unlink()
    (tmp_path / "kept").rename(share)
    assert main(["replay", str(folder)]) == 0
    rows = table(share / "lightning_logs" / "run" / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert "csv: 8 records delivered" in capsys.readouterr().out
    assert main(["replay", str(folder)]) == 0
    assert "nothing to deliver" in capsys.readouterr().out


def test_a_logger_that_comes_back_after_the_run_is_not_fed_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share = tmp_path / "share"
    share.write_text("")  # nothing can be made below it
    late = CSVLogger(share, version="run")
    trainer = trainer_for(tmp_path, [CSVLogger(tmp_path, version="run"), late])
    with pytest.warns(UserWarning, match="CSVLogger did not get everything"):
        trainer.fit(Model(), loader())

    share.unlink()
    assert box_of(trainer, late).wait_finished(20)

    assert main(["replay", str(tmp_path / "lightning_logs" / "run")]) == 0
    assert "nothing to deliver" in capsys.readouterr().out
    assert len(table(share / "lightning_logs" / "run" / "metrics.csv")) == STEPS


def test_a_folder_that_vanishes_under_tensorboard_stops_nothing_and_replay_leaves_each_point_there_once(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = 'TensorBoardLogger(share, version="run")'
    script = VANISHES.format(tests=str(Path(__file__).parent), folder=str(tmp_path), logger=board)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    folder, share = tmp_path / "lightning_logs" / "run", tmp_path / "share"

    assert f"steps {STEPS}" in ended.stdout
    assert "TensorBoardLogger did not get everything that was logged" in ended.stderr
    assert f"fulmen log replay {folder}" in ended.stderr
    assert logged(folder) == list(range(STEPS))
    share.unlink()
    (tmp_path / "kept").rename(share)
    for _ in range(2):
        assert main(["replay", str(folder)]) == 0
    # What was written through the open file went with the folder, so some of it is there before the replay.
    read = EventAccumulator(str(share / "lightning_logs" / "run"))
    read.Reload()
    assert sorted(event.step for event in read.Scalars("loss")) == list(range(STEPS))


def test_tensorboard_stops_nothing_when_it_raises(tmp_path: Path) -> None:
    class Broken(TensorBoardLogger):
        def log_metrics_at(self, metrics: Any, step: int, time_s: float) -> None:
            raise OSError("disk gone")

    trainer = trainer_for(tmp_path, [CSVLogger(tmp_path, version="run"), Broken(tmp_path, version="tb")])
    with pytest.warns(UserWarning, match="Broken did not get everything that was logged"):
        trainer.fit(Model(), loader())

    assert trainer.global_step == STEPS
    assert logged(tmp_path / "lightning_logs" / "run") == list(range(STEPS))


def test_a_save_from_a_hook_writes_every_row_logged_before(tmp_path: Path) -> None:
    found: list[int] = []

    class Reads(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 6:
                assert trainer.logger is not None
                trainer.logger.save()
                found.append(len(table(Path(str(trainer.log_dir), "metrics.csv"))))

    trainer_for(tmp_path, CSVLogger(tmp_path), callbacks=[Reads()]).fit(Model(), loader())

    assert found == [6]


def test_hooks_use_a_loggers_experiment_while_rows_are_delivered(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Writes(Model):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            assert self.logger is not None
            self.logger.experiment.add_scalar("own", float(batch_idx), batch_idx)
            return super().training_step(batch, batch_idx)

    trainer = trainer_for(tmp_path, TensorBoardLogger(tmp_path))
    trainer.fit(Writes(), loader())

    read = EventAccumulator(str(trainer.log_dir))
    read.Reload()
    for name in ("own", "loss"):
        assert [event.step for event in read.Scalars(name)] == list(range(STEPS))


@pytest.mark.proves("6.8")
def test_a_failed_run_says_so_in_log_and_loggers(tmp_path: Path) -> None:
    class Fails(Model):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                raise RuntimeError("<b>out of luck</b>")

    sink = Sink()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_for(tmp_path, sink).fit(Fails(), loader())

    log = read_run(str(folder_of_sink(tmp_path)))
    assert (log.status, log.ends[-1]["error"]) == ("failed", "RuntimeError: <b>out of luck</b>")
    assert sink.steps == list(range(5))
    assert sink.told[-1] == "failed"
    page = (folder_of_sink(tmp_path) / "report.html").read_text()
    assert "&lt;b&gt;out of luck&lt;/b&gt;" in page


# ---------------------------------------------------------------------- resumed, replayed


def test_a_resumed_run_has_each_point_once_in_its_log_and_in_what_is_replayed(tmp_path: Path) -> None:
    class Stops(Model):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                self.trainer.save_checkpoint(tmp_path / "at5.ckpt")
            if batch_idx == 8:
                raise KeyboardInterrupt

    torch.manual_seed(1)
    whole = trainer_for(tmp_path / "whole", CSVLogger(tmp_path / "whole"))
    whole.fit(Model(), loader())
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(tmp_path, CSVLogger(tmp_path, version="run")).fit(Stops(), loader())
    folder = tmp_path / "lightning_logs" / "run"
    assert logged(folder) == list(range(8))

    trainer_for(tmp_path, CSVLogger(tmp_path, version="run")).fit(
        Model(), loader(), ckpt_path=str(tmp_path / "at5.ckpt")
    )

    assert logged(folder) == list(range(STEPS))
    assert main(["replay", str(folder), "--logger", "csv", "--option", f"save_dir={tmp_path / 'again'}"]) == 0
    again = next((tmp_path / "again").rglob("metrics.csv"))
    expected = table(Path(str(whole.log_dir), "metrics.csv"))
    assert [(row["step"], row["loss"]) for row in table(again)] == [(row["step"], row["loss"]) for row in expected]


def test_what_an_earlier_process_did_not_deliver_is_not_forgotten_by_a_later_one(tmp_path: Path) -> None:
    script = VANISHES.format(tests=str(Path(__file__).parent), folder=str(tmp_path), logger=TABLE)
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    folder, share = tmp_path / "lightning_logs" / "run", tmp_path / "share"
    share.unlink()
    (tmp_path / "kept").rename(share)
    both = [CSVLogger(tmp_path, version="run"), CSVLogger(share, version="run")]

    trainer_for(tmp_path, both).validate(Validated(), loader())  # a call that logs one row more
    assert main(["replay", str(folder)]) == 0

    rows = table(share / "lightning_logs" / "run" / "metrics.csv")
    assert sorted(int(row["step"]) for row in rows if row["loss"]) == list(range(STEPS))
    assert [row["val_loss"] for row in rows if row.get("val_loss")] == ["0.5"]


class Validated(Model):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", 0.5)


def test_the_same_version_from_scratch_takes_the_place_of_the_first_run(tmp_path: Path) -> None:
    for _ in range(2):
        trainer_for(tmp_path, CSVLogger(tmp_path, version="run")).fit(Model(), loader())

    folder = tmp_path / "lightning_logs" / "run"
    assert logged(folder) == list(range(STEPS))
    assert len(read_run(str(folder)).begins) == 2
    assert len(table(folder / "metrics.csv")) == 2 * STEPS, "a table is continued, as it always was"


def test_a_replay_that_is_interrupted_goes_on_without_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_for(tmp_path, CSVLogger(tmp_path, version="run")).fit(Model(), loader())
    folder = tmp_path / "lightning_logs" / "run"
    command = ["replay", str(folder), "--logger", "csv"]
    write = CSVLogger.log_metrics

    def breaks(self: CSVLogger, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step == 5:
            raise ConnectionError("cut off")
        write(self, metrics, step)

    monkeypatch.setattr(CSVLogger, "log_metrics", breaks)
    assert main(command) == 1
    assert "csv: stopped by ConnectionError: cut off. The same command goes on from there." in capsys.readouterr().err
    monkeypatch.undo()

    assert main(command) == 0
    assert main(command) == 0, "a third time delivers nothing"

    rows = table(folder / "replay" / "csv" / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert "csv: 0 records delivered" in capsys.readouterr().out


def test_tensorboard_gets_replayed_points_with_the_time_they_were_logged_at(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer_for(tmp_path, CSVLogger(tmp_path, version="run")).fit(Model(), loader())
    folder = tmp_path / "lightning_logs" / "run"

    assert main(["replay", str(folder), "--logger", "tensorboard"]) == 0

    read = EventAccumulator(str(folder / "replay" / "tensorboard"))
    read.Reload()
    rows = [located.record for located in read_run(str(folder)).rows]
    found = [(event.step, event.wall_time) for event in read.Scalars("loss")]
    assert found == [(row["x"], pytest.approx(row["t"])) for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["replay", "nowhere"], r"'nowhere' holds no log of a run"),
        (["report", "nowhere"], r"'nowhere' holds no log of a run"),
        (["replay", "RUN", "--logger", "cvs"], r"no logger is named 'cvs'.*csv"),
        (["replay", "RUN", "--logger", "csv", "--option", "folder=x"], r"--option folder='x': the logger 'csv' has no"),
        (["replay", "RUN", "--logger", "csv", "--option", "x"], r"--option 'x': write NAME=VALUE"),
        (["replay", "RUN", "--option", "a=1"], r"--option a=1 needs --logger"),
        (["replay", "RUN", "--logger", "csv", "tensorboard", "--option", "a=1"], r"--option a=1 cannot be for csv and"),
    ],
)
def test_a_wrong_command_is_one_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    log = EventLog(str(run / "run.jsonl"))
    log.append({"kind": "begin", "format": 1})
    log.close()

    assert main([str(run) if word == "RUN" else word for word in words]) == 1

    assert re.search(message, capsys.readouterr().err)


def test_a_library_that_is_missing_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fulmen_loggers._optional.find_spec", lambda _: None)
    EventLog(str(tmp_path / "run.jsonl")).close()

    assert main(["replay", str(tmp_path), "--logger", "wandb"]) == 1

    assert "WandbLogger needs wandb, which is not installed. Run: pip install" in capsys.readouterr().err


def test_a_log_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "run.jsonl"))
    log.append({"kind": "begin", "format": 99})
    log.close()

    with pytest.raises(
        MisconfigurationException, match=r"is of format 99, and this version of fulmen reads 1\. Update"
    ):
        read_run(str(tmp_path))


@pytest.mark.parametrize(
    "field", ["queue_rows", "finalize_timeout_s", "upload_timeout_s", "retry_s", "longest_retry_s"]
)
def test_a_setting_that_is_not_positive_is_refused(field: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"LogDelivery\({field}=0\): give more than 0"):
        LogDelivery(**{field: 0})


def test_a_full_disk_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    sink = Sink()
    folder = folder_of_sink(tmp_path)
    folder.mkdir(parents=True)
    (folder / "run.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr("os.fsync", lambda _: None)

    with pytest.warns(UserWarning, match=r"the run's log .* is not whole: \d+ records could not be written .*No space"):
        trainer_for(tmp_path, sink, LogDelivery(report=False)).fit(Model(), loader())

    assert sink.steps == list(range(STEPS))
    shutil.rmtree(folder)
