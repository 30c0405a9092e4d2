"""CSVLogger."""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import enum
import importlib.util
import io
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml

from fulmen_loggers import CSVLogger
from fulmen_protocols import (
    LOGGERS,
    BackendNotFound,
    Logger,
    MisconfigurationException,
    MissingPackage,
    SupportsLogDir,
    load,
    missing_members,
)


def _rows(logger: CSVLogger) -> list[dict[str, str]]:
    return _read(Path(logger.log_dir, "metrics.csv").read_text())


def _read(text: str) -> list[dict[str, str]]:
    lines = list(csv.reader(io.StringIO(text, newline="")))
    assert len({len(line) for line in lines}) == 1, "every line has as many fields as the header"
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_it_is_a_logger_found_by_name(tmp_path: Path) -> None:
    logger = load(LOGGERS, "csv", save_dir=tmp_path)
    assert isinstance(logger, CSVLogger)
    assert missing_members(Logger, logger) == []
    assert missing_members(SupportsLogDir, logger) == []


def test_nothing_is_touched_before_the_first_use(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "new")
    assert (logger.name, logger.save_dir) == ("lightning_logs", str(tmp_path / "new"))
    assert logger.root_dir == str(tmp_path / "new" / "lightning_logs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.proves("6.3")
def test_the_layout_is_save_dir_name_version(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert sorted(os.listdir(logger.log_dir)) == ["hparams.yaml", "metrics.csv"]
    assert CSVLogger(tmp_path, name="", version="mine").log_dir == str(tmp_path / "mine")
    assert CSVLogger(tmp_path, name=None, version=7).log_dir == str(tmp_path / "version_7")


@pytest.mark.proves("6.3")
def test_versions_count_on_from_the_greatest_that_exists(tmp_path: Path) -> None:
    for name in ("version_3", "version_11", "version_x", "other"):
        (tmp_path / "lightning_logs" / name).mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_99.txt").touch()
    assert CSVLogger(tmp_path).version == 12
    assert CSVLogger(tmp_path).version == 13
    logger = CSVLogger(tmp_path)
    assert [logger.version, logger.version] == [14, 14]


def _claim(folder: str, count: int) -> list[int | str]:
    return [CSVLogger(folder).version for _ in range(count)]


def test_runs_that_start_together_never_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        taken = pool.starmap(_claim, [(str(tmp_path), 25)] * 4)
    assert sorted(version for versions in taken for version in versions) == list(range(100))


def test_the_version_of_another_process_can_be_taken_over(tmp_path: Path) -> None:
    first, second = CSVLogger(tmp_path), CSVLogger(tmp_path)
    second.version = first.version
    assert second.log_dir == first.log_dir
    assert os.listdir(tmp_path / "lightning_logs") == ["version_0"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_the_first_process_of_a_run_takes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    logger = CSVLogger(tmp_path / "new")
    assert logger.version == 0
    assert list(tmp_path.iterdir()) == []
    logger.version = 4
    assert logger.log_dir.endswith("version_4")
    # Many runs under one launcher (a search with srun): who writes is a run of its own.
    one, other = CSVLogger(tmp_path / "search"), CSVLogger(tmp_path / "search")
    assert one.version == other.version == 0
    one.save()
    other.save()
    assert (one.version, other.version) == (0, 1)
    monkeypatch.setenv(name, "0")
    assert CSVLogger(tmp_path / "new").version == 0
    assert os.listdir(tmp_path / "new" / "lightning_logs") == ["version_0"]


@pytest.mark.proves("6.3")
def test_rows_and_columns_grow(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=2)
    logger.log_metrics({"a": 1.5}, step=3)
    logger.log_metrics({"b": 2, "a": 0.1}, step=4)
    logger.log_metrics({'a,b\n"c"': 3.0}, step=5)
    logger.save()
    logger.log_metrics({"d": 4.0})
    logger.save()
    empty = dict.fromkeys(["a", "b", 'a,b\n"c"', "d"], "")
    assert _rows(logger) == [
        {"step": "3", **empty, "a": "1.5"},
        {"step": "4", **empty, "b": "2", "a": "0.1"},
        {"step": "5", **empty, 'a,b\n"c"': "3.0"},
        {"step": "6", **empty, "d": "4.0"},
    ]


@pytest.mark.proves("6.3")
def test_rows_wait_in_memory_until_there_are_enough(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=3)
    for step in range(5):
        logger.log_metrics({"a": 1.0}, step=step)
    assert len(_rows(logger)) == 3
    logger.finalize("failed")
    assert len(_rows(logger)) == 5


def test_floats_read_back_exactly_and_nan_and_inf_are_kept(tmp_path: Path) -> None:
    logger, values = CSVLogger(tmp_path), [math.pi, 1e-300, -0.0, 1e22, math.nan, math.inf, -math.inf, 0.1 + 0.2]
    for value in values:
        logger.log_metrics({"x": value})
    logger.save()
    read = [float(row["x"]) for row in _rows(logger)]
    assert np.array_equal(read, values, equal_nan=True)
    assert [row["x"] for row in _rows(logger)][4:7] == ["nan", "inf", "-inf"]


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics(
        {"np": np.float64(1.5), "f32": np.float32(0.5), "t": torch.tensor([[2.5]]), "i": np.int64(3), "b": True}, step=0
    )
    logger.save()
    assert _rows(logger) == [{"step": "0", "np": "1.5", "f32": "0.5", "t": "2.5", "i": "3", "b": "1.0"}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"metric 'x' has shape \(3,\), but only single numbers"),
        (np.ones((2, 2)), r"metric 'x' has shape \(2, 2\)"),
        ("high", r"metric 'x' is 'high' of type str, but only numbers"),
        (None, "metric 'x' is None of type NoneType"),
        ({"a": 1.0}, "of type dict"),
    ],
)
def test_what_is_no_number_gives_one_clear_error(tmp_path: Path, value: object, message: str) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.raises(MisconfigurationException, match=message):
        logger.log_metrics({"ok": 1.0, "x": value}, step=0)  # type: ignore[dict-item]
    logger.log_metrics({"ok": 1.0}, step=0)
    logger.save()
    assert len(_rows(logger)) == 1


def test_a_resumed_run_keeps_its_rows(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"a": 1.0}, step=0)
    first.log_hyperparams({"lr": 0.1, "deep": {"x": 1}})
    first.finalize("failed")
    second = CSVLogger(tmp_path, version=first.version)
    second.log_metrics({"b": 2.0}, step=1)
    second.log_metrics({"a": 3.0}, step=2)
    second.log_hyperparams({"more": True})
    second.finalize("success")
    assert [(row["step"], row["a"], row["b"]) for row in _rows(second)] == [
        ("0", "1.0", ""),
        ("1", "", "2.0"),
        ("2", "3.0", ""),
    ]
    known = yaml.safe_load(Path(second.log_dir, "hparams.yaml").read_text())
    assert known == {"lr": 0.1, "deep": {"x": 1}, "more": True}


