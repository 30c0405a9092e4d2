"""The conformance kits on every backend of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fsspec
import pytest

from fulmen_checkpoint import FsspecStorage, SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_conformance import CheckpointIOConformance, StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_protocols import CheckpointIO, Storage


def _reader(**options: object) -> Callable[[str], bytes | None]:
    def read(url: str) -> bytes | None:
        fs, path = fsspec.core.url_to_fs(url, **options)
        fs.invalidate_cache()
        return fs.cat_file(path) if fs.isfile(path) else None

    return read


def _writer(**options: object) -> Callable[[str, bytes], None]:
    def write(url: str, data: bytes) -> None:
        fs, path = fsspec.core.url_to_fs(url, **options)
        fs.pipe_file(path, data)

    return write


def _largest_file(url: str, options: dict[str, object]) -> str | None:
    fs, path = fsspec.core.url_to_fs(url, **options)
    fs.invalidate_cache()
    sizes = {info["name"]: info["size"] for info in fs.find(path, detail=True).values()}
    return fs.unstrip_protocol(max(sorted(sizes), key=sizes.__getitem__)) if sizes else None


def _largest(read: Callable[[str], bytes | None], **options: object) -> Callable[[str], bytes | None]:
    def read_largest(url: str) -> bytes | None:
        file = _largest_file(url, options)
        return None if file is None else read(file)

    return read_largest


def _into_largest(write: Callable[[str, bytes], None], **options: object) -> Callable[[str, bytes], None]:
    def write_largest(url: str, data: bytes) -> None:
        file = _largest_file(url, options)
        assert file is not None
        write(file, data)

    return write_largest


class TestTorchCheckpointIO(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return TorchCheckpointIO()


class TestTorchCheckpointIOInMemory(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return TorchCheckpointIO()

    @pytest.fixture
    def path(self, memory_folder: str) -> str:
        return f"{memory_folder}/epoch=0-step=1.ckpt"

    @pytest.fixture
    def read_bytes(self) -> Callable[[str], bytes | None]:
        return _reader()

    @pytest.fixture
    def write_bytes(self) -> Callable[[str, bytes], None]:
        return _writer()


class TestTorchCheckpointIOOnS3(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self, s3_options: dict[str, object]) -> CheckpointIO:
        return TorchCheckpointIO(FsspecStorage(s3_options))

    @pytest.fixture
    def path(self, s3_folder: str) -> str:
        return f"{s3_folder}/epoch=0-step=1.ckpt"

    @pytest.fixture
    def read_bytes(self, s3_options: dict[str, object]) -> Callable[[str], bytes | None]:
        return _reader(**s3_options)

    @pytest.fixture
    def write_bytes(self, s3_options: dict[str, object]) -> Callable[[str, bytes], None]:
        return _writer(**s3_options)


class TestSafetensorsCheckpointIO(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return SafetensorsCheckpointIO()


class TestSafetensorsCheckpointIOInMemory(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return SafetensorsCheckpointIO()

    @pytest.fixture
    def path(self, memory_folder: str) -> str:
        return f"{memory_folder}/epoch=0-step=1.ckpt"

    @pytest.fixture
    def read_bytes(self) -> Callable[[str], bytes | None]:
        return _reader()

    @pytest.fixture
    def write_bytes(self) -> Callable[[str, bytes], None]:
        return _writer()


class TestShardedCheckpointIO(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return ShardedCheckpointIO()


class TestShardedCheckpointIOInMemory(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return ShardedCheckpointIO()

    @pytest.fixture
    def path(self, memory_folder: str) -> str:
        return f"{memory_folder}/epoch=0-step=1.ckpt"

    @pytest.fixture
    def read_bytes(self) -> Callable[[str], bytes | None]:
        return _largest(_reader())

    @pytest.fixture
    def write_bytes(self) -> Callable[[str, bytes], None]:
        return _into_largest(_writer())


class TestShardedCheckpointIOOnS3(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self, s3_options: dict[str, object]) -> CheckpointIO:
        return ShardedCheckpointIO(FsspecStorage(s3_options))

    @pytest.fixture
    def path(self, s3_folder: str) -> str:
        return f"{s3_folder}/epoch=0-step=1.ckpt"

    @pytest.fixture
    def read_bytes(self, s3_options: dict[str, object]) -> Callable[[str], bytes | None]:
        return _largest(_reader(**s3_options), **s3_options)

    @pytest.fixture
    def write_bytes(self, s3_options: dict[str, object]) -> Callable[[str, bytes], None]:
        return _into_largest(_writer(**s3_options), **s3_options)


class TestLocalStorage(StorageConformance):
    @pytest.fixture
    def storage(self) -> Storage:
        return FsspecStorage()


class TestMemoryStorage(StorageConformance):
    @pytest.fixture
    def storage(self) -> Storage:
        return FsspecStorage()

    @pytest.fixture
    def root(self, memory_folder: str) -> str:
        return memory_folder

    @pytest.fixture
    def read_bytes(self) -> Callable[[str], bytes | None]:
        return _reader()


class TestS3Storage(StorageConformance):
    @pytest.fixture
    def storage(self, s3_options: dict[str, object]) -> Storage:
        return FsspecStorage(s3_options)

    @pytest.fixture
    def root(self, s3_folder: str) -> str:
        return s3_folder

    @pytest.fixture
    def read_bytes(self, s3_options: dict[str, object]) -> Callable[[str], bytes | None]:
        return _reader(**s3_options)
