"""A minimal correct checkpoint IO, and broken ones that CheckpointIOConformance must catch."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from fulmen_conformance import CheckpointIOConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fulmen_protocols import CheckpointIO


class Good:
    """A torch file after its SHA-256. The drills replace one of its pieces each."""

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self.write(Path(path), checkpoint)

    def write(self, target: Path, checkpoint: Mapping[str, object]) -> None:
        self.commit(target, self.seal(checkpoint))

    def commit(self, target: Path, content: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(target.name + ".staging")
        staging.write_bytes(content)
        staging.replace(target)

    def seal(self, checkpoint: Mapping[str, object]) -> bytes:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getvalue()
        return hashlib.sha256(content).digest() + content

    def unseal(self, path: str | os.PathLike[str]) -> bytes:
        content = Path(path).read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError(f"{os.fspath(path)} is damaged: its digest differs")
        return content[32:]

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        return self.read(Path(path), map_location or "cpu", weights_only)

    def read(self, source: Path, location: torch.device | str, weights_only: bool | None) -> dict[str, object]:
        content = io.BytesIO(self.unseal(source))
        try:
            return torch.load(content, location, weights_only=weights_only is not False)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{source} holds objects that only code could rebuild") from error

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        pass

    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        self.unseal(path)


class TestGood(CheckpointIOConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return Good()


class Asynchronous(Good):
    """Copies, then writes from a thread."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: list[Future[None]] = []

    def write(self, target: Path, checkpoint: Mapping[str, object]) -> None:
        self.pending.append(self.pool.submit(self.commit, target, self.seal(checkpoint)))

    def write_without_copy(self, target: Path, checkpoint: Mapping[str, object]) -> None:
        """Let the thread write what the tensors have become: for drills."""

        def later() -> None:
            time.sleep(0.1)
            Good.write(self, target, checkpoint)

        self.pending.append(self.pool.submit(later))

    def wait(self) -> None:
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()

    def poll(self) -> None:
        done = [future for future in self.pending if future.done()]
        self.pending = [future for future in self.pending if future not in done]
        for future in done:
            future.result()

    def after_saves(self, action: Callable[[], None]) -> None:
        before = list(self.pending)

        def run() -> None:
            for future in before:
                future.result()
            action()

        self.pending.append(self.pool.submit(run))

    def will_exist(self, path: str | os.PathLike[str]) -> bool | None:
        return None

    def teardown(self) -> None:
        self.wait()


class TestAsynchronous(CheckpointIOConformance):
    caught_by: ClassVar[set[str]] = set()

    @pytest.fixture
    def checkpoint_io(self) -> CheckpointIO:
        return Asynchronous()


def broken(backend: type[Good], *tests: str) -> type[CheckpointIOConformance]:
    """A subclass of the kit for ``backend``, which exactly ``tests`` must catch."""

    class Drill(CheckpointIOConformance):
        caught_by: ClassVar[set[str]] = set(tests)

        @pytest.fixture
        def checkpoint_io(self) -> CheckpointIO:
            return backend()

    return Drill


class HalfPrecision(Good):
    def read(self, source: Path, location: torch.device | str, weights_only: bool | None) -> dict[str, object]:
        loaded = super().read(source, location, weights_only)
        for value in loaded.values():
            if isinstance(value, dict):
                for name, tensor in value.items():
                    if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float64:
                        value[name] = tensor.float()
        return loaded


class SortsKeys(Good):
    def read(self, source: Path, location: torch.device | str, weights_only: bool | None) -> dict[str, object]:
        return dict(sorted(super().read(source, location, weights_only).items()))


class NoDigest(Good):
    def unseal(self, path: str | os.PathLike[str]) -> bytes:
        return Path(path).read_bytes()[32:]


