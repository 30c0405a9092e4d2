"""WandbLogger on the real library, offline; what it wrote is read back from wandb's own record files."""

from __future__ import annotations

import json
import pickle
import struct
import time
import wave
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fulmen_conformance import LoggerConformance
from fulmen_loggers import WandbLogger
from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

wandb = pytest.importorskip("wandb")

pytestmark = [pytest.mark.proves("6.4"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def records(folder: Path) -> list[Any]:
    """Every record of every finished run below ``folder``, oldest run first; waits until their files are whole."""
    deadline = time.monotonic() + 30
    while True:
        runs = [list(read(path)) for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.parent.name)]
        if all(any(record.WhichOneof("record_type") == "exit" for record in run) for run in runs):
            return [record for run in runs for record in run]
        assert time.monotonic() < deadline, "wandb did not write the end of a run"
        time.sleep(0.1)


def read(path: Path) -> Iterator[Any]:
    """The records of one file.

    The format: 7 bytes of header, then blocks of 32 KiB filled with chunks of ``checksum, length, kind, bytes``; a
    record is one chunk (kind 1) or several (2, 3, ..., 4).
    """
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no chunk
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def rows(folder: Path) -> list[dict[str, Any]]:
    wandb.finish()  # a run's file is whole once the run is
    found = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *above, last = item.nested_key or [item.key]
                values = row
                for name in above:
                    values = values.setdefault(name, {})
                values[last] = json.loads(item.value_json)
            found.append(row)
    return found


def config(folder: Path) -> dict[str, Any]:
    wandb.finish()
    values: dict[str, Any] = {}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        updates = record.config.update if kind == "config" else record.run.config.update if kind == "run" else []
        values.update({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates})
    return values


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    yield
    wandb.finish()


class TestWandbConformance(LoggerConformance):
    @pytest.fixture
    def logger(self, tmp_path: Path) -> Any:
        return WandbLogger(save_dir=tmp_path, offline=True)

    @pytest.fixture
    def read_metrics(self, tmp_path: Path) -> Callable[[], Mapping[str, list[tuple[int, float]]]]:
        def read() -> dict[str, list[tuple[int, float]]]:
            metrics: dict[str, list[tuple[int, float]]] = {}
            for row in rows(tmp_path):
                step = row.get("trainer/global_step", row["_step"])
                for name, value in row.items():
                    if not name.startswith("_"):
                        metrics.setdefault(name, []).append((step, float(value)))
            return metrics

        return read

    @pytest.fixture
    def read_hyperparams(self, tmp_path: Path) -> Callable[[], Mapping[str, object]]:
        return lambda: config(tmp_path)


def test_the_training_step_is_the_x_axis_of_every_metric(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="p", id="abc12345", prefix="run")

    logger.log_metrics({"loss": torch.tensor(0.5)}, step=7)

    [row] = rows(tmp_path)
    assert (row["run-loss"], row["trainer/global_step"]) == (0.5, 7)
    metrics = [record.metric for record in records(tmp_path) if record.WhichOneof("record_type") == "metric"]
    [every] = [metric for metric in metrics if metric.glob_name == "*"]
    assert every.step_metric == "trainer/global_step"
    assert (logger.name, logger.version, logger.save_dir) == ("p", "abc12345", str(tmp_path))
    assert logger.log_dir is None


def test_the_project_comes_from_the_environment_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WandbLogger().name == "lightning_logs"
    monkeypatch.setenv("WANDB_PROJECT", "of-the-shell")
    assert WandbLogger().name == "of-the-shell"
    assert WandbLogger(project="mine").name == "mine"


def test_a_run_that_failed_is_marked_as_failed_and_can_be_gone_on_with(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.log_metrics({"loss": 1.0}, step=0)

    logger.finalize("failed")
    logger.log_metrics({"loss": 2.0}, step=1)

    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 2.0]
    exits = [r.exit.exit_code for r in records(tmp_path) if r.WhichOneof("record_type") == "exit"]
    assert exits[0] == 1
    ids = {r.run.run_id for r in records(tmp_path) if r.WhichOneof("record_type") == "run"}
    assert ids == {logger.version}, "both files belong to one run"


def test_a_run_that_succeeded_stays_open_for_the_script(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    logger.log_metrics({"loss": 1.0}, step=0)

    logger.finalize("success")

    assert wandb.run is logger.experiment
    wandb.run.log({"after": 3.0})
    assert rows(tmp_path)[-1]["after"] == 3.0


def test_an_open_run_is_used_and_not_replaced(tmp_path: Path) -> None:
    mine = wandb.init(mode="offline", dir=str(tmp_path), project="mine")

    given, found = WandbLogger(experiment=mine), WandbLogger(save_dir=tmp_path, offline=True)

    assert given.experiment is mine
    assert found.experiment is mine
    assert given.version == mine.id


def test_media_and_tables_are_recorded(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    pictures = [torch.full((8, 8, 3), shade, dtype=torch.uint8).numpy() for shade in (50, 200)]

    logger.log_image("seen", pictures, step=1, caption=["first", "second"])
    logger.log_text("said", columns=["who", "what"], data=[["a", "hello"]], step=2)

    seen, said = rows(tmp_path)
    assert seen["seen"]["captions"] == ["first", "second"]
    assert seen["seen"]["count"] == 2
    assert seen["trainer/global_step"] == 1
    assert said["said"]["nrows"] == 1
    assert said["said"]["_type"] == "table-file"
    assert len(list(tmp_path.rglob("media/images/*.png"))) == 2


def test_sounds_and_videos_are_recorded(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")  # without which wandb takes no sounds
    logger = WandbLogger(save_dir=tmp_path / "logs", offline=True)
    sound, video = tmp_path / "beep.wav", tmp_path / "clip.mp4"
    with wave.open(str(sound), "wb") as stream:
        stream.setparams((1, 2, 8000, 0, "NONE", ""))
        stream.writeframes(b"\0\1" * 800)
    video.write_bytes(b"the frames of a film")  # wandb copies files as they are

    logger.log_audio("heard", [str(sound)], step=1, caption=["beep"])
    logger.log_video("watched", [str(video), str(video)], step=2, format=["mp4", "mp4"])

    heard, watched = rows(tmp_path)
    assert (heard["trainer/global_step"], heard["heard"]["captions"]) == (1, ["beep"])
    assert watched["trainer/global_step"] == 2
    [copy] = tmp_path.rglob("media/audio/*.wav")
    assert copy.read_bytes() == sound.read_bytes()
    assert {path.read_bytes() for path in tmp_path.rglob("media/videos/*.mp4")} == {video.read_bytes()}


def test_a_table_is_recorded_from_rows_or_a_data_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    logger = WandbLogger(save_dir=tmp_path, offline=True)

    logger.log_table("rows", columns=["n", "square"], data=[[1, 1], [2, 4]], step=1)
    logger.log_table("frame", dataframe=pandas.DataFrame({"n": [1, 2], "square": [1, 4]}), step=2)

    rows(tmp_path)
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("media/table/*.table.json")]
    assert tables == [{"columns": ["n", "square"], "data": [[1, 1], [2, 4]]}] * 2


def test_an_artifact_is_asked_for_by_the_open_run_or_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Artifacts lie on wandb's server, which no test has: what the library is asked for is what can be seen.
    asked: list[tuple[object, ...]] = []

    class Found:
        def download(self, root: str | None = None) -> str:
            asked.append(("download", root))
            return root or "wandb's cache"

    def use(run: object, name: str, type: str | None = None) -> Found:
        asked.append(("use", name, type))
        return Found()

    def look(name: str, type: str | None = None) -> Found:
        asked.append(("look", name, type))
        return Found()

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(artifact=look))
    assert WandbLogger.download_artifact("me/p/model-1:best", tmp_path, "model") == str(tmp_path)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    monkeypatch.setattr(type(logger.experiment), "use_artifact", use)
    assert WandbLogger.download_artifact("me/p/model-1:best") == "wandb's cache"
    assert WandbLogger.download_artifact("me/p/model-1:best", use_artifact=False) == "wandb's cache"
    assert isinstance(logger.use_artifact("me/p/data:v0", "dataset"), Found)

    assert asked == [
        ("look", "me/p/model-1:best", "model"),
        ("download", str(tmp_path)),
        ("use", "me/p/model-1:best", None),
        ("download", None),
        ("look", "me/p/model-1:best", None),
        ("download", None),
        ("use", "me/p/data:v0", "dataset"),
    ]


def test_two_rows_of_one_step_share_their_x_and_later_ones_do_not_move(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    for step in range(3):
        logger.log_metrics({"loss": float(step)}, step=10 * step)
        logger.log_metrics({"accuracy": 0.5}, step=10 * step)
    logger.log_metrics({"val_loss": 0.25}, step=20)

    found = [
        (sorted(set(row) & {"loss", "accuracy", "val_loss"}), row["trainer/global_step"]) for row in rows(tmp_path)
    ]
    assert found == [
        (["loss"], 0), (["accuracy"], 0), (["loss"], 10), (["accuracy"], 10), (["loss"], 20), (["accuracy"], 20),
        (["val_loss"], 20),
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        MisconfigurationException, match=r"WandbLogger\(save_dir='.*file'\) cannot write .*Choose save_di"
    ):
        WandbLogger(save_dir=tmp_path / "file", offline=True).log_metrics({"a": 1.0}, step=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.ones(3), r"metric 'x' has shape \(3,\)"), ("high", "metric 'x' is 'high' of type str")],
)
def test_what_is_no_number_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        WandbLogger(save_dir=tmp_path, offline=True).log_metrics({"x": value}, step=0)


def test_media_need_one_value_an_item(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)

    with pytest.raises(TypeError, match=r"log_image\(seen=...\) needs a list"):
        logger.log_image("seen", torch.rand(2, 2).numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"log_image\(caption=...\) has 1 values for 2 items"):
        logger.log_image("seen", [1, 2], caption=["one"])


def test_watching_a_model_records_its_gradients(tmp_path: Path) -> None:
    logger, model = WandbLogger(save_dir=tmp_path, offline=True), torch.nn.Linear(2, 1)

    logger.watch(model, log="gradients", log_freq=1, log_graph=False)
    model(torch.ones(4, 2)).sum().backward()
    logger.log_metrics({"loss": 1.0}, step=0)

    [row] = rows(tmp_path)
    assert row["gradients/weight"]["_type"] == "histogram"


def test_a_copy_in_another_process_goes_on_with_the_same_run(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    _ = logger.experiment

    copy = pickle.loads(pickle.dumps(logger))

    assert copy.version == logger.version


@pytest.mark.proves("6.7")
def test_checkpoints_become_artifacts_as_log_model_says(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.ckpt" for name in ("first", "best")]
    for path in paths:
        path.write_bytes(b"weights of " + path.name.encode())
    callback = SimpleNamespace(
        save_top_k=1,
        monitor="val_loss",
        best_model_path=str(paths[1]),
        best_model_score=torch.tensor(0.25),
        last_model_path="",
        current_score=None,
        best_k_models={str(path): torch.tensor(score) for path, score in zip(paths, (0.5, 0.25), strict=True)},
    )
    logger = WandbLogger(save_dir=tmp_path / "logs", log_model=True, mode="offline")
    _ = logger.experiment

    logger.after_save_checkpoint(callback)
    logger.finalize("success")
    logger.finalize("success")  # each file once
    wandb.finish()

    sent = [r.artifact for r in records(tmp_path) if r.WhichOneof("record_type") == "artifact"]
    sent += [r.request.log_artifact.artifact for r in records(tmp_path) if r.request.HasField("log_artifact")]
    assert sorted(sorted(artifact.aliases) for artifact in sent) == [["best", "latest"], ["latest"]]
    assert {artifact.name for artifact in sent} == {f"model-{logger.version}"}
    [best] = [json.loads(artifact.metadata) for artifact in sent if "best" in artifact.aliases]
    assert best["score"] == 0.25
    assert best["original_filename"] == "best.ckpt"
    assert best["SimpleNamespace"] == {"monitor": "val_loss", "save_top_k": 1}


@pytest.mark.proves("6.7")
@pytest.mark.parametrize(
    ("log_model", "save_top_k", "sent_at_once"),
    [("all", 1, True), (True, -1, True), (True, 1, False), (False, -1, False)],
)
def test_checkpoints_are_uploaded_at_once_or_at_the_end_under_the_name_that_is_given(
    tmp_path: Path, log_model: Any, save_top_k: int, sent_at_once: bool
) -> None:
    path = tmp_path / "only.ckpt"
    path.write_bytes(b"weights")
    callback = SimpleNamespace(
        save_top_k=save_top_k, best_model_path=str(path), best_model_score=0.5, best_k_models={str(path): 0.5}
    )
    logger = WandbLogger(save_dir=tmp_path / "logs", log_model=log_model, mode="offline", checkpoint_name="mine")
    _ = logger.experiment

    logger.after_save_checkpoint(callback)
    logger.log_metrics({"then": 1.0}, step=0)
    logger.finalize("success")
    wandb.finish()

    order = [kind_of(record) for record in records(tmp_path / "logs") if kind_of(record) is not None]
    assert order == (["mine", "row"] if sent_at_once else ["row", "mine"] if log_model else ["row"])


def kind_of(record: Any) -> str | None:
    if record.WhichOneof("record_type") == "artifact":
        return str(record.artifact.name)
    if record.request.HasField("log_artifact"):
        return str(record.request.log_artifact.artifact.name)
    return "row" if record.WhichOneof("record_type") == "history" else None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offline": True, "log_model": True}, r"log_model=True, offline=True.*Drop one"),
        ({"log_model": "best"}, r"log_model='best'\) must be True, False or 'all'"),
        ({"add_file_policy": "copy"}, r"add_file_policy='copy'\) must be 'mutable' or 'immutable'"),
    ],
)
def test_wrong_arguments_are_named_with_the_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        WandbLogger(**arguments)
