"""The conformance kit on every logger of this package."""

from __future__ import annotations

import csv
import io
import uuid
from typing import TYPE_CHECKING

import fsspec
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fulmen_conformance import LoggerConformance
from fulmen_loggers import CSVLogger, TensorBoardLogger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fulmen_protocols import Logger

    Metrics = dict[str, list[tuple[int, float]]]


def _table(text: str) -> Metrics:
    found: Metrics = {}
    for row in csv.DictReader(io.StringIO(text, newline="")):
        for name, cell in row.items():
            if name != "step" and cell:
                found.setdefault(name, []).append((int(row["step"]), float(cell)))
    return found


class TestCSVLogger(LoggerConformance):
    @pytest.fixture
    def logger(self, tmp_path: Path) -> Logger:
        return CSVLogger(tmp_path, version="run")

    @pytest.fixture
    def read_metrics(self, tmp_path: Path) -> Callable[[], Metrics]:
        return lambda: _table((tmp_path / "lightning_logs" / "run" / "metrics.csv").read_text())

    @pytest.fixture
    def read_hyperparams(self, tmp_path: Path) -> Callable[[], dict[str, object]]:
        return lambda: yaml.safe_load((tmp_path / "lightning_logs" / "run" / "hparams.yaml").read_text())


class TestCSVLoggerOnAUrl(LoggerConformance):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4().hex}"

    @pytest.fixture
    def logger(self, url: str) -> Logger:
        return CSVLogger(url, version="run")

    @pytest.fixture
    def read_metrics(self, url: str) -> Callable[[], Metrics]:
        def read() -> Metrics:
            fs, path = fsspec.core.url_to_fs(f"{url}/lightning_logs/run/metrics.csv")
            return _table(fs.cat_file(path).decode())

        return read


class TestTensorBoardLogger(LoggerConformance):
    @pytest.fixture
    def logger(self, tmp_path: Path) -> Logger:
        return TensorBoardLogger(tmp_path, version="run", log_graph=True)

    @pytest.fixture
    def read_metrics(self, tmp_path: Path) -> Callable[[], Metrics]:
        def read() -> Metrics:
            events = EventAccumulator(str(tmp_path / "lightning_logs" / "run"), size_guidance={"scalars": 0})
            events.Reload()
            return {
                tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
            }

        return read

    @pytest.fixture
    def read_hyperparams(self, tmp_path: Path) -> Callable[[], dict[str, object]]:
        return lambda: yaml.safe_load((tmp_path / "lightning_logs" / "run" / "hparams.yaml").read_text())