class WritesInPlace(Good):
    def write(self, target: Path, checkpoint: Mapping[str, object]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")
        super().write(target, checkpoint)


class RunsCode(Good):
    def read(self, source: Path, location: torch.device | str, weights_only: bool | None) -> dict[str, object]:
        content = source.read_bytes()
        if content[:2] != b"PK":
            content = self.unseal(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            loaded = torch.load(io.BytesIO(content), location, weights_only=False)
            loaded.pop("x", None)
            return loaded


class NoneMeansCode(Good):
    def read(self, source: Path, location: torch.device | str, weights_only: bool | None) -> dict[str, object]:
        return super().read(source, location, bool(weights_only))


class IgnoresLocation(Good):
    def read(self, source: Path, location: torch.device | str, weights_only: bool | None) -> dict[str, object]:
        return super().read(source, "cpu", weights_only)


class NamelessErrors(Good):
    def unseal(self, path: str | os.PathLike[str]) -> bytes:
        try:
            return super().unseal(path)
        except ValueError:
            raise ValueError("the checkpoint is damaged") from None


class RemovesNeighbours(Good):
    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        for entry in Path(path).parent.glob(Path(path).name + "*"):
            entry.unlink()


class RemoveInsists(Good):
    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink()


class NoParents(Good):
    def commit(self, target: Path, content: bytes) -> None:
        target.write_bytes(content)


class VerifiesByExistence(Good):
    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).read_bytes()


class SavesLater(Asynchronous):
    """No copy is made: the thread writes what the tensors have become."""

    write = Asynchronous.write_without_copy


class SavesShardsLater(Asynchronous):
    """Of what every rank writes no copy is made."""

    def save_sharded(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self.write_without_copy(Path(path), checkpoint)

    def load_sharded(self, path: str | os.PathLike[str], into: Mapping[str, object]) -> dict[str, object]:
        return self.load_checkpoint(path)


class ForgetsToWait(Asynchronous):
    def commit(self, target: Path, content: bytes) -> None:
        time.sleep(0.1)
        super().commit(target, content)

    def wait(self) -> None:
        if self.pending:
            self.pending.pop(0).result()

    def teardown(self) -> None:
        pass


class Overtakes(Asynchronous):
    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPoolExecutor(8)

    def commit(self, target: Path, content: bytes) -> None:
        time.sleep(0.5 if len(content) > 500_000 else 0.0)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f"{target.name}.{threading.get_ident()}")
        staging.write_bytes(content)
        staging.replace(target)


TestHalfPrecision = broken(HalfPrecision, "test_tensors_come_back_bit_for_bit")
TestSortsKeys = broken(SortsKeys, "test_plain_values_come_back_as_they_were")
TestNoDigest = broken(
    NoDigest,
    "test_a_cut_off_file_is_named_as_damaged",
    "test_a_flipped_bit_is_never_loaded",
    "test_verification_knows_whole_from_damaged_and_missing",
)
TestWritesInPlace = broken(
    WritesInPlace, "test_a_failed_save_keeps_the_old_checkpoint", "test_a_failed_save_leaves_no_rubbish"
)
TestRunsCode = broken(RunsCode, "test_code_in_a_file_is_not_run", "test_objects_need_an_explicit_weights_only_false")
TestNoneMeansCode = broken(NoneMeansCode, "test_objects_need_an_explicit_weights_only_false")
TestIgnoresLocation = broken(IgnoresLocation, "test_tensors_are_loaded_to_the_cpu_or_where_they_are_wanted")
TestNamelessErrors = broken(
    NamelessErrors,
    "test_a_cut_off_file_is_named_as_damaged",
    "test_a_flipped_bit_is_never_loaded",
    "test_verification_knows_whole_from_damaged_and_missing",
)
TestRemovesNeighbours = broken(RemovesNeighbours, "test_removing_a_checkpoint_removes_it_alone")
TestRemoveInsists = broken(
    RemoveInsists, "test_removing_what_is_not_there_is_allowed", "test_a_path_object_means_the_same_as_its_text"
)
TestSavesShardsLater = broken(
    SavesShardsLater, "test_an_asynchronous_save_of_every_rank_holds_the_values_of_the_moment"
)
TestNoParents = broken(NoParents, "test_parent_folders_are_made")
TestVerifiesByExistence = broken(VerifiesByExistence, "test_verification_knows_whole_from_damaged_and_missing")
TestSavesLater = broken(SavesLater, "test_it_saves_the_values_of_the_moment")
TestForgetsToWait = broken(
    ForgetsToWait,
    "test_waiting_makes_every_asynchronous_save_visible",
    "test_teardown_finishes_every_save_and_can_be_called_twice",
    "test_the_last_of_many_saves_to_one_path_wins",
)
TestOvertakes = broken(Overtakes, "test_the_last_of_many_saves_to_one_path_wins")
