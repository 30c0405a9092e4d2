"""AsyncCheckpointIO: training goes on while another process writes the checkpoint."""

from __future__ import annotations

import logging
import os
import pickle
import weakref
from functools import partial
from typing import TYPE_CHECKING, cast

from fulmen_checkpoint import _snapshot
from fulmen_checkpoint._background_shards import BackgroundShards, Meeting, Target
from fulmen_checkpoint._courier import Courier, Save
from fulmen_checkpoint._writer_main import Request
from fulmen_checkpoint._writer_process import WriterProcess, place_of
from fulmen_checkpoint.serializers import pack
from fulmen_checkpoint.sharded import ShardedCheckpointIO
from fulmen_checkpoint.storage import FsspecStorage, local_path
from fulmen_checkpoint.torch_io import TorchCheckpointIO, require_plain
from fulmen_protocols import MisconfigurationException, SupportsVerification
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from fulmen_checkpoint._snapshot import Snapshot
    from fulmen_checkpoint._writer_main import Place
    from fulmen_protocols import CheckpointIO
    from fulmen_protocols.storage import Storage

__all__ = ["AsyncCheckpointIO"]

_log = logging.getLogger("fulmen_checkpoint")


class AsyncCheckpointIO:
    """A checkpoint IO, wrapped so that saving takes the time of a copy in memory. Satisfies ``CheckpointIO``.

    ``save_checkpoint`` pickles the structure and copies the tensors into memory that is reused from save to save;
    whatever changes after it returns is not in the file. The file is written, with the commit and the digest of
    ``TorchCheckpointIO``, by a process of its own that starts at the first save, so that training shares no
    interpreter lock with it. Only what a process cannot do is done by a thread, and logged: other storages than local
    folders and object stores (``memory://`` lives in one process), other wrapped IOs, Windows.

    Around a ``ShardedCheckpointIO`` it is an IO that all ranks write: ``save_sharded`` copies this rank's pieces, and
    the folder becomes a checkpoint when all ranks have written theirs. The ranks meet over gloo groups of their own,
    made at the first save. An error, or the end, of one rank is told to all.

    An error of a save is raised by the next ``save_checkpoint``, ``poll``, ``wait`` or ``teardown``, whichever comes
    first, and printed at exit if none does. What is removed meanwhile goes only after the saves before it are visible,
    and stays if one of them failed. Killing the training process leaves either the old checkpoint or the new one, as
    does killing the writer, whose work another one does again.

    Args:
        checkpoint_io: reads and removes, and says how to write; None: that of the strategy, or ``TorchCheckpointIO``.
        max_pending: how many snapshots may wait while another one is written; one more save waits for them. Each takes
            the memory of a checkpoint, from the moment it is first needed until ``teardown``.
        timeout_s: seconds to wait for pending saves, at a save, at the end of a fit and at exit, before giving them up.

    Raises:
        MisconfigurationException: an argument is out of range, or ``checkpoint_io`` cannot be wrapped.
    """

    def __init__(
        self, checkpoint_io: CheckpointIO | None = None, *, max_pending: int = 1, timeout_s: float = 1800.0
    ) -> None:
        if max_pending < 0:
            raise MisconfigurationException(
                f"AsyncCheckpointIO(max_pending={max_pending!r}) is negative. Give the number of snapshots that may "
                "wait; 0 lets every save wait for the one before it."
            )
        if not timeout_s > 0:
            raise MisconfigurationException(
                f"AsyncCheckpointIO(timeout_s={timeout_s!r}) leaves no time. Give a positive number of seconds."
            )
        self._process = process = WriterProcess()
        self._meeting = meeting = Meeting(timeout_s)
        self._courier = courier = Courier(max_pending + 1, timeout_s, partial(_give_up, process, meeting))
        self._shards = BackgroundShards(courier, process, meeting)
        self._inner: CheckpointIO | None = None
        self.checkpoint_io = checkpoint_io
        self._told: set[str] = set()
        # At exit too, when nobody has called teardown.
        self._end = weakref.finalize(self, _finish, courier, process, meeting)

    @property
    def checkpoint_io(self) -> CheckpointIO | None:
        """What is wrapped; None until it is known."""
        return self._inner

    @checkpoint_io.setter
    def checkpoint_io(self, value: CheckpointIO | None) -> None:
        by_all_ranks = type(value) is ShardedCheckpointIO  # a subclass may write something else
        if isinstance(value, AsyncCheckpointIO) or (hasattr(value, "save_sharded") and not by_all_ranks):
            what = "is asynchronous itself"
            if not isinstance(value, AsyncCheckpointIO):
                what = "is written by all ranks, in a way that only it knows"
            raise MisconfigurationException(
                f"AsyncCheckpointIO(checkpoint_io={type(value).__name__}(...)): it {what}. Use it as it is, or wrap an "
                "IO that one process writes, such as TorchCheckpointIO(), or ShardedCheckpointIO()."
            )
        self._inner = value
        # An ability that is there only with an IO that has it: who saves asks for it.
        for name in ("save_sharded", "load_sharded"):
            vars(self).pop(name, None)
        if by_all_ranks:
            self.save_sharded = self._save_sharded
            self.load_sharded = self._load_sharded

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Take a snapshot of ``checkpoint`` and return; it becomes visible at ``path`` in one step, or not at all.

        Waits first if as many snapshots as allowed are pending.

        Raises:
            CheckpointUnsafe: an object in it could not be loaded safely; the message names its place.
            CheckpointError: an earlier save failed, or there is no memory for the snapshot.
        """
        target, inner = os.fspath(path), self._wrapped()
        if type(inner) is ShardedCheckpointIO:
            self._shards.save(checkpoint, self._target(inner, target, storage_options), None, alone=True)
            return
        self._courier.poll()
        checkpoint = pack(checkpoint)
        own = _writes_torch_files(inner)
        if own and not cast("TorchCheckpointIO", inner).allow_unsafe:
            require_plain(checkpoint, target)
        try:
            source = _snapshot.pickled(checkpoint)
        except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
            raise CheckpointError(
                f"the checkpoint {target!r} was not written: an object in it cannot be pickled: {error}. "
                "Remove it, or store plain data in its place."
            ) from error
        buffer = self._courier.take_buffer(source.size, target)
        try:
            snapshot = _snapshot.take(source, buffer)
        except BaseException:
            self._courier.give_back(buffer)
            raise
        place = _place(cast("TorchCheckpointIO", inner).storage, target, storage_options) if own else None
        if place is not None:
            request = Request(place, snapshot.pickle, snapshot.storages, _snapshot.frame())
            run = partial(_write_by_process, self._process, snapshot, request)
        else:
            self._tell_of_thread(inner, target)
            run = partial(_write_by_thread, inner, snapshot, target, storage_options)
        self._courier.submit(Save(_name(target), run, buffer))

    def _save_sharded(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """``save_sharded``: as ``save_checkpoint``, of every rank its part; every rank must call it.

        Raises:
            CheckpointUnsafe: an object in it is neither a tensor nor plain data.
            CheckpointError: an earlier save failed, or there is no memory for the snapshot, on any rank.
        """
        inner = cast("ShardedCheckpointIO", self._wrapped())
        self._shards.save(checkpoint, self._target(inner, os.fspath(path), storage_options), inner.process_group)

    def _load_sharded(self, path: str | os.PathLike[str], into: Mapping[str, object]) -> dict[str, object]:
        """``load_sharded``: that of the wrapped IO, when no save is pending any more."""
        self._courier.drain()
        return cast("ShardedCheckpointIO", self._wrapped()).load_sharded(path, into)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read a checkpoint when no save is pending any more. Raises what the wrapped IO raises."""
        self._courier.drain()
        return self._wrapped().load_checkpoint(path, map_location, weights_only)

    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Return if the checkpoint is whole, when no save is pending any more; loads it if the wrapped IO must."""
        self._courier.drain()
        inner = self._wrapped()
        if isinstance(inner, SupportsVerification):
            inner.verify_checkpoint(path)
        else:
            inner.load_checkpoint(path, "meta", None)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint once every save so far is visible; it stays if one of them failed."""
        target = os.fspath(path)
        self.after_saves(partial(self._wrapped().remove_checkpoint, target), removes=_name(target))

    def after_saves(self, action: Callable[[], None], *, removes: str | None = None) -> None:
        """Run ``action`` when every save so far is visible: at once if all are, never if one of them failed.

        It may run in another thread. ``removes`` is the path that it deletes, if it does.
        """
        self._courier.after_saves(action, removes)

    def will_exist(self, path: str | os.PathLike[str]) -> bool | None:
        """Whether a pending save makes ``path`` (True) or a pending removal deletes it (False); None: neither."""
        return self._courier.will_exist(_name(os.fspath(path)))

    def poll(self) -> None:
        """Raise the first error of a save that has not been raised yet; waits for nothing."""
        self._courier.poll()

    def wait(self) -> None:
        """Return when every save so far is visible; raises the first error of any of them."""
        self._courier.drain()
        self._courier.poll()

    def teardown(self) -> None:
        """Wait, end the writing process and give the memory back. Calling it twice is allowed; saving again too.

        Raises:
            CheckpointError: a save failed, or did not get done within ``timeout_s``.
        """
        _finish(self._courier, self._process, self._meeting)

    def _wrapped(self) -> CheckpointIO:
        if self._inner is None:
            self._inner = TorchCheckpointIO()
        return self._inner

    def _target(self, inner: ShardedCheckpointIO, folder: str, storage_options: Mapping[str, object] | None) -> Target:
        if _place(inner.storage, folder, storage_options) is None:
            self._tell_of_thread(inner, folder)
        storage = inner.storage if storage_options is None else FsspecStorage(storage_options)
        return Target(folder, _name(folder), storage)

    def _tell_of_thread(self, inner: CheckpointIO, target: str) -> None:
        what = target.partition("://")[0] if "://" in target else type(inner).__name__
        if what not in self._told:
            self._told.add(what)
            _log.info(
                "AsyncCheckpointIO writes %r by a thread: another process cannot write it. Training and writing share "
                "the interpreter lock.",
                target,
            )