@pytest.mark.parametrize("cut", range(1, 12))
def test_half_a_row_of_a_killed_run_is_dropped(tmp_path: Path, cut: int) -> None:
    first = CSVLogger(tmp_path, version="run")
    for step in range(3):
        first.log_metrics({"a": 0.25}, step=step)
    first.save()
    path = Path(first.log_dir, "metrics.csv")
    path.write_bytes(path.read_bytes()[:-cut])
    second = CSVLogger(tmp_path, version="run")
    second.log_metrics({"a": 9.0, "b": 1.0}, step=9)
    second.save()
    steps = [row["step"] for row in _rows(second)]
    assert steps == ["0", "1", "9"] if cut < 8 else steps in (["0", "1", "9"], ["0", "9"])
    assert all(row["a"] == "0.25" for row in _rows(second)[:-1])


def test_a_table_of_lightning_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_bytes(b"epoch,loss,step\r\n0,1.5,9\r\n0,,19\r\n")
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"loss": 0.5, "new": 1.0}, step=29)
    logger.save()
    rows = _rows(logger)
    assert [row["loss"] for row in rows] == ["1.5", "", "0.5"]
    assert [row["step"].strip() for row in rows] == ["9", "19", "29"]
    assert [row["new"] for row in rows] == ["", "", "1.0"]


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_bytes(b"\xff\xfe\x00rubbish\n")
    logger = CSVLogger(tmp_path, name="", version="run")
    logger.log_metrics({"a": 1.0})
    with pytest.raises(MisconfigurationException, match=r"metrics.csv' exists and is no table"):
        logger.save()


