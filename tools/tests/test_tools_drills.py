"""The drills themselves: that they see what they look for, and that none of a few attempts goes wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tools.drills import checkpoint_faults, checkpoint_mutations
from tools.drills.__main__ import DRILLS, main
from tools.drills.checkpoints import FORMATS, checkpoint, same
from tools.drills.drill import Attempts, Drill
from tools.drills.table import Row, added, append, read, table

from fulmen_checkpoint import TorchCheckpointIO


@pytest.mark.parametrize("name", ["mutated", "flips", "faults"])
@pytest.mark.slow
def test_a_short_drill_goes_through(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| drill | setting | tried | went wrong | what happened |"
    assert sum(int(line.split("|")[3]) for line in lines[2:]) >= 12


@pytest.mark.slow
@pytest.mark.slow
def test_kills_go_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kills", "12"]) == 0
    printed = capsys.readouterr().out
    assert "| kills | folder of shards of 2 ranks, local | 1 | 0 |" in printed
    assert "| kills | asynchronous torch file, S3 | 1 | 0 |" in printed


def test_an_unknown_drill_is_named() -> None:
    with pytest.raises(
        SystemExit, match="no drill is named fire; there are: flips, faults, mutated, kills, failures, train"
    ):
        main(["fire", "3"])


def test_what_went_wrong_makes_the_drill_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    # A reader that takes anything: the drill must tell that damage was not found.
    monkeypatch.setattr(TorchCheckpointIO, "verify_checkpoint", lambda self, path: None)
    with checkpoint_mutations.FLIPS.open() as attempts:
        assert all(attempts(name, 0, 5).wrong == 5 for name in FORMATS)
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


def test_a_drill_in_pieces_makes_the_attempts_that_are_left_and_tells_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "build" / "drills.jsonl"
    append(results, Row("flips", "torch file", 3, 1, {"found": 2}))
    with results.open("a") as stream:
        stream.write('{"drill": "flips", "sett')  # the process was killed here
    again = ["flips", "5", "--resume", "--results", str(results)]
    assert main(again) == 1, "what went wrong in an earlier piece is forgotten"
    shown = capsys.readouterr().out
    assert "| flips | torch file | 5 | 1 | 4 found |" in shown
    assert "| flips | safetensors file | 5 | 0 | 5 found |" in shown
    written = results.read_text()
    assert sum(row.tried for row in read(results)) == 15
    assert main(again) == 1
    assert capsys.readouterr().out == shown
    assert results.read_text() == written, "attempts that were there were made again"


def test_pieces_of_a_drill_never_repeat_an_attempt() -> None:
    made: list[tuple[str, int]] = []

    @contextmanager
    def opened() -> Iterator[Attempts]:
        def attempts(setting: str, first: int, count: int) -> Row:
            made.extend((setting, index) for index in range(first, first + count))
            return Row("d", setting, count, 0)

        yield attempts

    drill = Drill(opened, lambda count: {"a": count, "b": 4}, piece=3, short=1, full=9)
    rows: list[Row] = []
    drill.run(8, {"a": 2}, 1, rows.append)
    assert sorted(made) == [("a", i) for i in range(2, 8)] + [("b", i) for i in range(4)]
    assert [row.setting for row in rows] == ["a", "b", "a", "b"], "one setting waits for the other's end"
    drill.run(8, {row.setting: row.tried for row in added([*rows, Row("d", "a", 2, 0)])}, 1, rows.append)
    assert len(rows) == 4


@pytest.mark.parametrize("name", list(DRILLS))
@pytest.mark.parametrize("count", [16, 200, 500])
def test_the_settings_of_a_drill_share_its_count(name: str, count: int) -> None:
    shares = DRILLS[name].shares(count)
    assert min(shares.values()) > 0
    assert sum(shares.values()) == (count * len(shares) if name == "flips" else count)
