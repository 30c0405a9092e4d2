"""One save into a folder: who writes which pieces, the shards, and the commit."""

from __future__ import annotations

import io
import os
import pickle
import secrets
import socket
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from fulmen_checkpoint import _directory, _safetensors
from fulmen_checkpoint._directory import TORCH_INDEX, Manifest, Piece, Sharded, join
from fulmen_checkpoint._fetch import storage_errors
from fulmen_checkpoint._shard_file import Counted
from fulmen_checkpoint._tree import flatten
from fulmen_checkpoint.names import MANIFEST
from fulmen_checkpoint.storage import local_path
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan

    from fulmen_checkpoint._ranks import Ranks
    from fulmen_checkpoint._shard_file import Written
    from fulmen_protocols.storage import Storage

__all__ = ["Content", "Plan", "Save", "Share", "agree", "as_torch_knows_it", "new_token", "take_apart"]


class Share:
    """What one rank brings to a save; the plain data counts on rank 0 alone."""

    def __init__(
        self, tree: str, kept: dict[str, Tensor], names: list[str], planner: DefaultSavePlanner, plan: SavePlan
    ) -> None:
        self.tree = tree
        """Plain data, as JSON."""
        self.kept = kept
        """Tensors that stay with it."""
        self.names = names
        """Of the tensors that are shared out."""
        self.plan = plan
        """The pieces that this rank has."""
        self.planner = planner

    def __getstate__(self) -> dict[str, object]:
        return {"names": self.names, "plan": self.plan}  # what the others need of it


class Plan(NamedTuple):
    """Who writes what."""

    mine: SavePlan
    metadata: Metadata
    """Of all ranks together."""

    def pieces(self, share: Share) -> list[Tensor]:
        """What this rank writes: its own pieces of tensors, wherever they are."""
        return [cast("Tensor", share.planner.resolve_data(item)).detach() for item in self.mine.items]


@dataclass(frozen=True, slots=True)
class Content:
    """What this rank writes; nothing of it may change meanwhile."""

    tree: str
    kept: Mapping[str, Tensor]
    plan: Plan
    write_shard: Callable[[str], Written]
    """Writes the pieces of ``plan``, in their order, to the file of this path."""
    wait: Callable[[], None]
    """Returns when all of it can be read."""


def take_apart(checkpoint: Mapping[str, object], folder: str, ranks: Ranks) -> Share:
    """Find what is shared out among the ranks.

    Raises:
        CheckpointUnsafe: an object in it is neither a tensor nor plain data.
        CheckpointError: ``folder`` is a file, or a tensor is spread over ranks and there is one.
    """
    local = local_path(folder)
    if local is not None and os.path.lexists(local) and not os.path.isdir(local):
        raise CheckpointError(
            f"the checkpoint {folder!r} was not written: a file is where its folder should be. Remove it, or choose "
            "another path."
        )
    tree, tensors, paths = flatten(checkpoint, folder)
    names = _sharded_names(checkpoint, tensors, paths)
    if ranks.size == 1 and any(_is_spread(tensors[name]) for name in names):
        raise CheckpointError(
            f"the checkpoint {folder!r} was not written: it holds tensors that are spread over several ranks, and this "
            "process was asked to save alone. Call save_sharded on every rank."
        )
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(cast("dict[str, Any]", {name: tensors[name] for name in names}), None, True)
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    if ranks.rank != 0:
        tree, kept = "", {}
    return Share(tree, kept, sorted(names), planner, planner.create_local_plan())


def agree(shares: list[Share], mine: Share, folder: str, ranks: Ranks) -> Plan:
    """Let rank 0 share out the writing.

    Raises:
        CheckpointError: the ranks do not have the same names.
    """
    plans, metadata = ranks.from_first("plan", lambda: _share_out(shares, folder))
    return Plan(mine.planner.finish_plan(plans[ranks.rank]), metadata)


def _share_out(shares: list[Share], folder: str) -> tuple[list[SavePlan], Metadata]:
    known = set(shares[0].names)
    for rank, share in enumerate(shares):
        strange = [name for name in share.names if name not in known]
        if strange:
            raise CheckpointError(
                f"the checkpoint {folder!r} was not written: rank {rank} holds {strange[0]!r}, which rank 0 does not. "
                "Every rank must give the same names."
            )
    return shares[0].planner.create_global_plan([share.plan for share in shares])