@pytest.mark.proves("6.3")
def test_logging_goes_on_after_finalize_and_a_prefix_is_put_before_names(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, prefix="fold1")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("success")
    logger.log_metrics({"a": 2.0, "step": 77.0}, step=1)
    logger.finalize("success")
    assert _rows(logger)[1]["fold1-a"] == "2.0"
    assert _rows(logger)[1]["step"] == "1"


def test_a_subclass_says_what_stands_between_the_prefix_and_a_name(tmp_path: Path) -> None:
    class Slashed(CSVLogger):
        LOGGER_JOIN_CHAR = "/"

    logger = Slashed(tmp_path, prefix="fold1")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()

    assert _rows(logger)[0]["fold1/a"] == "1.0"
    assert logger.reopen_options()["prefix"] == "fold1"


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_a_copy_goes_on_in_the_same_file(tmp_path: Path, clone) -> None:  # type: ignore[no-untyped-def]
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    again = clone(logger)
    again.log_metrics({"b": 2.0}, step=1)
    again.save()
    assert again.log_dir == logger.log_dir
    assert [row["step"] for row in _rows(again)] == ["0", "1"]
    clone(CSVLogger(tmp_path))  # unused: nothing to write
    assert os.listdir(tmp_path / "lightning_logs") == ["version_0"]


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    path: Path = Path("a/b")


@pytest.mark.proves("6.3")
def test_hyperparameters_of_any_kind_become_safe_yaml(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams(
        {"t": (1, 2), "s": {3}, "np": np.float32(0.5), "arr": np.ones(2), "e": Colour.RED, "cfg": Config(),
         "none": None, "cls": torch.nn.ReLU, "dtype": torch.float16, "ten": torch.tensor(3), "u": "ü",
         "nested": {1: {"x": True}}}
    )  # fmt: skip
    logger.log_hyperparams(argparse.Namespace(ns=1))
    logger.log_hyperparams(Config(lr=2.0))
    logger.save()
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text()) == {
        "t": [1, 2],
        "s": [3],
        "np": 0.5,
        "arr": "[1. 1.]",
        "e": "RED",
        "cfg": {"lr": 0.1, "path": "a/b"},
        "none": None,
        "cls": "torch.nn.modules.activation.ReLU",
        "dtype": "torch.float16",
        "ten": 3,
        "u": "ü",
        "nested": {1: {"x": True}},
        "ns": 1,
        "lr": 2.0,
        "path": "a/b",
    }
    with pytest.raises(MisconfigurationException, match="given 3 of type int"):
        logger.log_hyperparams(3)


