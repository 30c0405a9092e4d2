"""The drills themselves: that they see what they look for, and that none of a few attempts goes wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tools.drills import checkpoint_faults, checkpoint_mutations
from tools.drills.__main__ import main
from tools.drills.checkpoints import checkpoint, same
from tools.drills.table import Row, table

from fulmen_checkpoint import TorchCheckpointIO


@pytest.mark.parametrize("name", ["mutated", "flips", "faults"])
def test_a_short_drill_goes_through(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| drill | setting | tried | went wrong | what happened |"
    assert sum(int(line.split("|")[3]) for line in lines[2:]) >= 12


@pytest.mark.slow
def test_kills_go_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kills", "12"]) == 0
    assert "| kills | folder of shards of 2 ranks, local | 2 | 0 |" in capsys.readouterr().out


def test_an_unknown_drill_is_named() -> None:
    with pytest.raises(SystemExit, match="no drill is named fire; there are: mutated, flips, kills, faults"):
        main(["fire", "3"])


def test_what_went_wrong_makes_the_drill_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    # A reader that takes anything: the drill must tell that damage was not found.
    monkeypatch.setattr(TorchCheckpointIO, "verify_checkpoint", lambda self, path: None)
    assert all(row.wrong == row.tried == 5 for row in checkpoint_mutations.flips(5))
    assert main(["flips", "2"]) == 1


def test_a_storage_that_loses_the_checkpoint_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save = TorchCheckpointIO.save_checkpoint

    def careless(self: TorchCheckpointIO, content: dict[str, object], path: str, options: None = None) -> None:
        Path(path).write_bytes(b"half")
        save(self, content, path, options)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", careless)
    monkeypatch.setitem(checkpoint_faults.FORMATS, "torch file", TorchCheckpointIO)
    row = checkpoint_faults._break("s", "torch file", str(tmp_path / "c"), {}, 5, random.Random(0))
    assert row.wrong > 0


def test_checkpoints_of_drills_know_their_number() -> None:
    assert same(checkpoint(3)["state_dict"], checkpoint(3)["state_dict"])
    assert not same(checkpoint(3), checkpoint(4))


def test_the_table_names_only_what_happened() -> None:
    assert table([Row("d", "s", 3, 0, {"a": 2, "b": 0})]).splitlines()[-1] == "| d | s | 3 | 0 | 2 a |"
