"""The kit for storages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fulmen_conformance._kit import Kit
from fulmen_protocols import Storage, missing_members

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["StorageConformance"]


class StorageConformance(Kit):
    """Proves a ``Storage``.

    Give the fixture ``storage``; for storages other than local files also ``root`` and ``read_bytes``.
    """

    @pytest.fixture
    def storage(self) -> Storage:
        """The storage under test."""
        raise NotImplementedError("define a fixture `storage` that returns the storage under test")

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        """An empty folder of that storage, as a path or URL without a slash at its end. Default: a local folder."""
        return str(tmp_path)

    @pytest.fixture
    def read_bytes(self) -> Callable[[str], bytes | None]:
        """A raw reader that does not use the storage: the bytes at a path, None if nothing is there.

        Default: local files.
        """
        return _read_local

    def test_it_has_every_member_of_the_protocol(self, storage: Storage) -> None:
        """``Storage`` has no optional member. On failure look at the methods listed as missing."""
        assert missing_members(Storage, storage) == []

    @pytest.mark.parametrize("size", [0, 1, 9 * 2**20], ids=["empty", "one byte", "9 MiB"])
    def test_what_was_written_is_there_bit_for_bit(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None], size: int
    ) -> None:
        """9 MiB is more than one part of an upload. On failure look at ``write_atomic``: text mode, lost parts."""
        content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

        with storage.write_atomic(f"{root}/file") as stream:
            stream.write(content[: size // 2])
            stream.write(content[size // 2 :])

        assert read_bytes(f"{root}/file") == content

    def test_a_file_is_read_back_and_can_be_searched(self, storage: Storage, root: str) -> None:
        """Zip readers jump around. On failure look at ``open_read``: does its stream ``seek`` and ``tell``?"""
        _write(storage, f"{root}/file", b"0123456789")

        with storage.open_read(f"{root}/file") as stream:
            assert stream.seekable()
            assert stream.read(3) == b"012"
            assert stream.seek(-4, 2) == 6
            assert stream.tell() == 6
            assert stream.read() == b"6789"
            stream.seek(1)
            assert stream.read(2) == b"12"

    def test_nothing_is_visible_before_the_block_ends(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """A reader must never meet half a file. On failure look for a stream opened on the target itself."""
        with storage.write_atomic(f"{root}/file") as stream:
            stream.write(b"x" * 100_000)
            stream.flush()

            assert read_bytes(f"{root}/file") is None
            assert not storage.exists(f"{root}/file")

        assert read_bytes(f"{root}/file") == b"x" * 100_000

    def test_the_old_content_stays_until_the_block_ends(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """Overwriting is one step too. On failure look for a target truncated when the stream is opened."""
        _write(storage, f"{root}/file", b"old")

        with storage.write_atomic(f"{root}/file") as stream:
            stream.write(b"new content")
            stream.flush()

            assert read_bytes(f"{root}/file") == b"old"

        assert read_bytes(f"{root}/file") == b"new content"

    @pytest.mark.parametrize("old", [None, b"old"], ids=["nothing before", "overwriting"])
    def test_a_failed_write_changes_nothing_and_leaves_nothing(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None], old: bytes | None
    ) -> None:
        """An error inside the block, of any kind. On failure look at the clean-up of ``write_atomic``."""
        if old is not None:
            _write(storage, f"{root}/file", old)
        before = storage.list(root)

        with pytest.raises(KeyboardInterrupt):
            _write_and_fail(storage, f"{root}/file")

        assert read_bytes(f"{root}/file") == old
        assert storage.list(root) == before, "staging files must not stay behind"

    def test_parent_folders_are_made(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """Nobody calls mkdir. On failure look at what ``write_atomic`` does with a path three folders deep."""
        _write(storage, f"{root}/a/b/c/file", b"deep")

        assert read_bytes(f"{root}/a/b/c/file") == b"deep"

    def test_reading_what_is_not_there_is_a_file_not_found_error(self, storage: Storage, root: str) -> None:
        """On failure look at ``open_read``: the storage's own exception type must not leak out."""
        with pytest.raises(FileNotFoundError), storage.open_read(f"{root}/nothing") as stream:
            stream.read()

    def test_files_and_folders_exist_and_others_do_not(self, storage: Storage, root: str) -> None:
        """On failure look at ``exists`` for folders, and for a name that another name begins with."""
        _write(storage, f"{root}/folder/file.ckpt", b"x")

        assert storage.exists(f"{root}/folder/file.ckpt")
        assert storage.exists(f"{root}/folder")
        assert not storage.exists(f"{root}/folder/file")
        assert not storage.exists(f"{root}/fold")

    def test_a_folder_lists_its_own_entries_sorted_as_full_paths(self, storage: Storage, root: str) -> None:
        """On failure look at ``list``: order, names without their folder, entries of subfolders."""
        for name in ("b", "c/inner", "a"):
            _write(storage, f"{root}/folder/{name}", b"x")

        entries = storage.list(f"{root}/folder")

        assert [entry.rsplit("/", 1)[-1] for entry in entries] == ["a", "b", "c"]
        assert entries == sorted(entries)
        with storage.open_read(entries[0]) as stream:
            assert stream.read() == b"x"

    def test_a_folder_that_is_not_there_lists_nothing(self, storage: Storage, root: str) -> None:
        """On failure look at ``list`` for a missing path: it returns ``[]`` and raises nothing."""
        assert storage.list(f"{root}/nothing") == []

    def test_a_file_knows_when_it_was_written(self, storage: Storage, root: str) -> None:
        """Retention compares ages. On failure look at ``modified``: seconds since the epoch, in UTC, as a float."""
        _write(storage, f"{root}/file", b"x")

        age_s = time.time() - storage.modified(f"{root}/file")

        assert isinstance(storage.modified(f"{root}/file"), float)
        assert abs(age_s) < 600, f"written just now, but {age_s:.0f} s ago by its time stamp"

    def test_the_age_of_what_is_not_there_is_a_file_not_found_error(self, storage: Storage, root: str) -> None:
        """On failure look at ``modified`` for a missing path."""
        with pytest.raises(FileNotFoundError):
            storage.modified(f"{root}/nothing")

    def test_a_file_is_removed_and_its_neighbours_stay(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """On failure look at ``remove``: prefixes taken for folders."""
        for name in ("file", "file2"):
            _write(storage, f"{root}/{name}", b"x")

        storage.remove(f"{root}/file")

        assert read_bytes(f"{root}/file") is None
        assert read_bytes(f"{root}/file2") == b"x"
        assert not storage.exists(f"{root}/file")

    def test_a_folder_is_removed_with_all_it_holds(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """On failure look at ``remove`` for folders that are not empty."""
        _write(storage, f"{root}/folder/a/file", b"x")
        _write(storage, f"{root}/folder2/file", b"x")

        storage.remove(f"{root}/folder")

        assert read_bytes(f"{root}/folder/a/file") is None
        assert not storage.exists(f"{root}/folder")
        assert read_bytes(f"{root}/folder2/file") == b"x"

    def test_removing_what_is_not_there_is_allowed(self, storage: Storage, root: str) -> None:
        """Two processes may clean up. On failure look at ``remove`` for a missing path."""
        storage.remove(f"{root}/nothing")

    @pytest.mark.parametrize("name", ["epoch=1-step=2.ckpt", "with space", "val[0]*?", "größe", "100%"])
    def test_unusual_names_are_only_names(
        self, storage: Storage, root: str, read_bytes: Callable[[str], bytes | None], name: str
    ) -> None:
        """Metric values and brackets end up in file names. On failure look for glob patterns and URL decoding."""
        path = f"{root}/folder/{name}"

        _write(storage, path, b"x")

        assert read_bytes(path) == b"x"
        assert storage.exists(path)
        assert [entry.rsplit("/", 1)[-1] for entry in storage.list(f"{root}/folder")] == [name]
        with storage.open_read(path) as stream:
            assert stream.read() == b"x"
        storage.remove(path)
        assert read_bytes(path) is None


def _write(storage: Storage, path: str, content: bytes) -> None:
    with storage.write_atomic(path) as stream:
        stream.write(content)


def _write_and_fail(storage: Storage, path: str) -> None:
    with storage.write_atomic(path) as stream:
        stream.write(b"half of it")
        raise KeyboardInterrupt


def _read_local(path: str) -> bytes | None:
    file = Path(path.removeprefix("file://"))
    return file.read_bytes() if file.is_file() else None
