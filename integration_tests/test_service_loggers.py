"""A Trainer with the loggers of services: what a run leaves there. Needs their libraries (``nox -s loggers``)."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen.demos import BoringModel
from fulmen.demos.boring_classes import RandomDataset
from fulmen.runlog import LogDelivery, read_run
from fulmen.runlog.commands import main as log_command
from fulmen_protocols import BackendUnavailable

sys.path.insert(0, str(Path(__file__).parent))

from fault_service_runner import Server

if TYPE_CHECKING:
    from collections.abc import Callable

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    # The services' libraries leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    # Whether a save falls into an outage, and is said to wait, is chance; what is said at the end is not.
    pytest.mark.filterwarnings("ignore:.*does not take what is logged"),
    pytest.mark.timeout(900),  # the libraries are patient, and slow to start
]

PATIENT = LogDelivery(finalize_timeout_s=240)
"""A service's library may take longer to start on a busy machine than a run waits by default."""


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Puts an empty database of MLflow's at a path: MLflow makes one in 68 migrations, which is done once."""
    made = tmp_path_factory.mktemp("mlflow") / "empty.db"

    def place(path: Path) -> str:
        from mlflow.tracking import MlflowClient

        if not made.exists():
            MlflowClient(f"sqlite:///{made}").search_experiments()
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, path)
        return f"sqlite:///{path}"

    return place


class Module(BoringModel):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.step(batch)
        self.log("train/loss", loss)
        if batch_idx == 5 and self.hparams["width"] == 13:
            raise RuntimeError("the module's own fault")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))


def run(logger: Any, folder: Path, module: Module, delivery: LogDelivery = PATIENT) -> fulmen.Trainer:
    torch.manual_seed(0)
    trainer = fulmen.Trainer(
        max_epochs=2,
        logger=logger,
        callbacks=[ModelCheckpoint(dirpath=folder / "kept", monitor="val_loss")],
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.log_delivery = delivery
    loader = DataLoader(RandomDataset(32, 12), batch_size=2)
    trainer.fit(module, loader, loader)
    return trainer


@needs_mlflow
@pytest.mark.proves("6.5", "6.7", "6.8")
def test_a_run_is_in_mlflow_with_its_settings_steps_and_best_checkpoint(
    tmp_path: Path, new_database: Callable[[Path], str]
) -> None:
    from fulmen.loggers import MLFlowLogger

    new_database(tmp_path / "runs" / "mlflow.db")
    logger = MLFlowLogger(save_dir=tmp_path / "runs", log_model=True)

    trainer = run(logger, tmp_path, Module())

    found = logger.experiment.get_run(logger.run_id)
    assert found.data.params == {"width": "3"}  # type: ignore[attr-defined]  # its type does not say so
    assert found.info.status == "FINISHED"  # type: ignore[attr-defined]  # its type does not say so
    history = logger.experiment.get_metric_history(logger.run_id, "train/loss")  # type: ignore[attr-defined]  # its type does not say so
    assert [each.step for each in history] == [1, 3, 5, 7, 9, 11]
    [uploaded] = logger.experiment.list_artifacts(logger.run_id)  # type: ignore[attr-defined]  # its type does not say so
    assert trainer.checkpoint_callback.best_model_path.endswith(f"{uploaded.path}.ckpt")


@needs_mlflow
@pytest.mark.proves("6.8")
def test_a_run_that_fails_is_failed_in_mlflow(tmp_path: Path, new_database: Callable[[Path], str]) -> None:
    from fulmen.loggers import MLFlowLogger

    new_database(tmp_path / "runs" / "mlflow.db")
    logger = MLFlowLogger(save_dir=tmp_path / "runs")

    with pytest.raises(RuntimeError, match="own fault"):
        run(logger, tmp_path, Module(width=13))

    assert logger.experiment.get_run(logger.run_id).info.status == "FAILED"  # type: ignore[attr-defined]  # its type does not say so


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.proves("6.4")
def test_checkpoints_are_filed_under_the_project_and_id_of_a_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    from fulmen.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="mine")
    trainer = fulmen.Trainer(
        max_epochs=1, logger=logger, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0
    )
    trainer.log_delivery = PATIENT

    trainer.fit(Module(), DataLoader(RandomDataset(32, 12), batch_size=2))

    [kept] = (tmp_path / "mine" / logger.version / "checkpoints").iterdir()
    assert kept.name == "epoch=0-step=6.ckpt"
    assert trainer.log_dir == str(tmp_path)
    wandb.finish()


