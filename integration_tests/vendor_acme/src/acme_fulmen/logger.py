"""ACME's logger: one JSON line for each call. No import of fulmen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Mapping


@final
class AcmeLogger:
    """Writes ``acme/metrics.jsonl`` and ``acme/hparams.json`` below ``save_dir``."""

    name = "acme"
    version = 0

    def __init__(self, save_dir: str = ".") -> None:
        self.save_dir = save_dir
        self.log_dir = str(Path(save_dir) / "acme")
        self._lines: list[str] = []
        self._hparams: dict[str, object] = {}
        self._calls = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._lines.append(json.dumps({"step": self._calls if step is None else step, "metrics": dict(metrics)}) + "\n")
        self._calls += 1

    def log_hyperparams(self, params: Mapping[str, object]) -> None:
        self._hparams.update(params)

    def save(self) -> None:
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(self._lines)
        self._lines.clear()
        (folder / "hparams.json").write_text(json.dumps(self._hparams, default=str))

    def finalize(self, status: str) -> None:
        self.save()
