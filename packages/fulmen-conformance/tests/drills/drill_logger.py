"""A minimal correct logger, and broken ones that LoggerConformance must catch."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from fulmen_conformance import LoggerConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fulmen_protocols import Logger, LoggerStatus
    from torch import nn


class Good:
    """One JSON line a call."""

    name = "drill"
    version = 3

    def __init__(self, save_dir: Path) -> None:
        self.save_dir = str(save_dir)
        self.log_dir = str(save_dir / "run")
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.params: dict[str, object] = {}
        self.next_step = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((self.next_step if step is None else step, dict(metrics)))
        self.next_step += 1

    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        self.params |= params

    def log_graph(self, model: nn.Module, input_array: object | None = None) -> None:
        pass

    def save(self) -> None:
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a") as file:
            for row in self.rows:
                file.write(json.dumps(row) + "\n")
        self.rows.clear()
        (folder / "params.json").write_text(json.dumps(self.params, default=str))

    def finalize(self, status: LoggerStatus) -> None:
        self.save()


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        step, row = json.loads(line)
        for name, value in row.items():
            metrics[name].append((step, value))
    return metrics


class TestGood(LoggerConformance):
    caught_by: ClassVar[set[str]] = set()
    backend: ClassVar[type[Good]] = Good

    @pytest.fixture
    def logger(self, tmp_path: Path) -> Logger:
        return self.backend(tmp_path)

    @pytest.fixture
    def read_metrics(self, tmp_path: Path) -> Callable[[], Mapping[str, list[tuple[int, float]]]]:
        return lambda: read(tmp_path)

    @pytest.fixture
    def read_hyperparams(self, tmp_path: Path) -> Callable[[], Mapping[str, object]]:
        return lambda: json.loads((tmp_path / "run" / "params.json").read_text())