# ---------------------------------------------------------------------- services that raise, block or vanish


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def points_in_mlflow(address: str, run_id: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    history = MlflowClient(address).get_metric_history(run_id, "loss")
    return [(point.step, point.value) for point in history]


@needs_mlflow
@pytest.mark.slow
@pytest.mark.parametrize("comes_back", ["yes", "no"])
def test_an_mlflow_server_that_is_killed_stops_no_run_and_gets_every_point_once(
    tmp_path: Path, new_database: Callable[[Path], str], comes_back: str
) -> None:
    port = free_port()
    new_database(tmp_path / "server.db")
    runner = Path(__file__).with_name("fault_service_runner.py")
    ended = subprocess.run(
        [sys.executable, str(runner), "mlflow", str(tmp_path), str(port), comes_back],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    [log] = tmp_path.rglob("run.jsonl")
    rows = [located.record for located in read_run(str(log)).rows]
    expected = [(row["x"], row["values"]["loss"]) for row in rows]  # type: ignore[index]  # known to be there
    assert told["steps"] == 30
    assert [x for x, _ in expected] == list(range(30))

    server = Server(tmp_path, port)
    server.start()
    try:
        if comes_back == "no":
            assert f"fulmen log replay {log.parent}" in ended.stderr
            assert len(points_in_mlflow(server.address, told["run"])) < 30
            assert log_command(["replay", str(log.parent)]) == 0
            assert log_command(["replay", str(log.parent)]) == 0
        assert sorted(points_in_mlflow(server.address, told["run"])) == expected
        from mlflow.tracking import MlflowClient

        assert MlflowClient(server.address).get_run(told["run"]).info.status == "FINISHED"
    finally:
        server.kill()


@needs_mlflow
def test_an_mlflow_server_that_is_down_at_the_start_is_one_error_before_training(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    logger = fulmen.loggers.MLFlowLogger(tracking_uri=address)

    with pytest.raises(BackendUnavailable, match=rf"tracking_uri='{address}'\): no server answers.*Start it"):
        run(logger, tmp_path, Module())


@needs_mlflow
def test_an_mlflow_server_that_is_down_beside_another_logger_or_with_a_known_run_stops_nothing(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    csv = fulmen.loggers.CSVLogger(tmp_path, version="run")

    for case, loggers in (
        ("beside", [csv, fulmen.loggers.MLFlowLogger(tracking_uri=address)]),
        ("known", [mlflow_of(address, "abc")]),
    ):
        with pytest.warns(UserWarning, match="MLFlowLogger did not get everything that was logged"):
            trainer = run(loggers, tmp_path / case, Module(), LogDelivery(finalize_timeout_s=3))
        assert trainer.global_step == 12


def mlflow_of(address: str, run_id: str) -> Any:
    return fulmen.loggers.MLFlowLogger(tracking_uri=address, run_id=run_id)


def sink(kind: str, folder: Path, new_database: Callable[[Path], str]) -> Any:
    if kind == "csv":
        return fulmen.loggers.CSVLogger(folder, version="run")
    if kind == "tensorboard":
        return fulmen.loggers.TensorBoardLogger(folder, version="run")
    if kind == "wandb":
        pytest.importorskip("wandb")
        return fulmen.loggers.WandbLogger(project="away", offline=True, save_dir=folder)
    if kind == "comet":
        pytest.importorskip("comet_ml")
        return fulmen.loggers.CometLogger(online=False, project="away", offline_directory=str(folder))
    pytest.importorskip("mlflow")
    return fulmen.loggers.MLFlowLogger("away", tracking_uri=new_database(folder / "m.db"))


def points_of(kind: str, logger: Any, folder: Path) -> list[tuple[int, float]]:
    """The points of ``train/loss`` that a sink has, read without the logger."""
    if kind == "csv":
        with Path(logger.log_dir, "metrics.csv").open() as stream:
            rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
        return [(int(row["step"]), float(row["train/loss"])) for row in rows]
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(logger.log_dir)
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("train/loss")]
    if kind == "wandb":
        import wandb

        wandb.finish()
        [written] = folder.rglob("run-*.wandb")
        rows = [row for row in history_of(written) if "train/loss" in row]
        return [(int(row["trainer/global_step"]), float(row["train/loss"])) for row in rows]
    if kind == "comet":
        logger.experiment.end()
        [archive] = folder.glob("*.zip")
        with zipfile.ZipFile(archive) as opened:
            messages = [json.loads(line) for line in opened.read("messages.json").splitlines()]
        metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
        return [(m["step"], float(m["metricValue"])) for m in metrics if m["metricName"] == "train/loss"]
    history = logger.experiment.get_metric_history(logger.run_id, "train/loss")
    return [(point.step, point.value) for point in history]


@pytest.mark.parametrize("fault", ["raises", "blocks", "vanishes"])
@pytest.mark.parametrize(
    "kind",
    ["csv", "tensorboard", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("wandb", "mlflow", "comet"))],
)
def test_a_sink_that_fails_costs_no_step_and_no_record_and_gets_each_point_once_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_database: Callable[[Path], str], kind: str, fault: str
) -> None:
    logger = sink(kind, tmp_path, new_database)
    release, calls = threading.Event(), [0]
    method = "log_metrics_at" if kind in ("mlflow", "tensorboard") else "log_metrics"
    inner = getattr(type(logger), method)

    def faulty(self: Any, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if fault == "blocks":
            release.wait(60)
        if fault == "raises" or (fault == "vanishes" and calls[0] > 3):
            raise ConnectionError("nobody answers")
        inner(self, *args, **kwargs)

    monkeypatch.setattr(type(logger), method, faulty)
    with pytest.warns(UserWarning, match=f"{type(logger).__name__} did not get everything that was logged"):
        trainer = run(logger, tmp_path, Module(), LogDelivery(finalize_timeout_s=2, retry_s=0.05))

    assert not release.is_set(), "a call that blocks was still blocked when fit returned"
    assert trainer.global_step == 12
    [log] = tmp_path.rglob("run.jsonl")
    rows = [located.record for located in read_run(str(log)).rows]
    logged = [(row["x"], row["values"]["train/loss"]) for row in rows if "train/loss" in row["values"]]  # type: ignore[operator, index]  # known to be there
    assert [x for x, _ in logged] == [1, 3, 5, 7, 9, 11]
    assert sum("val_loss" in row["values"] for row in rows) == 2  # type: ignore[operator]  # known to be there
    monkeypatch.undo()
    release.set()
    (_, box) = vars(trainer)["_reporter"].delivery._boxes[id(logger)]
    assert box.wait_finished(60), "it is back, and gets what it missed"
    # Sorted, since a row that has failed often waits for the one behind it. TensorBoard keeps 32 bits of a number.
    found = sorted(points_of(kind, logger, tmp_path))
    assert [x for x, _ in found] == [x for x, _ in logged]
    assert [value for _, value in found] == pytest.approx([value for _, value in logged], rel=1e-6)


@pytest.mark.slow
def test_a_service_of_wandb_that_is_killed_stops_no_run_and_replay_delivers_what_it_missed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    runner = Path(__file__).with_name("fault_service_runner.py")
    # With a service of its own: this process may have one, and tells its children.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    ended = subprocess.run(
        [sys.executable, str(runner), "wandb", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    [log] = tmp_path.rglob("run.jsonl")
    rows = [located.record for located in read_run(str(log)).rows]
    expected = {(row["x"], row["values"]["loss"]) for row in rows}  # type: ignore[index]
    assert told["steps"] == 30
    assert sorted(x for x, _ in expected) == list(range(30))
    assert "WandbLogger did not get everything that was logged" in ended.stderr
    assert f"fulmen log replay {log.parent}" in ended.stderr

    assert log_command(["replay", str(log.parent)]) == 0
    import wandb

    wandb.finish()
    written = sorted(tmp_path.rglob(f"run-{told['run']}.wandb"), key=lambda path: path.stat().st_mtime)
    history_of(written[-1])  # that of the replay has an end
    kept = [row for path in written for row in rows_of(records_of(path))]
    found = {(row["trainer/global_step"], row["loss"]) for row in kept if "loss" in row}
    # What the service was handed, and had not written when it was killed, may be lost to wandb; nothing later is.
    assert found <= expected
    assert {x for x, _ in found} >= set(range(10, 30))
    assert log_command(["replay", str(log.parent)]) == 0
    wandb.finish()
    assert set(tmp_path.rglob(f"run-{told['run']}.wandb")) == set(written), "nothing was left to deliver"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wandb", "comet"])
def test_a_service_that_is_down_at_the_start_stops_no_training_and_is_said(tmp_path: Path, kind: str) -> None:
    pytest.importorskip({"wandb": "wandb", "comet": "comet_ml"}[kind])
    runner = Path(__file__).with_name("fault_service_runner.py")
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    ended = subprocess.run(
        [sys.executable, str(runner), f"{kind}-down", str(tmp_path), str(free_port())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    [log] = tmp_path.rglob("run.jsonl")
    assert told["steps"] == 30
    assert [located.record["x"] for located in read_run(str(log)).rows] == list(range(30))
    name = {"wandb": "WandbLogger", "comet": "CometLogger"}[kind]
    assert re.search(rf"{name} did not get everything that was logged: .*fulmen log replay {log.parent}", ended.stderr)


@pytest.mark.slow
def test_a_runs_log_is_replayed_to_wandb_offline_and_read_back(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run(fulmen.loggers.CSVLogger(tmp_path, version="run"), tmp_path, Module())
    folder = tmp_path / "lightning_logs" / "run"

    options = ["project=again", "id=replayed", "offline=True", f"save_dir={tmp_path}"]
    assert log_command(["replay", str(folder), "--logger", "wandb", "--option", *options]) == 0
    import wandb

    wandb.finish()
    [written] = tmp_path.rglob("run-replayed.wandb")
    history = history_of(written)

    rows = [located.record for located in read_run(str(folder)).rows]
    found = [(row["trainer/global_step"], row["train/loss"]) for row in history if "train/loss" in row]
    expected = [(row["x"], row["values"]["train/loss"]) for row in rows if "train/loss" in row["values"]]  # type: ignore[index, operator]  # known to be there
    assert found == expected


def history_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a run that Weights & Biases has written to a file, once it has ended it."""
    deadline = time.monotonic() + 120
    while True:
        records = records_of(path)
        if any(record.HasField("exit") for record in records):
            return rows_of(records)
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)  # wandb.finish() returns before its service has written the last of it


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def records_of(path: Path) -> list[Any]:
    """What is in a file of Weights & Biases'.

    The format: 7 bytes of header, then blocks of 32 KiB filled with chunks of ``checksum, length, kind, bytes``; a
    record is one chunk (kind 1) or several (2, 3, ..., 4).
    """
    from wandb.proto import wandb_internal_pb2

    found: list[Any] = []
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no chunk
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or at + 7 + length > len(data):  # nothing more, or not yet
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(parts)
        parts = b""
        found.append(record)
    return found


@needs_mlflow
@pytest.mark.slow
@pytest.mark.proves("6.7")
def test_every_checkpoint_is_uploaded_although_retention_deletes_it_meanwhile(
    tmp_path: Path, new_database: Callable[[Path], str]
) -> None:
    logger = fulmen.loggers.MLFlowLogger("kept", tracking_uri=new_database(tmp_path / "m.db"), log_model="all",
                                         artifact_location=(tmp_path / "artifacts").as_uri())  # fmt: skip
    trainer = fulmen.Trainer(
        max_epochs=3,
        logger=logger,
        callbacks=[ModelCheckpoint(dirpath=tmp_path / "kept", filename="{epoch}")],  # keeps the last one only
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.log_delivery = PATIENT
    trainer.fit(BoringModel())

    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch=2.ckpt"]
    uploaded = sorted(path.name for path in (tmp_path / "artifacts").rglob("*.ckpt"))
    assert uploaded == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
