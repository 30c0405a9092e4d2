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
