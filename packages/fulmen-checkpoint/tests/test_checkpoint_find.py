"""Finding the newest whole checkpoint."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fulmen_checkpoint import FsspecStorage, TorchCheckpointIO, find_last, list_checkpoints, newest_whole
from fulmen_checkpoint.names import staging_name

if TYPE_CHECKING:
    from pathlib import Path


def _save(folder: Path, names: list[str]) -> None:
    for age, name in enumerate(reversed(names)):
        TorchCheckpointIO().save_checkpoint({"name": name}, folder / name)
        os.utime(folder / name, (1e9 - age, 1e9 - age))


def test_checkpoints_are_listed_newest_first_without_staging_files(tmp_path: Path) -> None:
    _save(tmp_path, ["b.ckpt", "a.ckpt", "c.ckpt"])
    (tmp_path / staging_name("d.ckpt")).write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"")
    assert [os.path.basename(path) for path in list_checkpoints(tmp_path)] == ["c.ckpt", "a.ckpt", "b.ckpt"]
    assert [os.path.basename(path) for path in list_checkpoints(tmp_path, "[ab].ckpt")] == ["a.ckpt", "b.ckpt"]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_of_the_same_instant_the_greater_number_is_newer(tmp_path: Path) -> None:
    names = ["epoch=9-step=100.ckpt", "epoch=10-step=20.ckpt", "epoch=10-step=110.ckpt"]
    _save(tmp_path, names)
    for name in names:
        os.utime(tmp_path / name, (1e9, 1e9))
    assert [os.path.basename(path) for path in list_checkpoints(tmp_path)] == names[::-1]


@pytest.mark.proves("5.29")
def test_the_newest_whole_one_is_found_and_damaged_ones_are_reported(tmp_path: Path) -> None:
    _save(tmp_path, ["0.ckpt", "1.ckpt", "2.ckpt", "3.ckpt"])
    whole = (tmp_path / "3.ckpt").read_bytes()
    for name, data in (("3.ckpt", whole[:-1]), ("2.ckpt", whole[:300] + b"\xff" + whole[301:])):
        when = (tmp_path / name).stat().st_mtime
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (when, when))
    found = find_last(tmp_path)
    assert found.path == str(tmp_path / "1.ckpt")
    assert [os.path.basename(path) for path, _ in found.skipped] == ["3.ckpt", "2.ckpt"]
    assert "the end is missing" in found.report()
    assert found.report().count("\n") == 1


def test_a_folder_without_a_whole_checkpoint_gives_none(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    found = find_last(tmp_path)
    assert found.path is None
    assert len(found.skipped) == 1
    assert find_last(tmp_path / "nowhere").path is None


@pytest.mark.parametrize("where", ["memory", "s3"])
def test_candidates_on_urls_from_several_folders(where: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(f"{where}_folder")
    storage = FsspecStorage(request.getfixturevalue("s3_options") if where == "s3" else None)
    io = TorchCheckpointIO(storage)
    for name in ("a/last.ckpt", "b/last-v1.ckpt"):
        io.save_checkpoint({"n": name}, f"{folder}/{name}")
    with storage.write_atomic(f"{folder}/b/last-v2.ckpt") as stream:
        stream.write(b"half")
    # S3 dates have whole seconds: the versions in the names decide.
    found = find_last(f"{folder}/b", "last*.ckpt", storage=storage)
    assert found.path is not None
    assert found.path.endswith("b/last-v1.ckpt")
    assert len(found.skipped) == 1
    among = [f"{folder}/a/last.ckpt", f"{folder}/missing.ckpt"]
    assert newest_whole(among, storage=storage).path == among[0]
    assert newest_whole(among, storage=storage).skipped == ()


def test_a_vendors_checker_needs_only_builtin_errors(tmp_path: Path) -> None:
    class Picky:
        def verify_checkpoint(self, path: object) -> None:
            if "b" in os.path.basename(str(path)):
                raise ValueError("no b")

    _save(tmp_path, ["a.ckpt", "b.ckpt"])
    found = find_last(tmp_path, io=Picky())
    assert found.path == str(tmp_path / "a.ckpt")
    assert found.skipped == ((str(tmp_path / "b.ckpt"), "no b"),)
