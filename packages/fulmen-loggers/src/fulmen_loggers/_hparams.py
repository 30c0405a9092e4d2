"""``hparams.yaml``: the hyperparameters of a run, readable by every YAML reader without running code."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import yaml

from fulmen_loggers._values import as_mapping, simplify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen_loggers._folder import RunFolder

__all__ = ["FILE", "Hyperparameters"]

FILE = "hparams.yaml"


class Hyperparameters:
    """What ``log_hyperparams`` was given, and whether it is on disk."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self._saved = True

    def add(self, params: object, more: Mapping[str, object]) -> None:
        """Add or replace values: those of ``params`` (a dict, a dataclass, a namespace or None), then ``more``."""
        if params is None and not more:
            return
        self.values.update({} if params is None else as_mapping(params))
        self.values.update(more)
        self._saved = False

    def simple(self) -> dict[str, object]:
        """The values as plain data."""
        return cast("dict[str, object]", simplify(self.values))

    def save(self, folder: RunFolder, path: str) -> None:
        """Write the file at ``path``, keeping what an earlier process of the same run put there."""
        if self._saved:
            return
        values = {**_known(folder.read(path)), **self.simple()}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
        folder.write(path, text.encode())
        self._saved = True


def _known(data: bytes | None) -> dict[str, object]:
    if data is None:
        return {}
    try:
        known: object = yaml.safe_load(data)
    except yaml.YAMLError:  # Lightning's files may hold tags of Python objects
        return {}
    return cast("dict[str, object]", known) if isinstance(known, dict) else {}
