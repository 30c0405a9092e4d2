"""Retention deletes what this run wrote, and nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fulmen_checkpoint import FsspecStorage, Journal, Retention
from fulmen_protocols import CheckpointCorrupt

if TYPE_CHECKING:
    from pathlib import Path


def _make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_what_this_run_wrote_is_deleted_once(tmp_path: Path) -> None:
    keep = Retention()
    path = _make(tmp_path / "a.ckpt")
    keep.wrote(path)
    assert keep.remove(path)
    assert not path.exists()
    _make(path)  # someone else's, from now on
    assert not keep.remove(path)
    assert path.exists()


@pytest.mark.proves("5.25")
def test_files_of_others_are_never_deleted(tmp_path: Path) -> None:
    theirs = _make(tmp_path / "previous_run.ckpt")
    assert not Retention().may_remove(theirs)
    assert not Retention().remove(theirs)
    assert theirs.exists()


@pytest.mark.proves("5.25")
def test_what_the_run_resumed_from_is_kept_under_every_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _make(tmp_path / "real" / "a.ckpt")
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    keep = Retention()
    keep.wrote(path)
    monkeypatch.chdir(tmp_path)
    keep.resumed_from("link/../link/a.ckpt")
    for spelling in (path, str(path), "real/a.ckpt", tmp_path / "link" / "a.ckpt", f"file://{path}"):
        assert not keep.remove(spelling)
    assert path.exists()


def test_a_folder_around_or_a_file_within_the_resumed_one_is_kept(tmp_path: Path) -> None:
    part = _make(tmp_path / "step=1" / "shard.bin")
    keep = Retention()
    for path in (part.parent, part):
        keep.wrote(path)
    keep.resumed_from(part.parent)
    assert not keep.remove(part)
    assert not keep.remove(part.parent)
    again = Retention()
    again.wrote(part.parent)
    again.resumed_from(part)
    assert not again.remove(part.parent)
    similar = _make(tmp_path / "step=10")
    keep.wrote(similar)
    assert keep.remove(similar)


def test_what_a_resumed_link_points_to_is_kept(tmp_path: Path) -> None:
    best = _make(tmp_path / "epoch=3.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=3.ckpt")
    keep = Retention()
    keep.wrote(best)
    keep.resumed_from(tmp_path / "last.ckpt")
    assert not keep.remove(best)
    assert best.exists()


def test_folders_are_deleted_whole(tmp_path: Path) -> None:
    part = _make(tmp_path / "step=1" / "deep" / "shard.bin")
    keep = Retention()
    keep.wrote(tmp_path / "step=1")
    assert keep.remove(tmp_path / "step=1")
    assert not part.exists()


def test_deleting_a_link_keeps_the_checkpoint_it_points_to(tmp_path: Path) -> None:
    best = _make(tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    keep = Retention()
    keep.wrote(tmp_path / "last.ckpt")
    assert keep.remove(tmp_path / "last.ckpt")
    assert best.exists()


def test_only_the_newest_are_kept_and_the_resumed_one_beside_them(tmp_path: Path) -> None:
    keep = Retention()
    paths = [_make(tmp_path / f"{n}.ckpt") for n in range(5)]
    foreign = _make(tmp_path / "foreign.ckpt")
    for path in paths:
        keep.wrote(path)
    keep.resumed_from(paths[0])
    keep.wrote(paths[1])  # written again: now the newest
    assert keep.keep_newest(2) == [str(paths[2]), str(paths[3])]
    assert sorted(os.listdir(tmp_path)) == ["0.ckpt", "1.ckpt", "4.ckpt", foreign.name]
    assert keep.keep_newest(0) == [str(paths[4]), str(paths[1])]
    with pytest.raises(ValueError, match=r"count=-1"):
        keep.keep_newest(-1)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_journal_outlives_its_process(where: str, tmp_path: Path, memory_folder: str) -> None:
    journal = str(tmp_path / "run" / "journal.json") if where == "local" else f"{memory_folder}/journal.json"
    first = Retention(Journal(journal))
    mine, old = _make(tmp_path / "mine.ckpt"), _make(tmp_path / "old.ckpt")
    first.resumed_from(old)
    first.wrote(mine)
    first.wrote(old)
    again = Retention(Journal(journal))
    assert again.journal.written == [str(mine), str(old)]
    assert again.journal.resumed == [str(old)]
    assert again.remove(mine)
    assert not again.remove(old)
    assert Journal(journal).written == [str(old)]


@pytest.mark.parametrize("text", ["{", "[]", '{"written": 3, "resumed": []}', '{"written": [3], "resumed": []}'])
def test_a_damaged_journal_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.json").write_text(text)
    with pytest.raises(CheckpointCorrupt, match=r"journal.json.* Delete it"):
        Journal(tmp_path / "journal.json")


def test_urls_are_kept_apart_by_scheme_and_deleted(memory_folder: str) -> None:
    storage, keep = FsspecStorage(), Retention()
    with storage.write_atomic(f"{memory_folder}/a.ckpt") as stream:
        stream.write(b"x")
    keep.wrote(f"{memory_folder}/a.ckpt")
    assert not keep.may_remove(memory_folder.replace("memory", "s3") + "/a.ckpt")
    assert keep.remove(f"{memory_folder}/a.ckpt")
    assert not storage.exists(f"{memory_folder}/a.ckpt")
