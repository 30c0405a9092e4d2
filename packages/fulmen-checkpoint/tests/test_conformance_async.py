"""The conformance kit on AsyncCheckpointIO: by a process, by a thread, and on a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fsspec
import pytest

from fulmen_checkpoint import AsyncCheckpointIO, FsspecStorage, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_conformance import CheckpointIOConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fulmen_protocols import CheckpointIO

pytestmark = pytest.mark.processes


def _read(options: dict[str, object]) -> Callable[[str], bytes | None]:
    def read(url: str) -> bytes | None:
        fs, path = fsspec.core.url_to_fs(url, **options)
        fs.invalidate_cache()
        return fs.cat_file(path) if fs.isfile(path) else None

    return read


def _write(options: dict[str, object]) -> Callable[[str, bytes], None]:
    def write(url: str, data: bytes) -> None:
        fs, path = fsspec.core.url_to_fs(url, **options)
        fs.pipe_file(path, data)

    return write


@pytest.mark.proves("5.13")
class TestAsyncCheckpointIO(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> Iterator[CheckpointIO]:
        io = AsyncCheckpointIO()
        yield io
        io.teardown()


@pytest.mark.slow
@pytest.mark.proves("5.13")
class TestAsyncShards(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> Iterator[CheckpointIO]:
        io = AsyncCheckpointIO(ShardedCheckpointIO())
        yield io
        io.teardown()


@pytest.mark.slow
class TestAsyncCheckpointIOInMemory(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self) -> Iterator[CheckpointIO]:
        io = AsyncCheckpointIO()
        yield io
        io.teardown()

    @pytest.fixture
    def path(self, memory_folder: str) -> str:
        return f"{memory_folder}/epoch=0-step=1.ckpt"

    @pytest.fixture
    def read_bytes(self) -> Callable[[str], bytes | None]:
        return _read({})

    @pytest.fixture
    def write_bytes(self) -> Callable[[str, bytes], None]:
        return _write({})


@pytest.mark.slow
class TestAsyncCheckpointIOOnS3(CheckpointIOConformance):
    @pytest.fixture
    def checkpoint_io(self, s3_options: dict[str, object]) -> Iterator[CheckpointIO]:
        io = AsyncCheckpointIO(TorchCheckpointIO(FsspecStorage(s3_options)))
        yield io
        io.teardown()

    @pytest.fixture
    def path(self, s3_folder: str) -> str:
        return f"{s3_folder}/epoch=0-step=1.ckpt"

    @pytest.fixture
    def read_bytes(self, s3_options: dict[str, object]) -> Callable[[str], bytes | None]:
        return _read(s3_options)

    @pytest.fixture
    def write_bytes(self, s3_options: dict[str, object]) -> Callable[[str, bytes], None]:
        return _write(s3_options)
