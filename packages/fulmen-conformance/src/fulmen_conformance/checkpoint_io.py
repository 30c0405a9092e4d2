"""The kit for checkpoint IOs."""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch

from fulmen_conformance._kit import Kit, need
from fulmen_conformance._reference import adam, batches, equal_bits, plain_training, tiny_net
from fulmen_protocols import (
    CheckpointIO,
    SupportsAsyncSave,
    SupportsShardedSave,
    SupportsVerification,
    missing_members,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_conformance._reference import Batch

__all__ = ["CheckpointIOConformance"]


class CheckpointIOConformance(Kit):
    """Proves a ``CheckpointIO``.

    Give the fixture ``checkpoint_io``. Where checkpoints are not local files or folders also give ``path`` and the raw
    reader and writer ``read_bytes`` and ``write_bytes``, which must not use the backend.
    """

    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        """The checkpoint IO under test, new for each test."""
        raise NotImplementedError("define a fixture `checkpoint_io` that returns the checkpoint IO under test")

    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        """Where a checkpoint goes; nothing is there yet. Default: a file in a local folder that holds nothing else."""
        (tmp_path / "run").mkdir()
        return str(tmp_path / "run" / "epoch=0-step=1.ckpt")

    @pytest.fixture
    def read_bytes(self) -> Callable[[str], bytes | None]:
        """A raw reader: the bytes at a path (of a folder: those of its largest file), None if nothing is there."""
        return _read_local

    @pytest.fixture
    def write_bytes(self) -> Callable[[str, bytes], None]:
        """A raw writer: replaces the bytes at a path (of a folder: those of its largest file)."""
        return _write_local

    def test_it_has_every_member_of_the_protocol(self, checkpoint_io: CheckpointIO) -> None:
        """``CheckpointIO`` has no optional member. On failure look at the methods listed as missing."""
        assert missing_members(CheckpointIO, checkpoint_io) == []

    def test_tensors_come_back_bit_for_bit(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """All dtypes, NaN, -0.0, views, scalars, empties. On failure look at conversions on the way (numpy, text)."""
        tensors = _tensors()

        _save(checkpoint_io, {"state_dict": tensors}, path)
        loaded = cast("dict[str, torch.Tensor]", checkpoint_io.load_checkpoint(path)["state_dict"])

        assert isinstance(loaded, dict)
        assert list(loaded) == list(tensors)
        for name, expected in tensors.items():
            assert equal_bits(loaded[name], expected), f"{name} was saved as {expected} and came back as {loaded[name]}"

    def test_plain_values_come_back_as_they_were(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """Nested dicts and lists, numbers, text, None; order and types kept. On failure look for JSON-like detours."""
        values = _plain_values()

        _save(checkpoint_io, values, path)
        loaded = checkpoint_io.load_checkpoint(path)

        assert list(loaded) == list(values), "the order of keys is kept"
        for key, expected in values.items():
            assert loaded[key] == expected, f"{key} was {expected!r} and came back as {loaded[key]!r}"
            assert type(loaded[key]) is type(expected), f"{key} was {expected!r} and came back as {loaded[key]!r}"

    def test_a_loaded_run_goes_on_as_if_it_had_never_stopped(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """Stopped and resumed, against plain PyTorch with Adam. On failure look at optimizer state: keys, dtypes."""
        data = batches(6)
        uninterrupted = plain_training(tiny_net(), adam, data)
        first = tiny_net()
        optimizer = adam(first.parameters())
        _steps(first, optimizer, data[:3])

        _save(checkpoint_io, {"state_dict": first.state_dict(), "optimizer_states": [optimizer.state_dict()]}, path)
        loaded = checkpoint_io.load_checkpoint(path)
        second = tiny_net(seed=1)
        optimizer = adam(second.parameters())
        second.load_state_dict(cast("dict[str, torch.Tensor]", loaded["state_dict"]))
        optimizer.load_state_dict(cast("list[dict[str, object]]", loaded["optimizer_states"])[0])
        _steps(second, optimizer, data[3:])

        for name, value in uninterrupted.state_dict().items():
            assert equal_bits(second.state_dict()[name], value), name

    def test_something_is_really_written(
        self, checkpoint_io: CheckpointIO, path: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """Judged by the raw reader, not by loading. On failure look at where ``save_checkpoint`` writes."""
        marker = torch.arange(64, dtype=torch.float64)

        _save(checkpoint_io, {"state_dict": {"w": marker}}, path)

        found = read_bytes(path)
        assert found is not None, f"nothing is at {path}"
        assert len(found) >= marker.nbytes

    def test_it_saves_the_values_of_the_moment(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """Training goes on while a save is under way. On failure copy tensors before ``save_checkpoint`` returns."""
        weight = torch.zeros(1000)

        checkpoint_io.save_checkpoint({"w": weight}, path)
        weight.fill_(1.0)
        _wait(checkpoint_io)

        loaded = checkpoint_io.load_checkpoint(path)["w"]
        assert isinstance(loaded, torch.Tensor)
        assert loaded.sum() == 0

    def test_tensors_are_loaded_to_the_cpu_or_where_they_are_wanted(
        self, checkpoint_io: CheckpointIO, path: str
    ) -> None:
        """On failure look at ``map_location``: None means CPU; a device or its name is obeyed."""
        _save(checkpoint_io, {"w": torch.ones(3)}, path)

        for location in (None, "cpu", torch.device("cpu")):
            loaded = checkpoint_io.load_checkpoint(path, map_location=location)["w"]
            assert isinstance(loaded, torch.Tensor)
            assert loaded.device == torch.device("cpu")
        elsewhere = checkpoint_io.load_checkpoint(path, map_location="meta")["w"]
        assert isinstance(elsewhere, torch.Tensor)
        assert elsewhere.device.type == "meta"

    def test_saving_again_replaces_the_old_checkpoint(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """``last.ckpt`` is written over and over. On failure look for parts of the old one that stay or win."""
        _save(checkpoint_io, {"a": torch.zeros(1000), "old": 1}, path)

        _save(checkpoint_io, {"a": torch.ones(2)}, path)

        loaded = checkpoint_io.load_checkpoint(path)
        assert list(loaded) == ["a"]
        assert isinstance(loaded["a"], torch.Tensor)
        assert loaded["a"].tolist() == [1.0, 1.0]

    def test_a_failed_save_keeps_the_old_checkpoint(
        self, checkpoint_io: CheckpointIO, path: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """A value that cannot be written, after some that can. On failure look for a target opened too early."""
        _save(checkpoint_io, {"w": torch.zeros(10_000)}, path)
        before = read_bytes(path)

        with pytest.raises(Exception, match=r".") as caught:
            _save(checkpoint_io, {"w": torch.ones(10_000), "bomb": _Unwritable()}, path)

        assert not isinstance(caught.value, pytest.fail.Exception)
        assert read_bytes(path) == before
        loaded = checkpoint_io.load_checkpoint(path)["w"]
        assert isinstance(loaded, torch.Tensor)
        assert loaded.sum() == 0

    def test_a_failed_save_leaves_no_rubbish(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """Staging files of failed saves would fill the disk. On failure look at the clean-up of ``save_checkpoint``."""
        folder = Path(path).parent
        if not folder.is_dir():
            pytest.skip("the folder of `path` is not a local one")

        with pytest.raises(Exception, match=r"."):
            _save(checkpoint_io, {"w": torch.ones(10_000), "bomb": _Unwritable()}, path)

        assert [entry.name for entry in folder.iterdir()] == []

    def test_loading_what_is_not_there_is_a_file_not_found_error(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """On failure look at ``load_checkpoint``: type of the error, and whether it names the path."""
        with pytest.raises(FileNotFoundError) as caught:
            checkpoint_io.load_checkpoint(path)

        assert Path(path).name in str(caught.value)

    @pytest.mark.parametrize("weights_only", [None, True])
    def test_code_in_a_file_is_not_run(
        self,
        checkpoint_io: CheckpointIO,
        path: str,
        write_bytes: Callable[[str, bytes], None],
        tmp_path: Path,
        weights_only: bool | None,
    ) -> None:
        """A hostile pickle at the path. On failure look for ``weights_only=False`` or ``pickle.load`` in the reader."""
        marker, hostile = tmp_path / "code-was-run", io.BytesIO()
        torch.save({"state_dict": {"w": torch.ones(2)}, "x": _RunsCode(str(marker))}, hostile)
        _save(checkpoint_io, {"state_dict": {"w": torch.ones(2)}}, path)
        write_bytes(path, hostile.getvalue())

        with pytest.raises(ValueError, match=r"."):
            checkpoint_io.load_checkpoint(path, weights_only=weights_only)

        assert not marker.exists(), "the file's code was run"

    def test_objects_need_an_explicit_weights_only_false(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """An object of a class of ours. On failure look at what None means: it is True, always."""
        try:
            _save(checkpoint_io, {"x": _Opaque(5)}, path)
        except (TypeError, ValueError):
            return  # a format may refuse objects on the way in

        for weights_only in (None, True):
            with pytest.raises(ValueError, match=r"."):
                checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        try:
            loaded = checkpoint_io.load_checkpoint(path, weights_only=False)["x"]
        except ValueError:
            return  # a format may refuse to run code at all
        assert isinstance(loaded, _Opaque)
        assert loaded.value == 5

    def test_a_cut_off_file_is_named_as_damaged(
        self,
        checkpoint_io: CheckpointIO,
        path: str,
        read_bytes: Callable[[str], bytes | None],
        write_bytes: Callable[[str, bytes], None],
    ) -> None:
        """A full disk, a broken copy. On failure look at errors of the format's reader: make them ``ValueError``."""
        _save(checkpoint_io, {"w": torch.ones(1000)}, path)
        whole = read_bytes(path)
        assert whole is not None

        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            write_bytes(path, whole[:length])
            with pytest.raises(ValueError, match=r".") as caught:
                checkpoint_io.load_checkpoint(path)
            assert Path(path).name in str(caught.value), f"the message should name the file: {caught.value}"

    def test_a_flipped_bit_is_never_loaded(
        self,
        checkpoint_io: CheckpointIO,
        path: str,
        read_bytes: Callable[[str], bytes | None],
        write_bytes: Callable[[str, bytes], None],
    ) -> None:
        """Anywhere in the file: an error that names it, or exactly what was saved. On failure look at the checksum."""
        tensor = torch.linspace(-1, 1, 1000, dtype=torch.float64)
        _save(checkpoint_io, {"w": tensor, "step": 123456789}, path)
        whole = read_bytes(path)
        assert whole is not None

        for position in range(0, len(whole), max(1, len(whole) // 40)):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            write_bytes(path, bytes(damaged))
            try:
                loaded = checkpoint_io.load_checkpoint(path)
            except ValueError as error:
                if Path(path).name not in str(error):
                    pytest.fail(f"the message should name the file: {error}")
                continue
            weight = loaded["w"]
            assert isinstance(weight, torch.Tensor)
            assert equal_bits(weight, tensor), f"a bit flipped at byte {position} of {len(whole)} was loaded"
            assert loaded["step"] == 123456789, f"a bit flipped at byte {position} of {len(whole)} was loaded"

    def test_removing_a_checkpoint_removes_it_alone(
        self, checkpoint_io: CheckpointIO, path: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """Retention deletes one of many. On failure look at prefixes and at leftovers beside the file."""
        neighbour = path + ".neighbour"
        _save(checkpoint_io, {"a": 1}, path)
        _save(checkpoint_io, {"a": 2}, neighbour)

        checkpoint_io.remove_checkpoint(path)

        assert read_bytes(path) is None
        with pytest.raises(FileNotFoundError):
            checkpoint_io.load_checkpoint(path)
        assert checkpoint_io.load_checkpoint(neighbour) == {"a": 2}

    def test_removing_what_is_not_there_is_allowed(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """On failure look at ``remove_checkpoint`` for a missing path."""
        checkpoint_io.remove_checkpoint(path)

    def test_parent_folders_are_made(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """Nobody calls mkdir. On failure look at ``save_checkpoint`` for a path in folders that are not there."""
        deep = f"{path}-folder/deeper/x.ckpt"

        _save(checkpoint_io, {"a": 1}, deep)

        assert checkpoint_io.load_checkpoint(deep) == {"a": 1}

    def test_a_path_object_means_the_same_as_its_text(self, checkpoint_io: CheckpointIO, tmp_path: Path) -> None:
        """On failure look for string methods used on ``path``."""
        target = tmp_path / "other.ckpt"

        _save(checkpoint_io, {"a": 1}, target)

        assert checkpoint_io.load_checkpoint(str(target)) == checkpoint_io.load_checkpoint(target) == {"a": 1}
        checkpoint_io.remove_checkpoint(target)
        checkpoint_io.remove_checkpoint(target)

    def test_teardown_finishes_every_save_and_can_be_called_twice(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """The end of a run. On failure look at threads that ``teardown`` does not join, or joins twice."""
        checkpoint_io.save_checkpoint({"w": torch.ones(100_000)}, path)

        checkpoint_io.teardown()
        checkpoint_io.teardown()

        loaded = checkpoint_io.load_checkpoint(path)["w"]
        assert isinstance(loaded, torch.Tensor)
        assert loaded.sum() == 100_000

    def test_verification_knows_whole_from_damaged_and_missing(
        self,
        checkpoint_io: CheckpointIO,
        path: str,
        read_bytes: Callable[[str], bytes | None],
        write_bytes: Callable[[str, bytes], None],
    ) -> None:
        """On failure look at ``verify_checkpoint``: it compares every byte, and says which file is damaged."""
        need(checkpoint_io, SupportsVerification)
        assert isinstance(checkpoint_io, SupportsVerification)
        with pytest.raises(FileNotFoundError):
            checkpoint_io.verify_checkpoint(path)
        _save(checkpoint_io, {"w": torch.ones(1000)}, path)
        whole = read_bytes(path)
        assert whole is not None

        checkpoint_io.verify_checkpoint(path)

        # A tensor fills the middle of the file in every format.
        damaged = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
        for content in (whole[: len(whole) // 2], damaged):
            write_bytes(path, content)
            with pytest.raises(ValueError, match=r".") as caught:
                checkpoint_io.verify_checkpoint(path)
            assert Path(path).name in str(caught.value)

    def test_waiting_makes_every_asynchronous_save_visible(
        self, checkpoint_io: CheckpointIO, path: str, read_bytes: Callable[[str], bytes | None]
    ) -> None:
        """On failure look at ``wait``: does it wait for the last save only?"""
        need(checkpoint_io, SupportsAsyncSave)
        assert isinstance(checkpoint_io, SupportsAsyncSave)
        for i in range(4):
            checkpoint_io.save_checkpoint({"i": i, "w": torch.full((50_000,), float(i))}, f"{path}{i}")

        checkpoint_io.wait()

        assert all(read_bytes(f"{path}{i}") is not None for i in range(4))
        assert [checkpoint_io.load_checkpoint(f"{path}{i}")["i"] for i in range(4)] == [0, 1, 2, 3]

    def test_an_asynchronous_save_of_every_rank_holds_the_values_of_the_moment(
        self, checkpoint_io: CheckpointIO, path: str
    ) -> None:
        """On failure look at what ``save_sharded`` still reads when it has returned, and at ``wait``."""
        need(checkpoint_io, SupportsAsyncSave)
        need(checkpoint_io, SupportsShardedSave)
        assert isinstance(checkpoint_io, SupportsAsyncSave)
        assert isinstance(checkpoint_io, SupportsShardedSave)
        weight, plain = torch.ones(200_000), [1, 2]
        for i in range(2):
            checkpoint_io.save_sharded({"state_dict": {"w": weight.add_(i)}, "plain": plain}, path)
            plain.append(3)
        weight.zero_()

        checkpoint_io.wait()

        loaded = checkpoint_io.load_checkpoint(path)
        assert loaded["plain"] == [1, 2, 3]
        state = cast("dict[str, torch.Tensor]", loaded["state_dict"])
        assert equal_bits(state["w"], torch.full((200_000,), 2.0))

    def test_the_last_of_many_saves_to_one_path_wins(self, checkpoint_io: CheckpointIO, path: str) -> None:
        """``last.ckpt`` again, faster than the disk. On failure look at saves that overtake each other."""
        for i in range(5):
            checkpoint_io.save_checkpoint({"i": i, "w": torch.zeros(200_000 if i == 0 else 10)}, path)

        _wait(checkpoint_io)

        assert checkpoint_io.load_checkpoint(path)["i"] == 4


class _Unwritable:
    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        raise TypeError("this object cannot be written")


class _Opaque:
    def __init__(self, value: int) -> None:
        self.value = value


class _RunsCode:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.marker, "w")


def _wait(checkpoint_io: CheckpointIO) -> None:
    if isinstance(checkpoint_io, SupportsAsyncSave):
        checkpoint_io.wait()


def _save(checkpoint_io: CheckpointIO, checkpoint: dict[str, object], path: str | Path) -> None:
    checkpoint_io.save_checkpoint(checkpoint, path)
    _wait(checkpoint_io)


def _steps(module: torch.nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(x), y).backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()


def _tensors() -> dict[str, torch.Tensor]:
    dtypes = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    ]  # fmt: skip
    tensors = {f"w.{str(dtype).removeprefix('torch.')}": torch.arange(-3, 4).to(dtype) for dtype in dtypes}
    grid = torch.arange(12.0).reshape(3, 4)
    return tensors | {
        "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": grid.t(),
        "every other": grid[:, ::2],
        "shared": grid,
        "shared again": grid[1:],
    }


def _plain_values() -> dict[str, object]:
    return {
        "z": 1,
        "epoch": 3,
        "big": 2**70,
        "loss": 0.1,
        "infinite": math.inf,
        "flag": True,
        "nothing": None,
        "text": "größe\nline",
        "list": [1, "two", [3.0, None]],
        "tuple": (1, 2),
        "nested": {"b": {"a": [1]}, 5: "int key"},
        "ordered": OrderedDict(b=1, a=2),
        "bytes": b"\x00\xff",
    }


def _largest_file(path: Path) -> Path:
    if path.is_dir():
        return max((p for p in sorted(path.rglob("*")) if p.is_file()), key=lambda p: p.stat().st_size)
    return path


def _read_local(path: str) -> bytes | None:
    file = Path(path)
    return _largest_file(file).read_bytes() if file.exists() else None


def _write_local(path: str, content: bytes) -> None:
    _largest_file(Path(path)).write_bytes(content)
