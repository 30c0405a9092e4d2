"""Folders of shards in the background: every rank copies its pieces and goes on; the ranks meet again to commit."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

from fulmen_checkpoint import _shard_file, _snapshot
from fulmen_checkpoint._courier import Save as QueuedSave
from fulmen_checkpoint._host_copies import HostCopies, padded
from fulmen_checkpoint._ranks import Ranks
from fulmen_checkpoint._shard_file import Record
from fulmen_checkpoint._shards import Content, Plan, Save, Share, agree, new_token, take_apart
from fulmen_checkpoint._writer_main import ShardRequest
from fulmen_checkpoint._writer_process import place_of
from fulmen_checkpoint.serializers import pack
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor
    from torch.distributed.checkpoint.planner import SavePlan

    from fulmen_checkpoint._buffer import Buffer
    from fulmen_checkpoint._courier import Courier
    from fulmen_checkpoint._shard_file import Written
    from fulmen_checkpoint._writer_process import WriterProcess
    from fulmen_protocols.storage import Storage

__all__ = ["BackgroundShards", "Meeting", "Target"]

_GRACE_S = 60.0
"""A rank that waits ``timeout_s`` for its storage still gets to tell the others."""


class Meeting:
    """The ranks twice, by sockets of their own: for the calling threads, and for the threads in the background."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s + _GRACE_S)
        self._of: tuple[object, object] | None = None
        self._opened: list[Ranks] = []
        self.front = self.back = Ranks.alone()

    def is_of(self, group: dist.ProcessGroup | None) -> bool:
        """Whether it is that of ``group``; not after ``close``, nor when torch's communication has begun anew since."""
        return self._of is not None and self._of == (_world(), group)

    def open(self, group: dist.ProcessGroup | None) -> None:
        """Meet for the first time; every rank must call it."""
        self.close()
        self._of = (_world(), group)
        if Ranks(group).size > 1:
            self.front, self.back = self._new(group), self._new(group)

    def renew(self, group: dist.ProcessGroup | None) -> None:
        """Meet again in the background, where some rank has lost the others; every rank must call it."""
        self.back = self._new(group)

    def give_up(self) -> None:
        """Leave what is going on in the background: the others wait for this rank in vain, and learn it in time."""
        if self.back.size > 1:
            self.back.lost = "this rank has waited long enough for its storage"

    def close(self) -> None:
        """Leave for good; calling it twice is allowed, and so is opening again."""
        for ranks in self._opened:
            ranks.leave()
        self._opened.clear()
        self._of = None
        self.front = self.back = Ranks.alone()

    def _new(self, group: dist.ProcessGroup | None) -> Ranks:
        made = Ranks.apart(group, self._timeout)
        self._opened.append(made)
        return made


def _world() -> object:
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


class Target(NamedTuple):
    """Where a checkpoint goes."""

    folder: str
    name: str
    """What it is asked for by: the absolute path, if it is on this machine."""
    storage: Storage


class _Word:
    """What a rank says at the beginning of a save."""

    def __init__(
        self, failed: bool, lost: bool = False, fits: bool = False, token: str = "", share: Share | None = None
    ) -> None:
        self.failed = failed
        """An earlier save has, and nobody has been told."""
        self.lost = lost
        """The others, in the background."""
        self.fits = fits
        """The plan of the last save does."""
        self.token = token
        self.share = share

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "share": None}  # which the others need only if it does not fit


class _Last(NamedTuple):
    """What the last save wrote; its plan is good for the next if all ranks have the same pieces again."""

    ranks: int
    names: list[str]
    pieces: SavePlan
    plan: Plan

    def fits(self, share: Share, ranks: Ranks) -> bool:
        """Whether ``share`` has the same pieces."""
        return (self.ranks, self.names, self.pieces) == (ranks.size, share.names, share.plan)


class _Snapshot(NamedTuple):
    """The pieces that a rank writes, as they were."""

    buffer: Buffer
    pieces: list[Tensor]
    spans: list[tuple[int, int]]
    """Of each piece in the buffer: offset and size, in bytes."""
    kept: dict[str, Tensor]
    copies: list[torch.cuda.Event]
    """Copies from CUDA devices that may still be running."""

    def wait(self) -> None:
        """Return when every byte is there."""
        for copy in self.copies:
            copy.synchronize()

    def records(self) -> Iterator[Record]:
        """What the pieces are in a file."""
        for piece in self.pieces:
            source = _snapshot.pickled(piece)
            yield Record(source.data, next(iter(_snapshot.on_host(source.storages))))