def test_a_folder_that_cannot_be_written_gives_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    logger = CSVLogger(tmp_path / "file")
    logger.log_metrics({"a": 1.0})
    with pytest.raises(
        MisconfigurationException, match=r"CSVLogger\(save_dir='.*file'\) cannot write .*Choose save_dir"
    ):
        logger.save()
    with pytest.raises(MisconfigurationException, match="flush_logs_every_n_steps=0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)


def test_a_url_that_cannot_be_reached_names_what_is_missing() -> None:
    with pytest.raises(BackendNotFound, match="knows no file system 'nosuch'"):
        CSVLogger("nosuch://x").save()
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(MissingPackage, match="Run: pip install gcsfs"):
            CSVLogger("gs://x").save()


def test_urls_hold_the_same_table() -> None:
    url = f"memory://{uuid.uuid4().hex}/logs"
    for version in range(2):
        logger = CSVLogger(url, flush_logs_every_n_steps=2)
        assert logger.version == version
        assert logger.log_dir == f"{url}/lightning_logs/version_{version}"
        for step in range(50):
            logger.log_metrics({"a": 1.0, f"b{step // 20}": 2.0}, step=step)
        logger.log_hyperparams({"lr": 1})
        logger.finalize("success")
    again = CSVLogger(url, version=1)
    again.log_metrics({"c": 1.0}, step=50)
    again.save()
    rows = _read(fsspec.open(f"{again.log_dir}/metrics.csv", "r", newline="").open().read())
    assert [row["step"] for row in rows] == [str(step) for step in range(51)]
    assert list(rows[0]) == ["step", "a", "b0", "b1", "b2", "c"]
    assert yaml.safe_load(fsspec.open(f"{again.log_dir}/hparams.yaml").open().read()) == {"lr": 1}


def test_writing_takes_time_linear_in_the_rows(tmp_path: Path) -> None:
    # Counted in instructions of Python, not in seconds.
    def lines_run(rows: int) -> int:
        logger, count = CSVLogger(tmp_path), 0

        def tracer(frame, event, arg):  # type: ignore[no-untyped-def]
            nonlocal count
            count += event == "line"
            return tracer

        sys.settrace(tracer)
        try:
            for step in range(rows):
                logger.log_metrics({"loss": 0.5, f"k{10 * step // rows}": 1.0}, step=step)
            logger.finalize("success")
        finally:
            sys.settrace(None)
        assert len(_rows(logger)) == rows
        return count

    assert lines_run(8_000) < 4.4 * lines_run(2_000)


@pytest.mark.slow
def test_a_million_rows_with_growing_columns_are_written(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in range(1_000_000):
        logger.log_metrics({"loss": 0.5, f"k{step // 50_000}": 1.0}, step=step)
    logger.finalize("success")
    with open(Path(logger.log_dir, "metrics.csv")) as stream:
        assert stream.readline().rstrip().split(",") == ["step", "loss", *(f"k{index}" for index in range(20))]
        count = sum(line.count(",") == 21 for line in stream)
    assert count == 1_000_000


def test_importing_it_imports_neither_torch_nor_tensorboardx() -> None:
    script = "import sys, fulmen_loggers; print([m for m in ('torch', 'tensorboardX', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "[]"


AT_THE_END = """
import os, sys
from fulmen_loggers import CSVLogger

def loop():
    logger = CSVLogger(sys.argv[1], version=0)
    for step in range(3):
        logger.log_metrics({"loss": step / 2}, step=step)

loop()
if os.fork() == 0:
    sys.exit()  # it has a copy of the rows
os.wait()
if "fail" in sys.argv:
    open(sys.argv[1] + "/lightning_logs", "w").close()  # where the folder would be
"""


def test_rows_that_nobody_asked_to_write_are_there_once_the_process_has_ended(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", AT_THE_END, str(tmp_path)], check=True, timeout=60)

    written = Path(tmp_path, "lightning_logs", "version_0", "metrics.csv").read_text()
    assert written.splitlines() == ["step,loss", "0,0.0", "1,0.5", "2,1.0"]


def test_rows_that_cannot_be_written_at_the_end_are_a_line_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, str(tmp_path), "fail"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert "the last rows of a CSVLogger could not be written" in done.stderr
    assert "Traceback" not in done.stderr
