"""A folder of a format that is not ours is read by the registered checkpoint IO that recognises it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fulmen_checkpoint import TorchCheckpointIO, _registered
from fulmen_checkpoint.commands import main
from fulmen_protocols import CheckpointCorrupt, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


class Toy:
    """Reads folders with a file ``toy``."""

    @staticmethod
    def recognises(names: Collection[str]) -> bool:
        return "toy" in names

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.verify_checkpoint(path)
        return {"state_dict": {}, "epoch": 3}

    def verify_checkpoint(self, path: Any) -> None:
        with open(f"{path}/toy", encoding="utf-8") as file:
            if file.read() != "whole":
                raise CheckpointCorrupt(f"{path} is damaged")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_registered, "available", lambda seam: ["toy"])
    monkeypatch.setattr(_registered, "load_factory", lambda seam, name: Toy)
    monkeypatch.setattr(_registered, "load", lambda seam, name: Toy())
    (tmp_path / "run.ckpt").mkdir()
    (tmp_path / "run.ckpt" / "toy").write_text("whole")
    return tmp_path / "run.ckpt"


@pytest.mark.proves("4.30")
def test_it_is_loaded_verified_and_consolidated_by_the_one_that_knows_it(folder: Path) -> None:
    assert TorchCheckpointIO().load_checkpoint(folder)["epoch"] == 3
    TorchCheckpointIO().verify_checkpoint(folder)
    assert main(["verify", str(folder)]) == 0
    assert main(["consolidate", str(folder), "-o", str(folder.parent / "one.ckpt")]) == 0
    assert TorchCheckpointIO().load_checkpoint(folder.parent / "one.ckpt")["epoch"] == 3

    (folder / "toy").write_text("half")
    with pytest.raises(CheckpointCorrupt, match="is damaged"):
        TorchCheckpointIO().verify_checkpoint(folder)
    assert main(["verify", str(folder)]) == 1


def test_a_folder_that_nobody_recognises_is_an_error_as_before(folder: Path) -> None:
    (folder / "toy").rename(folder / "other")

    with pytest.raises(CheckpointError):
        TorchCheckpointIO().load_checkpoint(folder)