class BackgroundShards:
    """Does for ``AsyncCheckpointIO`` what ``ShardedCheckpointIO`` does while training waits.

    Args:
        courier: carries what is copied.
        process: writes where it can.
        meeting: of the ranks; who gives up in ``courier`` must give it up too.
    """

    def __init__(self, courier: Courier, process: WriterProcess, meeting: Meeting) -> None:
        self._courier = courier
        self._process = process
        self._meeting = meeting
        self._last: _Last | None = None

    def save(
        self,
        checkpoint: Mapping[str, object],
        target: Target,
        group: dist.ProcessGroup | None,
        *,
        alone: bool = False,
    ) -> None:
        """Copy this rank's pieces and return. Unless ``alone``, every rank of ``group`` must call it.

        Raises:
            CheckpointUnsafe: an object in it is neither a tensor nor plain data.
            CheckpointError: there is no memory for the copies, or an earlier save failed. What is raised on one rank is
                raised on all.
        """
        if not alone and not self._meeting.is_of(group):
            self._courier.drain()
            self._meeting.open(group)
        front = Ranks.alone() if alone else self._meeting.front
        words = front.together("prepare", lambda: self._begin(checkpoint, target, front, alone=alone))
        failed = [rank for rank, word in enumerate(words.all) if word.failed]
        if failed:  # the others learn it from their own threads, if they have not yet
            self._courier.drain()
            self._courier.poll()
            raise CheckpointError(f"{target.folder!r} was not saved: an earlier save failed on rank {failed[0]}.")
        if any(word.lost for word in words.all):
            self._meeting.renew(group)
        back = Ranks.alone() if alone else self._meeting.back
        share = words.mine.share
        assert share is not None
        if self._last is not None and all(word.fits for word in words.all):
            plan = self._last.plan
        else:
            plan = agree(front.together("plan", lambda: share).all, share, target.folder, front)
            self._last = _Last(front.size, share.names, share.plan, plan)
        snapshot = self._copy(plan, share, target.folder, front)
        save = Save(target.storage, target.folder, back, words.all[0].token)
        run = partial(_run, save, back, target, snapshot, share.tree, plan, self._process)
        self._courier.submit(QueuedSave(target.name, run, snapshot.buffer))

    def _begin(self, checkpoint: Mapping[str, object], target: Target, front: Ranks, *, alone: bool) -> _Word:
        if self._courier.has_failed:
            return _Word(failed=True)
        share = take_apart(pack(checkpoint), target.folder, front)
        fits = self._last is not None and self._last.fits(share, front)
        return _Word(False, not alone and self._meeting.back.lost is not None, fits, new_token(), share)

    def _copy(self, plan: Plan, share: Share, folder: str, front: Ranks) -> _Snapshot:
        """On every rank or on none."""
        taken: list[Buffer] = []
        made: list[_Snapshot] = []

        def copy() -> None:
            tensors = [*plan.pieces(share), *share.kept.values()]
            buffer = self._courier.take_buffer(sum(padded(tensor.nbytes) for tensor in tensors), folder)
            taken.append(buffer)
            copies, offset = HostCopies(buffer), 0
            spans: list[tuple[int, int]] = []
            copied: list[Tensor] = []
            for tensor in tensors:
                spans.append((offset, tensor.nbytes))
                copied.append(copies.add(tensor, offset))
                offset += padded(tensor.nbytes)
            count = len(tensors) - len(share.kept)
            kept = dict(zip(share.kept, copied[count:], strict=True))
            made.append(_Snapshot(buffer, copied[:count], spans[:count], kept, copies.start()))

        try:
            front.together("snapshot", copy)
        except BaseException:
            for buffer in taken:
                self._courier.give_back(buffer)
            raise
        return made[0]


def _run(
    save: Save,
    back: Ranks,
    target: Target,
    snapshot: _Snapshot,
    tree: str,
    plan: Plan,
    process: WriterProcess,
) -> None:
    write = partial(_write_shard, target=target, snapshot=snapshot, process=process)
    save.run(Content(tree, snapshot.kept, plan, write, snapshot.wait))
    with suppress(CheckpointError):  # of a rank that has gone meanwhile; this checkpoint is complete
        back.together("end", lambda: None)  # nobody leaves before all have heard of the commit


def _write_shard(path: str, *, target: Target, snapshot: _Snapshot, process: WriterProcess) -> Written:
    place = place_of(path, target.storage)
    if place is None:
        with target.storage.write_atomic(path) as sink:
            return _shard_file.write(sink, snapshot.records(), _snapshot.frame())
    records = [
        (_snapshot.pickled(piece).data, span) for piece, span in zip(snapshot.pieces, snapshot.spans, strict=True)
    ]
    assert snapshot.buffer.handle is not None
    outcome = process.write(ShardRequest(target.folder, place, records, _snapshot.frame()), snapshot.buffer.handle)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.written is not None
    return outcome.written
