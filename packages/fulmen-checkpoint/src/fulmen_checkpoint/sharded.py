"""ShardedCheckpointIO: one checkpoint in a folder, to which every rank writes what it holds."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from fulmen_checkpoint import _directory, _shard_file, _snapshot
from fulmen_checkpoint._host_copies import dense
from fulmen_checkpoint._ranks import Ranks
from fulmen_checkpoint._shard_file import Record
from fulmen_checkpoint._shards import Content, Save, agree, as_torch_knows_it, new_token, take_apart
from fulmen_checkpoint._tree import flatten, place_of
from fulmen_checkpoint.serializers import pack, unpack
from fulmen_checkpoint.storage import FsspecStorage
from fulmen_checkpoint.torch_io import TorchCheckpointIO
from fulmen_protocols.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fulmen_checkpoint._directory import Manifest, Piece
    from fulmen_checkpoint._shard_file import Written
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
        shares = ranks.together("prepare", lambda: take_apart(pack(checkpoint), folder, ranks))
        token = ranks.from_first("prepare", new_token)
        plan, share = agree(shares.all, shares.mine, folder, ranks), shares.mine
        write = partial(_written, storage, pieces=plan.pieces(share))
        Save(storage, folder, ranks, token).run(Content(share.tree, share.kept, plan, write, lambda: None))

    def _fill(self, targets: dict[str, Tensor], folder: str, manifest: Manifest) -> None:
        """Let torch's planner find out which boxes of which files belong into which targets."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast("dict[str, Any]", targets), as_torch_knows_it(manifest), is_coordinator=True)
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


def _written(storage: Storage, path: str, pieces: list[Tensor]) -> Written:
    with storage.write_atomic(path) as sink:
        return _shard_file.write(sink, _records(pieces), _snapshot.frame())


def _records(pieces: list[Tensor]) -> Iterator[Record]:
    for piece in pieces:
        source = _snapshot.pickled(dense(piece.to("cpu")))
        yield Record(source.data, next(iter(_snapshot.on_host(source.storages))))
