"""Checksums that are put together from parts, and the zip archive that they stand in."""

from __future__ import annotations

import io
import mmap
import os
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fulmen_checkpoint import TorchCheckpointIO, _archive, _crc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@given(st.binary(max_size=300), st.binary(max_size=3000))
def test_the_checksum_of_two_runs_of_bytes_follows_from_those_of_each(first: bytes, second: bytes) -> None:
    assert _crc.joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
    assert _crc.crc32(second, zlib.crc32(first)) == zlib.crc32(first + second)


def test_a_run_longer_than_any_chunk_counts_as_well() -> None:
    data = bytes(range(256)) * (3 * MIB // 256) + b"end"
    assert _crc.joined(zlib.crc32(data[:5]), zlib.crc32(data[5:]), len(data) - 5) == zlib.crc32(data)


@pytest.mark.parametrize("load", [0.0, 1000.0], ids=["a core is free", "none is"])
@pytest.mark.parametrize("sizes", [[0, 1, 5], [MIB // 4 - 31, 17, MIB // 4 + 3, 1], [9 * MIB // 4 + 1, 3 * MIB // 4]])
def test_every_record_of_a_file_has_the_checksum_that_zip_tools_compute(
    sizes: list[int], load: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    make = torch.Generator().manual_seed(0)
    state = {f"w{i}": torch.randn(size, generator=make) for i, size in enumerate(sizes)}
    TorchCheckpointIO().save_checkpoint({"state_dict": state}, tmp_path / "a.ckpt")

    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None
        stored = {info.filename: info.CRC for info in archive.infolist()}
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    for i, value in enumerate(state.values()):
        assert stored[f"archive/data/{i}"] == zlib.crc32(value.numpy().tobytes())
    TorchCheckpointIO().verify_checkpoint(tmp_path / "a.ckpt")
    mapped: Any = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=True)
    for name, value in state.items():
        assert torch.equal(mapped["state_dict"][name], value)
        # torch maps a storage where it lies: it must be aligned there.
        assert mapped["state_dict"][name].data_ptr() % 64 == 0 or not value.numel()
    assert len(set(offsets.values())) == len(offsets)


def test_many_small_tensors_are_one_file_like_any_other(tmp_path: Path) -> None:
    state = {f"w{i}": torch.full((3,), float(i)) for i in range(3000)}
    TorchCheckpointIO().save_checkpoint(state, tmp_path / "a.ckpt")
    found: Any = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert [value.tolist() for value in found.values()] == [value.tolist() for value in state.values()]


class _Sparse(io.RawIOBase):
    """A file in which zeros take no room."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.zeros = bytes(8 * MIB)

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if size == len(self.zeros) and data == self.zeros:
            self.file.seek(size, 1)
        else:
            self.file.write(data)
        return size


@pytest.mark.slow
def test_records_and_places_beyond_four_gigabytes_are_found(tmp_path: Path) -> None:
    size = 4 << 30
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ) as nothing:

        def storages() -> Iterator[memoryview]:
            with memoryview(nothing) as whole, whole[: size - 8] as longer:
                yield longer
            yield memoryview(b"the last one")

        sink = _Sparse(tmp_path / "a.zip")
        _archive.write(sink, _archive.Parts([("data.pkl", b"pickle")], storages(), [("version", b"3\n")]))  # type: ignore[arg-type]
        sink.file.close()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["archive/data/0"] == size - 8
        assert archive.read("archive/data/1") == b"the last one"
        assert archive.read("archive/version") == b"3\n"
        assert archive.getinfo("archive/data/1").header_offset > 0xFFFFFFFF - 8
    reader = torch._C.PyTorchFileReader(str(tmp_path / "a.zip"))  # what torch.load opens a file with
    assert reader.get_record("data/1") == b"the last one"
