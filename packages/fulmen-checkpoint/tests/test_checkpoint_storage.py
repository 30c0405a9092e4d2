"""FsspecStorage on local folders, memory:// and S3."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fulmen_checkpoint import FsspecStorage
from fulmen_checkpoint.names import is_staging, parse_staging, staging_name, this_machine
from fulmen_protocols import BackendNotFound, MissingPackage, Storage, missing_members

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["local", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[FsspecStorage, str]:
    match request.param:
        case "local":
            return FsspecStorage(), str(tmp_path / "run")
        case "file":
            return FsspecStorage(), f"file://{tmp_path}/run"
        case "memory":
            return FsspecStorage(), request.getfixturevalue("memory_folder")
        case _:
            return FsspecStorage(request.getfixturevalue("s3_options")), request.getfixturevalue("s3_folder")


def _write(storage: FsspecStorage, path: str, data: bytes) -> None:
    with storage.write_atomic(path) as stream:
        stream.write(data)


def _read(storage: FsspecStorage, path: str) -> bytes:
    with storage.open_read(path) as stream:
        return stream.read()


def test_it_has_every_member_of_the_protocol() -> None:
    assert missing_members(Storage, FsspecStorage()) == []


def test_what_was_written_is_read_and_folders_are_made(place: tuple[FsspecStorage, str]) -> None:
    storage, folder = place
    path = f"{folder}/deep/er/a.ckpt"
    before = time.time()
    _write(storage, path, b"x" * 100_000)
    assert _read(storage, path) == b"x" * 100_000
    assert storage.exists(path)
    assert storage.exists(f"{folder}/deep")
    assert before - 5 < storage.modified(path) < time.time() + 5


def test_a_second_write_replaces_the_first(place: tuple[FsspecStorage, str]) -> None:
    storage, folder = place
    _write(storage, f"{folder}/a", b"long old content")
    _write(storage, f"{folder}/a", b"new")
    assert _read(storage, f"{folder}/a") == b"new"


def test_reading_streams_can_seek(place: tuple[FsspecStorage, str]) -> None:
    storage, folder = place
    _write(storage, f"{folder}/a", bytes(range(100)))
    with storage.open_read(f"{folder}/a") as stream:
        assert stream.seek(-10, os.SEEK_END) == 90
        assert stream.read(2) == bytes([90, 91])


@pytest.mark.proves("5.11")
def test_an_unfinished_or_failed_write_leaves_the_old_content_and_nothing_else(
    place: tuple[FsspecStorage, str],
) -> None:
    storage, folder = place
    path = f"{folder}/a"
    _write(storage, path, b"old")
    with pytest.raises(RuntimeError, match="midway"), storage.write_atomic(path) as stream:  # noqa: PT012
        stream.write(b"n" * 7_000_000)  # beyond one part of a multipart upload
        stream.flush()
        assert _read(storage, path) == b"old"
        raise RuntimeError("midway")
    assert _read(storage, path) == b"old"
    assert [entry.rsplit("/", 1)[-1] for entry in storage.list(folder)] == ["a"]
    with pytest.raises(KeyError), storage.write_atomic(f"{folder}/never") as stream:  # noqa: PT012
        stream.write(b"half")
        raise KeyError
    assert not storage.exists(f"{folder}/never")


def test_list_gives_full_sorted_paths_that_can_be_used_again(place: tuple[FsspecStorage, str]) -> None:
    storage, folder = place
    for name in ("b", "a", "sub/c"):
        _write(storage, f"{folder}/{name}", name.encode())
    listed = storage.list(folder)
    assert [path.rsplit("/", 1)[-1] for path in listed] == ["a", "b", "sub"]
    assert _read(storage, listed[0]) == b"a"
    assert storage.list(f"{folder}/missing") == []
    assert storage.list(listed[0]) == []


def test_remove_takes_files_and_whole_folders_and_tolerates_nothing(place: tuple[FsspecStorage, str]) -> None:
    storage, folder = place
    for name in ("a", "dir/b", "dir/deep/c", "dirt"):
        _write(storage, f"{folder}/{name}", b"x")
    storage.remove(f"{folder}/a")
    storage.remove(f"{folder}/dir")
    storage.remove(f"{folder}/dir")
    storage.remove(f"{folder}/never/was")
    assert [path.rsplit("/", 1)[-1] for path in storage.list(folder)] == ["dirt"]


def test_names_with_pattern_characters_are_taken_literally(place: tuple[FsspecStorage, str]) -> None:
    storage, folder = place
    for name in ("epoch=[01].ckpt", "epoch=0.ckpt", "a*", "ab", "d[12]/x", "d1/x"):
        _write(storage, f"{folder}/{name}", name.encode())
    assert _read(storage, f"{folder}/epoch=[01].ckpt") == b"epoch=[01].ckpt"
    for name in ("epoch=[01].ckpt", "a*", "d[12]"):
        storage.remove(f"{folder}/{name}")
    assert [path.rsplit("/", 1)[-1] for path in storage.list(folder)] == ["ab", "d1", "epoch=0.ckpt"]


def test_a_missing_file_is_file_not_found(place: tuple[FsspecStorage, str]) -> None:
    storage, folder = place
    with pytest.raises(FileNotFoundError):
        _read(storage, f"{folder}/missing")
    with pytest.raises(FileNotFoundError):
        storage.modified(f"{folder}/missing")
    assert not storage.exists(f"{folder}/missing")


def test_another_writer_is_seen_at_once(s3_options: dict[str, object], s3_folder: str) -> None:
    ours, theirs = FsspecStorage(s3_options), FsspecStorage({**s3_options, "skip_instance_cache": True})
    _write(ours, f"{s3_folder}/a", b"1")
    assert len(ours.list(s3_folder)) == 1
    _write(theirs, f"{s3_folder}/b", b"2")
    assert len(ours.list(s3_folder)) == 2
    theirs.remove(f"{s3_folder}/a")
    assert not ours.exists(f"{s3_folder}/a")


def test_a_failed_upload_leaves_no_parts_behind(s3_options: dict[str, object], s3_folder: str) -> None:
    import s3fs

    storage = FsspecStorage({**s3_options, "default_block_size": 5 << 20})
    with pytest.raises(RuntimeError), storage.write_atomic(f"{s3_folder}/a") as stream:  # noqa: PT012
        stream.write(b"n" * (12 << 20))
        raise RuntimeError
    fs = s3fs.S3FileSystem(**s3_options)
    assert fs.call_s3("list_multipart_uploads", Bucket=s3_folder.split("/")[2]).get("Uploads") is None
    with storage.write_atomic(f"{s3_folder}/a") as stream:
        stream.write(b"n" * (12 << 20))
    assert len(_read(storage, f"{s3_folder}/a")) == 12 << 20


class Failing(MemoryFileSystem):
    """A file system that fails in one operation."""

    protocol = "failing"
    fails_in = ""

    def _open(self, path, mode="rb", **kwargs):  # type: ignore[no-untyped-def]
        stream = super()._open(path, mode, **kwargs)
        if "w" in mode and self.fails_in == "write":
            written = stream.write

            def write(data):  # type: ignore[no-untyped-def]
                if stream.tell() > 1_000_000:
                    raise OSError(28, "No space left on device")
                return written(data)

            stream.write = write
        return stream

    def cp_file(self, path1, path2, **kwargs):  # type: ignore[no-untyped-def]
        if self.fails_in == "move":
            raise TimeoutError("the server did not answer")
        return super().cp_file(path1, path2, **kwargs)


@pytest.mark.proves("5.11")
@pytest.mark.parametrize("where", ["write", "move"])
def test_a_storage_that_fails_midway_keeps_the_old_content(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    storage, folder = FsspecStorage(), f"failing://{uuid.uuid4().hex}"
    _write(storage, f"{folder}/a", b"old")
    monkeypatch.setattr(Failing, "fails_in", where)
    with pytest.raises(OSError), storage.write_atomic(f"{folder}/a") as stream:  # noqa: PT012
        for _ in range(4):
            stream.write(b"x" * 500_000)
    monkeypatch.setattr(Failing, "fails_in", "")
    assert _read(storage, f"{folder}/a") == b"old"
    assert len(MemoryFileSystem.store) == len([p for p in MemoryFileSystem.store if not is_staging(p)])


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        _write(FsspecStorage(), str(tmp_path / "a"), b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_writing_to_a_link_replaces_the_link_and_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "epoch.ckpt").write_bytes(b"kept")
    (tmp_path / "last.ckpt").symlink_to("epoch.ckpt")
    _write(FsspecStorage(), str(tmp_path / "last.ckpt"), b"new")
    assert (tmp_path / "epoch.ckpt").read_bytes() == b"kept"
    assert (tmp_path / "last.ckpt").read_bytes() == b"new"


def test_removing_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("folder", target_is_directory=True)
    FsspecStorage().remove(str(tmp_path / "link"))
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "x").exists()


def test_the_longest_file_name_can_be_written(tmp_path: Path) -> None:
    name = "ü" * 120 + ".ckpt"
    _write(FsspecStorage(), str(tmp_path / name), b"x")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="remove it first"), FsspecStorage().write_atomic(str(tmp_path / "a")):
        pass


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(BackendNotFound, match="knows no file system 'nosuch'"):
        FsspecStorage().exists("nosuch://x/y")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_file_system_package_is_named() -> None:
    with pytest.raises(MissingPackage, match="Run: pip install gcsfs"):
        FsspecStorage().exists("gs://bucket/x")


def test_staging_names_are_told_from_all_others() -> None:
    name = staging_name("a.ckpt")
    parsed = parse_staging(name)
    assert parsed is not None
    assert parsed == ("a.ckpt", os.getpid(), this_machine())
    assert is_staging(f"s3://bucket/{name}")
    for other in ("a.ckpt", ".a.ckpt.partial", "a.ckpt.12.0123456789abcdef.partial", ".hidden"):
        assert not is_staging(other)


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return child.pid


def test_leftovers_of_killed_writers_are_hidden_and_swept_by_the_next_write(tmp_path: Path) -> None:
    storage = FsspecStorage()
    left = tmp_path / f".a.ckpt.{_dead_pid()}.{this_machine()}00000001.partial"
    left.write_bytes(b"half")
    assert storage.list(str(tmp_path)) == []
    _write(storage, str(tmp_path / "a.ckpt"), b"x")
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_files_that_may_still_be_written_are_left_alone(tmp_path: Path) -> None:
    elsewhere = "0" * 8 if this_machine() != "0" * 8 else "1" * 8
    dead = _dead_pid()
    alive = tmp_path / f".a.{os.getppid()}.{this_machine()}00000001.partial"
    other_target = tmp_path / f".b.{dead}.{this_machine()}00000001.partial"
    other_machine = tmp_path / f".a.{dead}.{elsewhere}00000001.partial"
    abandoned = tmp_path / f".a.{dead}.{elsewhere}00000002.partial"
    lookalike = tmp_path / ".a.partial"
    for path in (alive, other_target, other_machine, abandoned, lookalike):
        path.write_bytes(b"half")
    os.utime(abandoned, (time.time() - 90_000,) * 2)
    _write(FsspecStorage(), str(tmp_path / "a"), b"x")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a",
        alive.name,
        other_target.name,
        other_machine.name,
        lookalike.name,
    }


def test_a_locked_file_is_left_alone_though_its_process_seems_dead(tmp_path: Path) -> None:
    # As seen from another container on the same machine, where process ids differ.
    import fcntl

    held = tmp_path / f".a.{_dead_pid()}.{this_machine()}00000001.partial"
    with held.open("wb") as stream:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX)
        _write(FsspecStorage(), str(tmp_path / "a"), b"x")
        assert held.exists()
    _write(FsspecStorage(), str(tmp_path / "a"), b"x")
    assert not held.exists()


def test_two_writers_of_one_target_do_not_disturb_each_other(tmp_path: Path) -> None:
    storage, path = FsspecStorage(), str(tmp_path / "a")
    with storage.write_atomic(path) as first:
        first.write(b"first")
        _write(storage, path, b"second")
        assert _read(storage, path) == b"second"
    assert _read(storage, path) == b"first"
    assert os.listdir(tmp_path) == ["a"]