def new_token() -> str:
    """What tells the files of one save from those of any other."""
    return secrets.token_hex(8)


_IN_SIGHT_S = 5.0  # how long a file that one host has written may take to be seen by another


def _not_shared(folder: str, ranks: list[int]) -> CheckpointError:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return CheckpointError(
        f"the checkpoint {folder!r} was not written: each rank writes its part there, and on rank 0's host "
        f"({socket.gethostname()}) the part of rank {shown} is not to be seen. The folder must be the same one on "
        "all hosts: use a shared file system or a storage URL, or save one whole file (state_dict_type='full')."
    )


class Save:
    """The files of one save."""

    def __init__(self, storage: Storage, folder: str, ranks: Ranks, token: str) -> None:
        self._storage = storage
        self._folder = folder
        self._ranks = ranks
        self._token = token
        self._wrote: list[str] = []

    def run(self, content: Content) -> None:
        """Return when the checkpoint is visible. Every rank must call it.

        Raises:
            CheckpointError: it failed on some rank; it is raised on all, and the folder keeps what it held.
        """
        try:
            written = self._ranks.together("write", lambda: self._write_shard(content))
            self._ranks.from_first("commit", lambda: self._commit(content, written.all))
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        """Delete what this save wrote, unless it was committed after all (an error may come after the last step)."""
        if self._ranks.lost is not None and self._ranks.rank != 0:
            return  # rank 0 may be about to commit it; if not, the next save tidies up
        with suppress(Exception):  # the storage may be what failed; then the next save tidies up
            if not self._wrote or self._is_committed():
                return
            for path in self._wrote:
                self._storage.remove(path)
            local = local_path(self._folder)
            if local is not None:
                os.rmdir(local)  # succeeds only if nothing is left, so if the folder is ours

    def _is_committed(self) -> bool:
        if not self._storage.exists(join(self._folder, MANIFEST)):
            return False
        return _directory.is_part(_directory.read_manifest(self._storage, self._folder).state) == self._token

    def _write_shard(self, content: Content) -> _Shard | None:
        content.wait()
        items = content.plan.mine.items
        if not items:
            return None
        name = f"__{self._ranks.rank}_0-{self._token}.distcp"
        path = join(self._folder, name)
        self._wrote.append(path)
        with storage_errors(self._folder, "written"):
            written = content.write_shard(path)
        pieces: list[tuple[str, tuple[int, ...], int, int]] = []
        for item, (start, length) in zip(items, written.places, strict=True):
            offset = () if item.index.offset is None else tuple(item.index.offset)
            pieces.append((item.index.fqn, offset, start, length))
        return _Shard(name, written.size, written.digest, pieces)

    def _commit(self, content: Content, written: list[_Shard | None]) -> None:
        """On rank 0, when all shards are in place."""
        self._require_in_sight(written)
        files: dict[str, tuple[int, str]] = {}
        found: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        for shard in written:
            if shard is not None:
                files[shard.name] = (shard.size, shard.digest)
                for fqn, offset, start, length in shard.pieces:
                    found[fqn, offset] = (shard.name, start, length)
        tensors: dict[str, Sharded] = {}
        for name, entry in content.plan.metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            pieces = [
                Piece(tuple(chunk.offsets), tuple(chunk.sizes), *found[name, tuple(chunk.offsets)])
                for chunk in entry.chunks
            ]
            tensors[name] = Sharded(entry.properties.dtype, tuple(entry.size), tuple(pieces))
        state = f"state-{self._token}.safetensors"
        files[state] = self._write(
            state, lambda out: _safetensors.write(out, content.kept, {"fulmen.tree": content.tree})
        )
        index = pickle.dumps(as_torch_knows_it(Manifest(self._ranks.size, state, files, tensors)))
        out = Counted(io.BytesIO())
        out.write(index)
        files[TORCH_INDEX] = (len(index), out.chunks.hexdigest())
        with storage_errors(self._folder, "written"):
            # Of an old checkpoint: it would be taken for damage beside the new manifest.
            self._storage.remove(join(self._folder, TORCH_INDEX))
            with self._storage.write_atomic(join(self._folder, MANIFEST)) as sink:
                sink.write(Manifest(self._ranks.size, state, files, tensors).encode())
        with suppress(Exception):  # the checkpoint is there; torch's index and tidying up are not worth failing for
            with self._storage.write_atomic(join(self._folder, TORCH_INDEX)) as sink:
                sink.write(index)
            for path in self._storage.list(self._folder):
                token = _directory.is_part(path.rsplit("/", 1)[-1])
                if token is not None and token != self._token:
                    self._storage.remove(path)

    def _require_in_sight(self, written: list[_Shard | None]) -> None:
        """See that what the other ranks have written is where rank 0 will say that it is.

        A folder of a host's own disk looks alike on all hosts, and each would keep a part that nobody can load.

        Raises:
            CheckpointError: files of other ranks are not there.
        """
        missing = {shard.name: rank for rank, shard in enumerate(written) if shard is not None and rank != 0}
        until = time.monotonic() + _IN_SIGHT_S
        while missing:
            with storage_errors(self._folder, "written"):
                there = {path.rsplit("/", 1)[-1] for path in self._storage.list(self._folder)}
                # A list may be older than the files (NFS keeps it for seconds).
                missing = {
                    name: rank
                    for name, rank in missing.items()
                    if name not in there and not self._storage.exists(join(self._folder, name))
                }
            if missing and time.monotonic() > until:
                raise _not_shared(self._folder, sorted(missing.values()))
            if missing:
                time.sleep(0.2)

    def _write(self, name: str, write: Callable[[IO[bytes]], None]) -> tuple[int, str]:
        path = join(self._folder, name)
        self._wrote.append(path)
        with storage_errors(self._folder, "written"), self._storage.write_atomic(path) as sink:
            out = Counted(sink)
            write(cast("IO[bytes]", out))
        return out.chunks.size, out.chunks.hexdigest()