def _writes_torch_files(inner: CheckpointIO) -> bool:
    return type(inner) is TorchCheckpointIO  # a subclass may write something else


def _name(target: str) -> str:
    return local_path(target) or target


def _write_by_process(process: WriterProcess, snapshot: Snapshot, request: Request) -> None:
    snapshot.wait()
    assert snapshot.buffer.handle is not None
    error = process.write(request, snapshot.buffer.handle).error
    if error is not None:
        raise error


def _write_by_thread(
    inner: CheckpointIO, snapshot: Snapshot, target: str, storage_options: Mapping[str, object] | None
) -> None:
    snapshot.wait()
    inner.save_checkpoint(_snapshot.rebuild(snapshot), target, storage_options)


def _place(storage: Storage, target: str, storage_options: Mapping[str, object] | None) -> Place | None:
    """Where another process can write; None if it could not reach the same storage."""
    if storage_options is not None and type(storage) is FsspecStorage:
        storage = FsspecStorage(storage_options)
    return place_of(target, storage)


def _give_up(process: WriterProcess, meeting: Meeting) -> None:
    meeting.give_up()
    process.kill()


def _finish(courier: Courier, process: WriterProcess, meeting: Meeting) -> None:
    try:
        courier.stop()
    finally:
        process.close()
        meeting.close()
    courier.poll()
