"""``fulmen consolidate`` is ``fulmen checkpoint consolidate`` under the name that Fabric's users know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fulmen_checkpoint import ShardedCheckpointIO
from fulmen_checkpoint.commands import consolidate

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.proves("8.21")
def test_a_folder_of_shards_becomes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.arange(6.0)
    ShardedCheckpointIO().save_checkpoint({"model": {"weight": weight}, "step": 3}, tmp_path / "shards")

    assert consolidate([str(tmp_path / "shards"), "--output_file", str(tmp_path / "one.ckpt")]) == 0

    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(content["model"]["weight"], weight)
    assert content["step"] == 3
    assert "wrote" in capsys.readouterr().out


@pytest.mark.proves("8.21")
def test_what_is_no_folder_of_shards_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert consolidate([str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
    assert consolidate([]) == 2