class _Shard(NamedTuple):
    """A rank's file."""

    name: str
    size: int
    digest: str
    pieces: list[tuple[str, tuple[int, ...], int, int]]
    """Tensor, offset in it, and start and length in the file in bytes."""


def _is_spread(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and tensor.device_mesh.size() > 1


def _sharded_names(
    checkpoint: Mapping[str, object], tensors: Mapping[str, Tensor], paths: Mapping[str, tuple[object, ...]]
) -> set[str]:
    """The tensors that go to shards: DTensors, and what the state of a module or an optimizer holds."""
    entries = {key for key, value in checkpoint.items() if _is_training_state(value)}
    return {name for name, tensor in tensors.items() if isinstance(tensor, DTensor) or paths[name][0] in entries}


def _is_training_state(value: object) -> bool:
    """Whether a top-level entry looks like the state of a module, of an optimizer, or of several optimizers."""
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return len(items) > 0 and all(_is_optimizer_state(item) for item in items)
    if type(value) not in (dict, OrderedDict):
        return False
    return _is_optimizer_state(value) or all(
        type(key) is str and (isinstance(item, Tensor) or key.endswith("_extra_state"))
        for key, item in cast("dict[object, object]", value).items()
    )


def _is_optimizer_state(value: object) -> bool:
    return isinstance(value, dict) and {"state", "param_groups"} <= cast("dict[object, object]", value).keys()


# What torch's own reader expects in its index.
_torch_place = filesystem._StorageInfo  # pyright: ignore[reportPrivateUsage]


def as_torch_knows_it(manifest: Manifest) -> Metadata:
    """What torch's own readers and planners want to know of a folder."""
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, object] = {}
    for name, entry in manifest.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in entry.pieces]
        tensors[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
        for piece in entry.pieces:
            where = _torch_place(piece.file, piece.start, piece.length)
            stored[MetadataIndex(name, torch.Size(piece.offsets))] = where
    return Metadata(tensors, storage_data=stored, version=filesystem.CURRENT_DCP_VERSION)
