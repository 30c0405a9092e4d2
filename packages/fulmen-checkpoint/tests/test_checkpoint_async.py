"""AsyncCheckpointIO: what is in the file, what waits for what, and where errors come out."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fulmen_checkpoint import AsyncCheckpointIO, FsspecStorage, TorchCheckpointIO
from fulmen_checkpoint.names import is_staging
from fulmen_protocols import CheckpointError, CheckpointUnsafe, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

pytestmark = pytest.mark.proves("5.13")


def _shared() -> list[str]:
    """What is in shared memory, but for the semaphores of other processes' multiprocessing."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-"))


@pytest.fixture
def io() -> Iterator[AsyncCheckpointIO]:
    made = AsyncCheckpointIO()
    yield made
    made.teardown()


class Gated:
    """A checkpoint IO that writes when it is let, and fails where the path says so."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.inner = TorchCheckpointIO()
        self.threads: set[int] = set()

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(30)
        if "bad" in str(path):
            raise CheckpointError(f"{path} is bad")
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        return self.inner.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None: ...


def _children() -> set[int]:
    """Processes that have this one as their parent, dead ones that nobody has reaped included."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.add(int(entry.name))
    return found


def _records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def test_the_file_holds_what_torch_save_writes_record_for_record(io: AsyncCheckpointIO, tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 40)).sum().backward()
    optimizer.step()
    checkpoint = {
        "view": base[10:20],
        "base": base,
        "strided": torch.randn(6, 7).t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "empty": torch.empty(0),
        "kinds": [torch.ones(5, dtype=kind) for kind in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)],
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "plain": {"a": [1, 2.5, "text", None], "long": list(range(1000))},
    }
    io.save_checkpoint(checkpoint, tmp_path / "ours.ckpt")
    io.wait()
    torch.save(checkpoint, tmp_path / "torch.ckpt")
    ours, theirs = _records(tmp_path / "ours.ckpt"), _records(tmp_path / "torch.ckpt")
    for records in (ours, theirs):
        del records[".data/serialization_id"]
    assert ours == theirs
    assert list(ours) == list(theirs)

    TorchCheckpointIO().verify_checkpoint(tmp_path / "ours.ckpt")
    assert TorchCheckpointIO().has_digest(tmp_path / "ours.ckpt")
    loaded = torch.load(tmp_path / "ours.ckpt", weights_only=True, mmap=True)
    assert loaded["view"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()
    assert loaded.pop("plain") == checkpoint.pop("plain")
    del loaded["optimizer_states"], checkpoint["optimizer_states"]
    torch.testing.assert_close(loaded, checkpoint, rtol=0, atol=0)


def test_what_changes_after_save_returns_is_not_in_the_file(io: AsyncCheckpointIO, tmp_path: Path) -> None:
    weight, plain = torch.zeros(200_000), {"n": 0, "list": [0]}
    for trial in range(1, 101):
        weight.fill_(trial)
        plain["n"] = plain["list"][0] = trial  # type: ignore[index]
        io.save_checkpoint({"w": weight, "plain": plain}, tmp_path / f"{trial % 5}.ckpt")
        weight.fill_(-1)
        plain["n"] = plain["list"][0] = -1  # type: ignore[index]
        if trial % 5 == 0:
            for slot in range(5):
                n = trial - 5 + slot if slot else trial
                found = io.load_checkpoint(tmp_path / f"{slot}.ckpt")
                assert torch.equal(found["w"], torch.full((200_000,), float(n)))
                assert found["plain"] == {"n": n, "list": [n]}


def test_the_writer_starts_at_the_first_save_without_torch_and_ends_with_teardown(tmp_path: Path) -> None:
    before, shared = _children(), _shared()
    io = AsyncCheckpointIO()
    assert _children() == before
    for _ in range(2):
        io.save_checkpoint({"w": torch.ones(1000)}, tmp_path / "a.ckpt")
        io.wait()
        [writer] = _children() - before
        maps = Path(f"/proc/{writer}/maps").read_text()
        assert "libtorch" not in maps
        assert "cuda" not in maps
        assert _shared() == shared
        io.teardown()
        assert _children() == before, "the writer is running or a zombie"


def test_an_io_that_is_dropped_ends_its_writer_and_gives_its_memory_back(tmp_path: Path) -> None:
    before = _children()
    io = AsyncCheckpointIO()
    io.save_checkpoint({"w": torch.ones(100_000)}, tmp_path / "a.ckpt")
    del io
    gc.collect()
    assert _children() == before
    assert torch.equal(TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["w"], torch.ones(100_000))
    assert "fulmen-snapshot" not in Path("/proc/self/maps").read_text()


def test_no_more_snapshots_are_held_than_allowed_and_one_more_save_waits(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner, max_pending=1)
    saved: list[int] = []

    def save() -> None:
        for i in range(4):
            io.save_checkpoint({"i": i}, tmp_path / f"{i}.ckpt")
            saved.append(i)

    saver = threading.Thread(target=save)
    saver.start()
    saver.join(1.0)
    assert saved == [0, 1], "one is being written, one waits, and the third save is held up"
    inner.gate.set()
    saver.join(30)
    io.teardown()
    assert saved == [0, 1, 2, 3]
    assert [TorchCheckpointIO().load_checkpoint(tmp_path / f"{i}.ckpt")["i"] for i in range(4)] == [0, 1, 2, 3]


def test_the_memory_of_a_snapshot_is_used_again(io: AsyncCheckpointIO, tmp_path: Path) -> None:
    for n in range(6):
        io.save_checkpoint({"w": torch.full((100_000,), float(n))}, tmp_path / "a.ckpt")
        io.wait()
        inodes = {
            line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "fulmen-snapshot" in line
        }
        assert len(inodes) == 1
        if n == 0:
            first = inodes
    assert inodes == first


def test_an_error_is_raised_at_the_next_save_and_only_once(io: AsyncCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    io.save_checkpoint({"a": 1}, tmp_path / "file" / "bad.ckpt")
    io._courier.drain()
    with pytest.raises(CheckpointError, match=r"bad\.ckpt.*check free space, permissions"):
        io.save_checkpoint({"a": 1}, tmp_path / "good.ckpt")
    io.save_checkpoint({"a": 2}, tmp_path / "good.ckpt")
    io.teardown()
    assert io.load_checkpoint(tmp_path / "good.ckpt") == {"a": 2}


def _error(action: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises(CheckpointError) as raised:
        action()
    return type(raised.value), str(raised.value)


def _save_and_wait(io: AsyncCheckpointIO, path: str) -> None:
    io.save_checkpoint({"a": 1}, path)
    io.wait()


@pytest.mark.parametrize(
    "trouble", ["a file in the way", "a folder in its place", "no bucket", "a folder nobody may make"]
)
def test_an_error_of_the_writing_process_is_word_for_word_that_of_the_synchronous_save(
    tmp_path: Path, s3_options: dict[str, object], trouble: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path, options = {
        "a file in the way": (str(tmp_path / "file" / "a.ckpt"), {}),
        "a folder in its place": (str(tmp_path / "folder"), {}),
        "no bucket": ("s3://there-is-none/a.ckpt", s3_options),
        "a folder nobody may make": ("/proc/fulmen/a.ckpt", {}),
    }[trouble]
    plain = TorchCheckpointIO(FsspecStorage(options))
    io = AsyncCheckpointIO(plain)
    said = _error(lambda: _save_and_wait(io, path))
    assert said == _error(lambda: plain.save_checkpoint({"a": 1}, path))
    assert path in said[1]
    io.teardown()


@pytest.mark.parametrize("listen", ["poll", "wait", "teardown"])
def test_an_error_comes_out_wherever_one_listens_first(tmp_path: Path, listen: str) -> None:
    (tmp_path / "file").touch()
    io = AsyncCheckpointIO()
    for name in ("one", "two"):
        io.save_checkpoint({"a": 1}, tmp_path / "file" / name)
    io._courier.drain()
    with pytest.raises(CheckpointError, match="one") as raised:
        getattr(io, listen)()
    assert any("two" in note for note in raised.value.__notes__), "the second error is lost"
    io.teardown()


def test_an_unsafe_or_unpicklable_object_is_refused_by_the_save_itself(io: AsyncCheckpointIO, tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnsafe, match=r"a\[0\]: function.*allow_unsafe=True"):
        io.save_checkpoint({"a": [test_the_memory_of_a_snapshot_is_used_again]}, tmp_path / "a.ckpt")
    careless = AsyncCheckpointIO(TorchCheckpointIO(allow_unsafe=True))
    with pytest.raises(CheckpointError, match=r"a\.ckpt' was not written: .*cannot be pickled.*Remove it"):
        careless.save_checkpoint({"a": threading.Lock()}, tmp_path / "a.ckpt")
    careless.teardown()
    assert os.listdir(tmp_path) == []


def test_an_old_checkpoint_goes_only_after_the_new_one_is_there(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    inner.inner.save_checkpoint({"a": 0}, tmp_path / "old.ckpt")
    io.save_checkpoint({"a": 1}, tmp_path / "new.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")
    assert io.will_exist(tmp_path / "new.ckpt") is True
    assert io.will_exist(tmp_path / "old.ckpt") is False
    assert io.will_exist(tmp_path / "other.ckpt") is None
    time.sleep(0.1)
    assert os.listdir(tmp_path) == ["old.ckpt"]
    inner.gate.set()
    io.wait()
    assert os.listdir(tmp_path) == ["new.ckpt"]
    io.remove_checkpoint(tmp_path / "new.ckpt")
    assert os.listdir(tmp_path) == [], "with nothing pending it is removed at once"
    io.teardown()


def test_an_old_checkpoint_stays_when_the_new_one_failed(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    inner.inner.save_checkpoint({"a": 0}, tmp_path / "old.ckpt")
    io.save_checkpoint({"a": 1}, tmp_path / "bad.ckpt")
    io.remove_checkpoint(tmp_path / "old.ckpt")
    inner.gate.set()
    io._courier.drain()
    io.remove_checkpoint(tmp_path / "old.ckpt")  # nobody has been told of the failure yet
    with pytest.raises(CheckpointError, match="is bad"):
        io.teardown()
    assert os.listdir(tmp_path) == ["old.ckpt"]


def test_a_thread_writes_what_a_process_cannot_and_that_is_logged_once(
    memory_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, io = _children(), AsyncCheckpointIO()
    with caplog.at_level(logging.INFO, "fulmen_checkpoint"):
        for n in range(2):
            weight = torch.full((1000,), float(n))
            io.save_checkpoint({"w": weight, "same": weight}, f"{memory_folder}/{n}.ckpt")
            weight.fill_(-1)
    io.wait()
    assert _children() == before
    assert len([r for r in caplog.records if "by a thread" in r.message]) == 1
    found = io.load_checkpoint(f"{memory_folder}/1.ckpt")
    assert torch.equal(found["w"], torch.ones(1000))
    assert found["w"].data_ptr() == found["same"].data_ptr()
    io.teardown()


def test_loading_waits_for_the_save_of_what_is_loaded(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner)
    io.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    threading.Timer(0.2, inner.gate.set).start()
    assert io.load_checkpoint(tmp_path / "a.ckpt") == {"a": 1}
    assert inner.threads.isdisjoint({threading.get_ident()})
    io.teardown()


def test_a_writer_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    inner = Gated()
    io = AsyncCheckpointIO(inner, timeout_s=0.3, max_pending=0)
    io.save_checkpoint({"a": 1}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*timeout_s=0\.3.*b\.ckpt' was not saved.*longer timeout_s"):
        io.save_checkpoint({"a": 1}, tmp_path / "b.ckpt")
    inner.gate.set()
    io.teardown()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_pending": -1}, r"max_pending=-1\).*Give the number of snapshots"),
        ({"timeout_s": 0.0}, r"timeout_s=0\.0\).*positive number of seconds"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        AsyncCheckpointIO(**arguments)  # type: ignore[arg-type]


def test_an_io_that_cannot_be_wrapped_is_refused() -> None:
    class Sharded(Gated):
        def save_sharded(self) -> None: ...

    with pytest.raises(MisconfigurationException, match=r"checkpoint_io=AsyncCheckpointIO.*asynchronous itself"):
        AsyncCheckpointIO(AsyncCheckpointIO())
    with pytest.raises(
        MisconfigurationException, match=r"checkpoint_io=Sharded.*written by all ranks.*Use it as it is"
    ):
        AsyncCheckpointIO(Sharded())


def _run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


_EXIT = """
import sys, torch
from fulmen_checkpoint import AsyncCheckpointIO
io = AsyncCheckpointIO()
io.save_checkpoint({"w": torch.ones(3_000_000)}, sys.argv[1])
"""


def test_a_process_that_ends_without_teardown_waits_for_its_saves(tmp_path: Path) -> None:
    done = _run(_EXIT, tmp_path / "a.ckpt")
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(TorchCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["w"], torch.ones(3_000_000))


def test_an_uncaught_error_waits_for_the_saves_too(tmp_path: Path) -> None:
    done = _run(_EXIT + "raise KeyboardInterrupt", tmp_path / "a.ckpt")
    assert "KeyboardInterrupt" in done.stderr
    TorchCheckpointIO().verify_checkpoint(tmp_path / "a.ckpt")


def test_an_error_that_nobody_heard_is_printed_at_exit(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = _run(_EXIT, tmp_path / "file" / "a.ckpt")
    assert "CheckpointError" in done.stderr
    assert "a.ckpt" in done.stderr


def test_a_forked_process_neither_waits_for_nor_ends_its_parents_saves(tmp_path: Path) -> None:
    done = _run(
        _EXIT
        + "import os\npid = os.fork()\nif pid == 0: sys.exit(0)\n"
        + "assert os.waitpid(pid, 0)[1] == 0\nio.wait(); print('ok')",
        tmp_path / "a.ckpt",
    )
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
    assert not any(is_staging(name) for name in os.listdir(tmp_path))
