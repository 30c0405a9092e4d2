"""A minimal correct storage, and broken ones that StorageConformance must catch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

import pytest

from fulmen_conformance import StorageConformance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fulmen_protocols import Storage


class Good:
    """Local files."""

    def open_read(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        return open(path, "rb")

    @contextlib.contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staging = tempfile.mkstemp(dir=target.parent)
        try:
            with open(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staging, target)
        except BaseException:
            Path(staging).unlink()
            raise

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def list(self, path: str) -> list[str]:
        folder = Path(path)
        return sorted(str(entry) for entry in folder.iterdir()) if folder.is_dir() else []

    def modified(self, path: str) -> float:
        return Path(path).stat().st_mtime

    def remove(self, path: str) -> None:
        target = Path(path)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


class TestGood(StorageConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def storage(self) -> Storage:
        return Good()


def broken(backend: type[Good], *tests: str) -> type[StorageConformance]:
    """A subclass of the kit for ``backend``, which exactly ``tests`` must catch."""

    class Drill(StorageConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def storage(self) -> Storage:
            return backend()

    return Drill


class InPlace(Good):
    @contextlib.contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as stream:
            yield stream


class LeavesStaging(Good):
    @contextlib.contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path + ".tmp", "wb") as stream:
            yield stream
        os.replace(path + ".tmp", path)


class CommitsAnyway(Good):
    @contextlib.contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor, staging = tempfile.mkstemp(dir=Path(path).parent)
        try:
            with open(descriptor, "wb") as stream:
                yield stream
        finally:
            os.replace(staging, path)


class NoParents(Good):
    @contextlib.contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        if not Path(path).parent.parent.exists():
            raise FileNotFoundError(path)
        with super().write_atomic(path) as stream:
            yield stream


class OwnErrors(Good):
    def open_read(self, path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        if not self.exists(path):
            raise KeyError(path)
        return super().open_read(path)


class Unsorted(Good):
    def list(self, path: str) -> list[str]:
        return super().list(path)[::-1]


class ShortNames(Good):
    def list(self, path: str) -> list[str]:
        return [entry.rsplit("/", 1)[-1] for entry in super().list(path)]


class Recursive(Good):
    def list(self, path: str) -> list[str]:
        return sorted(str(entry) for entry in Path(path).rglob("*"))


class Globs(Good):
    def exists(self, path: str) -> bool:
        return bool(list(Path(path).parent.glob(Path(path).name)))


class PrefixRemove(Good):
    def remove(self, path: str) -> None:
        for entry in Path(path).parent.glob(Path(path).name + "*"):
            super().remove(str(entry))


class RemoveInsists(Good):
    def remove(self, path: str) -> None:
        if not self.exists(path):
            raise FileNotFoundError(path)
        super().remove(path)


class FilesOnly(Good):
    def exists(self, path: str) -> bool:
        return Path(path).is_file()

    def remove(self, path: str) -> None:
        Path(path).unlink(missing_ok=True) if Path(path).is_file() else None


class AgeInMilliseconds(Good):
    def modified(self, path: str) -> float:
        return Path(path).stat().st_mtime * 1000


class TestInPlace(StorageConformance):
    caught_by: ClassVar[set[str]] = {
        "test_nothing_is_visible_before_the_block_ends",
        "test_the_old_content_stays_until_the_block_ends",
        "test_a_failed_write_changes_nothing_and_leaves_nothing",
    }

    @pytest.fixture
    def storage(self) -> Storage:
        return InPlace()


TestLeavesStaging = broken(LeavesStaging, "test_a_failed_write_changes_nothing_and_leaves_nothing")
TestCommitsAnyway = broken(CommitsAnyway, "test_a_failed_write_changes_nothing_and_leaves_nothing")
TestNoParents = broken(NoParents, "test_parent_folders_are_made", "test_a_folder_is_removed_with_all_it_holds")
TestOwnErrors = broken(OwnErrors, "test_reading_what_is_not_there_is_a_file_not_found_error")
TestUnsorted = broken(Unsorted, "test_a_folder_lists_its_own_entries_sorted_as_full_paths")
TestShortNames = broken(ShortNames, "test_a_folder_lists_its_own_entries_sorted_as_full_paths")
TestRecursive = broken(Recursive, "test_a_folder_lists_its_own_entries_sorted_as_full_paths")
TestGlobs = broken(Globs, "test_unusual_names_are_only_names")
TestPrefixRemove = broken(
    PrefixRemove,
    "test_a_file_is_removed_and_its_neighbours_stay",
    "test_a_folder_is_removed_with_all_it_holds",
    "test_unusual_names_are_only_names",
)
TestRemoveInsists = broken(RemoveInsists, "test_removing_what_is_not_there_is_allowed")
TestFilesOnly = broken(
    FilesOnly, "test_files_and_folders_exist_and_others_do_not", "test_a_folder_is_removed_with_all_it_holds"
)
TestAgeInMilliseconds = broken(AgeInMilliseconds, "test_a_file_knows_when_it_was_written")
