"""What ACME runs in its own CI: the kits, on the installed distribution."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from acme_fulmen.logger import AcmeLogger
from acme_fulmen.strategy import AcmeStrategy

from fulmen_conformance import LoggerConformance, StrategyConformance

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fulmen_protocols import Logger, Strategy


class TestAcmeStrategy(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:  # a type checker proves the shape here
        return AcmeStrategy(board=0)


class TestAcmeLogger(LoggerConformance):
    @pytest.fixture
    def logger(self, tmp_path: Path) -> Logger:
        return AcmeLogger(str(tmp_path))

    @pytest.fixture
    def read_metrics(self, tmp_path: Path) -> Callable[[], dict[str, list[tuple[int, float]]]]:
        def read() -> dict[str, list[tuple[int, float]]]:
            found: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for line in (tmp_path / "acme" / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                for name, value in row["metrics"].items():
                    found[name].append((row["step"], value))
            return found

        return read

    @pytest.fixture
    def read_hyperparams(self, tmp_path: Path) -> Callable[[], dict[str, object]]:
        return lambda: json.loads((tmp_path / "acme" / "hparams.json").read_text())
