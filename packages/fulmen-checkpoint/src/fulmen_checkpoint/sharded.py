"""ShardedCheckpointIO: one checkpoint in a folder, to which every rank writes what it holds."""

from __future__ import annotations

import io
import os
import pickle
import secrets
from collections import OrderedDict
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from fulmen_checkpoint import _digest, _directory, _safetensors
from fulmen_checkpoint._directory import TORCH_INDEX, Manifest, Piece, Sharded, join
from fulmen_checkpoint._fetch import storage_errors
from fulmen_checkpoint._ranks import Ranks
from fulmen_checkpoint._tree import flatten, place_of
from fulmen_checkpoint.names import MANIFEST
from fulmen_checkpoint.serializers import pack, unpack
from fulmen_checkpoint.storage import FsspecStorage, local_path
from fulmen_checkpoint.torch_io import TorchCheckpointIO
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan, WriteItem

    from fulmen_protocols.storage import Storage

__all__ = ["ShardedCheckpointIO"]


class ShardedCheckpointIO:
    """Folders in the format of ``torch.distributed.checkpoint``. Satisfies ``fulmen_protocols.CheckpointIO``.

    Tensors of modules and optimizers (and every ``DTensor``) go to one file for each rank: shards from the rank that
    has them, tensors that all ranks have alike shared out among the ranks. All the rest is plain data of rank 0. A
    folder becomes a checkpoint when its manifest appears, which is written last and in one step; a save over an old
    checkpoint leaves that whole until then.

    It loads on any number of ranks, and torch's own ``torch.distributed.checkpoint.load`` reads the tensors.

    Args:
        storage: where folders live; by default every local path and every URL that fsspec knows.
        verify: compare each file with its digest before it is loaded.
        process_group: the ranks that save and load together; None: all, or this process alone when there is no group.
    """

    def __init__(
        self,
        storage: Storage | None = None,
        *,
        verify: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.storage: Storage = FsspecStorage() if storage is None else storage
        self.verify = verify
        self.process_group = process_group
        self._reader = TorchCheckpointIO(self.storage, verify=verify)

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write all of it from this process alone; ``save_sharded`` is what ranks call together.

        Raises:
            CheckpointUnsafe: an object in it is neither a tensor nor plain data.
            CheckpointError: the storage failed, or a tensor is spread over ranks; ``path`` keeps what it held.
        """
        self._save(checkpoint, os.fspath(path), storage_options, Ranks.alone())

    def save_sharded(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write a checkpoint from every rank of the group; all must call it, with the same names in ``checkpoint``.

        Raises:
            CheckpointUnsafe: an object in it is neither a tensor nor plain data.
            CheckpointError: the save failed on some rank; it is raised on all, and ``path`` keeps what it held.
        """
        self._save(checkpoint, os.fspath(path), storage_options, Ranks(self.process_group))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read a whole checkpoint of any of our formats, on this process alone; see ``TorchCheckpointIO``."""
        return self._reader.load_checkpoint(path, map_location, weights_only)

    def load_sharded(self, path: str | os.PathLike[str], into: Mapping[str, object]) -> dict[str, object]:
        """Read a folder; tensors of ``into`` take their part of it in place, DTensors their shard.

        ``into`` is a tree like the one that was saved, or a part of it (``{"state_dict": model.state_dict()}``). Every
        rank reads what it needs and nothing else; nothing is communicated.

        Returns:
            The checkpoint, with the tensors of ``into`` at their places and all others read whole.

        Raises:
            CheckpointNotFound: nothing is there.
            CheckpointCorrupt: the bytes are not those that were written.
            CheckpointError: ``into`` has a tensor that the checkpoint has not, or has in another shape.
        """
        folder = os.fspath(path)
        manifest = _directory.read_manifest(self.storage, folder)
        tree, tensors = _directory.read_state(self.storage, folder, manifest, digest=self.verify)
        _, targets, paths = flatten(pack(into), folder)
        for name, target in targets.items():
            shape = manifest.tensors[name].shape if name in manifest.tensors else None
            if shape is None and name in tensors:
                shape = tuple(tensors[name].shape)
            if shape != tuple(target.shape):
                found = "has none" if shape is None else f"has one of shape {list(shape)}"
                raise CheckpointError(
                    f"{folder!r} was asked for {place_of(paths[name])} of shape {list(target.shape)}, but {found}. "
                    "Load it into the model that was saved."
                )
        self._fill({name: target for name, target in targets.items() if name in manifest.tensors}, folder, manifest)
        with torch.no_grad():
            for name in targets.keys() - manifest.tensors.keys():
                targets[name].copy_(tensors[name])
        others = [name for name in manifest.tensors if name not in targets]
        whole = _directory.assemble(self.storage, folder, manifest, others, digest=self.verify)
        return unpack(_directory.rebuilt(folder, tree, {**tensors, **whole, **targets}, None), folder)

    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Return if every byte is as it was written; see ``TorchCheckpointIO.verify_checkpoint``."""
        self._reader.verify_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint. Removing what is not there is allowed."""
        self._reader.remove_checkpoint(path)

    def teardown(self) -> None:
        """Nothing is pending: every save is complete when it returns."""

    def _save(
        self,
        checkpoint: Mapping[str, object],
        folder: str,
        storage_options: Mapping[str, object] | None,
        ranks: Ranks,
    ) -> None:
        storage = self.storage if storage_options is None else FsspecStorage(storage_options)
        save = _Save(storage, folder, ranks)
        try:
            save.run(pack(checkpoint))
        except BaseException:
            save.undo()
            raise

    def _fill(self, targets: dict[str, Tensor], folder: str, manifest: Manifest) -> None:
        """Let torch's planner find out which boxes of which files belong into which targets."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast("dict[str, Any]", targets), _metadata(manifest), is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        by_file: dict[str, list[tuple[Piece, Any]]] = {}
        for item in plan.items:
            entry = manifest.tensors[item.storage_index.fqn]
            piece = next(p for p in entry.pieces if p.offsets == tuple(item.storage_index.offset or ()))
            by_file.setdefault(piece.file, []).append((piece, item))
        for file, items in by_file.items():
            with _directory.checked(self.storage, folder, manifest, file, digest=self.verify) as stream:
                for piece, item in items:
                    dtype = manifest.tensors[item.storage_index.fqn].dtype
                    box = _directory.read_piece(stream, folder, piece, dtype)
                    for dim, (offset, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        box = box.narrow(dim, offset, size)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(box)
                    planner.commit_tensor(item, target)


class _Save:
    """One save: plan, write, commit, prune."""

    def __init__(self, storage: Storage, folder: str, ranks: Ranks) -> None:
        self.storage = storage
        self.folder = folder
        self.ranks = ranks
        self.token = ""
        self.wrote: list[str] = []

    def run(self, checkpoint: Mapping[str, object]) -> None:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        parts = self.ranks.together("prepare", lambda: self._prepare(checkpoint, planner))
        plan, metadata, self.token = self.ranks.from_first("plan", lambda: self._agree(planner, parts.all))
        mine = planner.finish_plan(plan[self.ranks.rank])
        written = self.ranks.together("write", lambda: self._write_shard(mine, planner))
        self.ranks.from_first("commit", lambda: self._commit(parts.mine, metadata, written.all))

    def undo(self) -> None:
        """Delete what this save wrote, unless it was committed after all (an error may come after the last step)."""
        with suppress(Exception):  # the storage may be what failed; then the next save tidies up
            if not self.wrote or self._is_committed():
                return
            for path in self.wrote:
                self.storage.remove(path)
            local = local_path(self.folder)
            if local is not None:
                os.rmdir(local)  # succeeds only if nothing is left, so if the folder is ours

    def _is_committed(self) -> bool:
        if not self.storage.exists(join(self.folder, MANIFEST)):
            return False
        return _directory.is_part(_directory.read_manifest(self.storage, self.folder).state) == self.token

    def _prepare(self, checkpoint: Mapping[str, object], planner: DefaultSavePlanner) -> _Part:
        local = local_path(self.folder)
        if local is not None and os.path.lexists(local) and not os.path.isdir(local):
            raise CheckpointError(
                f"the checkpoint {self.folder!r} was not written: a file is where its folder should be. Remove it, or "
                "choose another path."
            )
        tree, tensors, paths = flatten(checkpoint, self.folder)
        names = _sharded_names(checkpoint, tensors, paths)
        if self.ranks.size == 1 and any(_is_spread(tensors[name]) for name in names):
            raise CheckpointError(
                f"the checkpoint {self.folder!r} was not written: it holds tensors that are spread over several ranks, "
                "and this process was asked to save alone. Call save_sharded on every rank."
            )
        planner.set_up_planner(cast("dict[str, Any]", {name: tensors[name] for name in names}), None, True)
        local_plan = planner.create_local_plan()
        kept = {name: tensor for name, tensor in tensors.items() if name not in names}
        if self.ranks.rank != 0:
            tree, kept = "", {}
        return _Part(tree, kept, sorted(names), local_plan)

    def _agree(self, planner: DefaultSavePlanner, parts: list[_Part]) -> tuple[list[SavePlan], Metadata, str]:
        known = set(parts[0].names)
        for rank, part in enumerate(parts):
            strange = [name for name in part.names if name not in known]
            if strange:
                raise CheckpointError(
                    f"the checkpoint {self.folder!r} was not written: rank {rank} holds {strange[0]!r}, which rank 0 "
                    "does not. Every rank must give the same names."
                )
        plans, metadata = planner.create_global_plan([part.plan for part in parts])
        return plans, metadata, secrets.token_hex(8)

    def _write_shard(self, plan: SavePlan, planner: DefaultSavePlanner) -> _Written | None:
        if not plan.items:
            return None
        name = f"__{self.ranks.rank}_0-{self.token}.distcp"
        pieces: list[tuple[str, tuple[int, ...] | None, int, int]] = []
        path = join(self.folder, name)
        self.wrote.append(path)
        with storage_errors(self.folder, "written"), self.storage.write_atomic(path) as sink:
            out = _Out(sink)
            for item in plan.items:
                start = out.chunks.size
                _save_tensor(cast("Tensor", planner.resolve_data(item)), out)
                pieces.append((item.index.fqn, _offset(item), start, out.chunks.size - start))
        return _Written(name, out.chunks.size, out.chunks.hexdigest(), pieces)

    def _commit(self, part: _Part, metadata: Metadata, written: list[_Written | None]) -> None:
        """On rank 0, when all shards are in place."""
        files: dict[str, tuple[int, str]] = {}
        found: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
        for shard in written:
            if shard is not None:
                files[shard.name] = (shard.size, shard.digest)
                for fqn, offset, start, length in shard.pieces:
                    found[fqn, offset or ()] = (shard.name, start, length)
        tensors: dict[str, Sharded] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), name
            pieces = [
                Piece(tuple(chunk.offsets), tuple(chunk.sizes), *found[name, tuple(chunk.offsets)])
                for chunk in entry.chunks
            ]
            tensors[name] = Sharded(entry.properties.dtype, tuple(entry.size), tuple(pieces))
        state = f"state-{self.token}.safetensors"
        files[state] = self._write(state, lambda out: _safetensors.write(out, part.tensors, {"fulmen.tree": part.tree}))
        index = _torch_index(Manifest(self.ranks.size, state, files, tensors))
        out = _Out(io.BytesIO())
        out.write(index)
        files[TORCH_INDEX] = (len(index), out.chunks.hexdigest())
        with storage_errors(self.folder, "written"):
            # Of an old checkpoint: it would be taken for damage beside the new manifest.
            self.storage.remove(join(self.folder, TORCH_INDEX))
            with self.storage.write_atomic(join(self.folder, MANIFEST)) as sink:
                sink.write(Manifest(self.ranks.size, state, files, tensors).encode())
        with suppress(Exception):  # the checkpoint is there; torch's index and tidying up are not worth failing for
            with self.storage.write_atomic(join(self.folder, TORCH_INDEX)) as sink:
                sink.write(index)
            for path in self.storage.list(self.folder):
                token = _directory.is_part(path.rsplit("/", 1)[-1])
                if token is not None and token != self.token:
                    self.storage.remove(path)

    def _write(self, name: str, write: Callable[[IO[bytes]], None]) -> tuple[int, str]:
        path = join(self.folder, name)
        self.wrote.append(path)
        with storage_errors(self.folder, "written"), self.storage.write_atomic(path) as sink:
            out = _Out(sink)
            write(cast("IO[bytes]", out))
            if out.error is not None:
                raise out.error
        return out.chunks.size, out.chunks.hexdigest()


class _Part:
    """What one rank brings to a save; the plain data counts on rank 0 alone."""

    def __init__(self, tree: str, tensors: dict[str, Tensor], names: list[str], plan: SavePlan) -> None:
        self.tree = tree
        self.tensors = tensors
        self.names = names
        self.plan = plan

    def __getstate__(self) -> dict[str, object]:
        return {"tree": "", "tensors": {}, "names": self.names, "plan": self.plan}  # what the others need of it


class _Written:
    """A rank's file: name, size in bytes, digest, and (tensor, offset, start, length) of its pieces."""

    def __init__(
        self, name: str, size: int, digest: str, pieces: list[tuple[str, tuple[int, ...] | None, int, int]]
    ) -> None:
        self.name = name
        self.size = size
        self.digest = digest
        self.pieces = pieces


class _Out(io.RawIOBase):
    """A write-only stream that keeps checksums. Errors are kept too: they must not travel through torch's writer."""

    def __init__(self, sink: IO[bytes]) -> None:
        self.chunks = _digest.Chunks()
        self.error: BaseException | None = None
        self._sink = sink

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: object, /) -> int:
        """Take ``data`` (bytes or a buffer) whole; returns its length in bytes."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self.error is None:
            try:
                self._sink.write(view)
                self.chunks.add(view)
            except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too; raised again by the saver
                self.error = error
        return len(view)


def _save_tensor(tensor: Tensor, out: _Out) -> None:
    host = tensor.detach().to("cpu")
    if host.untyped_storage().nbytes() != host.nbytes:  # torch would store all of what it is a view of
        host = host.clone()
    if host.nbytes < _digest.CHUNK_BYTES:
        buffer = io.BytesIO()
        torch.save(host, buffer)
        out.write(buffer.getbuffer())
    else:
        torch.save(host, cast("IO[bytes]", out))
    if out.error is not None:
        raise out.error


def _offset(item: WriteItem) -> tuple[int, ...] | None:
    return None if item.index.offset is None else tuple(item.index.offset)


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


def _metadata(manifest: Manifest) -> Metadata:
    """A manifest as torch knows it."""
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, object] = {}
    for name, entry in manifest.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in entry.pieces]
        tensors[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.shape), chunks)
        for piece in entry.pieces:
            where = _torch_place(piece.file, piece.start, piece.length)
            stored[MetadataIndex(name, torch.Size(piece.offsets))] = where
    return Metadata(tensors, storage_data=stored, version=filesystem.CURRENT_DCP_VERSION)


def _torch_index(manifest: Manifest) -> bytes:
    return pickle.dumps(_metadata(manifest))
