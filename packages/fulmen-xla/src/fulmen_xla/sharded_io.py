"""XLAShardedCheckpointIO: folders of torch.distributed.checkpoint, with the shards of each device of an SPMD mesh."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load  # pyright: ignore[reportUnknownVariableType]
from torch.distributed.checkpoint.state_dict_saver import save  # pyright: ignore[reportUnknownVariableType]

from fulmen_protocols.errors import CheckpointCorrupt, CheckpointError
from fulmen_protocols.nested import map_instances
from fulmen_xla._dcp_index import SafeReader
from fulmen_xla._library import library, require
from fulmen_xla._placing import sync
from fulmen_xla.checkpoint_io import XLACheckpointIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.checkpoint.planner import SavePlan

    from fulmen_protocols.checkpoint_io import CheckpointIO

__all__ = ["XLAShardedCheckpointIO"]

_REST = "fulmen_xla.pt"
"""What is no tensor, as a tree with the tensors' names at their places."""
_TENSOR = "fulmen_xla.tensor"


class XLAShardedCheckpointIO:
    """Writes each device's shards by torch-xla's ``SPMDSavePlanner`` and reads them by its ``SPMDLoadPlanner``.

    No tensor is put together on the host, neither to save it nor to load it into a placed model (``load_sharded``). A
    folder is written under a name of its own, with a digest of each file, and renamed when it is complete; it lives on
    a local path. Its tensors can be read by ``torch.distributed.checkpoint.load`` on any machine.

    Args:
        checkpoint_io: writes and reads what is no folder of this kind; None: the one that is registered as ``"torch"``.

    Raises:
        MissingPackage: torch-xla is not installed.
        BackendUnavailable: it was made for another torch.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        require("XLAShardedCheckpointIO")
        self._file = XLACheckpointIO(checkpoint_io)

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """Write the folder: ``path`` holds either what it held, or all of the new.

        Raises:
            CheckpointError: ``path`` is a URL.
        """
        folder = _local(path)
        tensors: dict[str, Tensor] = {}

        def name(tensor: Tensor) -> dict[str, str]:
            tensors[str(len(tensors))] = tensor.detach()
            return {_TENSOR: str(len(tensors) - 1)}

        tree = cast("dict[str, object]", map_instances(Tensor, name, checkpoint))
        sync()
        library("core.xla_model").wait_device_ops()
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = folder.with_name(f".{folder.name}.part-{secrets.token_hex(4)}")
        try:
            with warnings.catch_warnings():
                # torch's advice to a planner of torch-xla's, and to who saves without a process group on purpose.
                warnings.simplefilter("ignore")
                save(
                    cast("dict[str, Any]", tensors),
                    storage_writer=FileSystemWriter(stage),
                    planner=_planner(),
                    no_dist=True,
                )
            lost = tensors.keys() - SafeReader(stage).read_metadata().state_dict_metadata.keys()
            if lost:
                raise CheckpointError(
                    f"the checkpoint {str(folder)!r} was not written: torch-xla's planner has left out {len(lost)} "
                    f"of {len(tensors)} tensors, which are on no device yet. Call torch_xla.sync() before saving."
                )
            self._file.save_checkpoint({"tree": tree, "files": _digests(stage)}, stage / _REST)
            _replace(folder, stage)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise

    def save_sharded(
        self,
        checkpoint: Mapping[str, object],
        path: str | os.PathLike[str],
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        """As ``save_checkpoint``: there is one process."""
        self.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read a whole checkpoint; tensors go to ``map_location`` (None: CPU).

        Raises:
            CheckpointNotFound: nothing is there.
            CheckpointCorrupt: a part is missing or damaged.
        """
        folder = Path(os.fspath(path))
        if not (folder / _REST).exists():
            return self._file.load_checkpoint(path, map_location, weights_only)
        tree = self._read_rest(folder, weights_only)
        reader = SafeReader(folder)
        try:
            index = reader.read_metadata().state_dict_metadata
            tensors: dict[str, Any] = {
                name: torch.empty(cast("Any", entry).size, dtype=cast("Any", entry).properties.dtype)
                for name, entry in index.items()
            }
            _load(tensors, reader, None)
        except CheckpointError:
            raise
        except Exception as error:
            raise _damaged(folder, error) from error
        if map_location is not None:
            tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
        return cast("dict[str, object]", _put_back(tree, tensors))

    def load_sharded(self, path: str | os.PathLike[str], into: Mapping[str, object]) -> dict[str, object]:
        """Read; tensors of ``into`` take their values in place, each device its shards.

        Raises:
            CheckpointNotFound: nothing is there.
            CheckpointCorrupt: a part is missing or damaged.
            CheckpointError: ``into`` has a tensor that the checkpoint has not, or has in another shape.
        """
        folder = _local(path)
        tree = self._read_rest(folder, None)
        targets: dict[str, Tensor] = {}
        _pair(tree, into, targets, str(folder))
        reader = SafeReader(folder)
        index = cast("dict[str, Any]", reader.read_metadata().state_dict_metadata)
        for name, target in targets.items():
            if tuple(index[name].size) != tuple(target.shape):
                raise CheckpointError(
                    f"{str(folder)!r} holds a tensor of shape {list(index[name].size)} where the model has one of "
                    f"{list(target.shape)}. Load it into the model that was saved."
                )
        sync()
        try:
            _load(
                cast("dict[str, Any]", targets),
                reader,
                library("experimental.distributed_checkpoint").SPMDLoadPlanner(),
            )
            others: dict[str, Any] = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype)
                for name, entry in index.items()
                if name not in targets
            }
            if others:
                _load(others, reader, None)
        except CheckpointError:
            raise
        except Exception as error:
            raise _damaged(folder, error) from error
        return cast("dict[str, object]", _put_back(tree, {**others, **targets}))

    def _read_rest(self, folder: Path, weights_only: bool | None) -> object:
        """What is no tensor, after every file has been compared with its digest."""
        rest: dict[str, Any] = self._file.load_checkpoint(folder / _REST, None, weights_only)
        found = _digests(folder)
        damaged = [name for name, digest in rest["files"].items() if found.get(name) != digest]
        if damaged:
            raise CheckpointCorrupt(
                f"{str(folder)!r} is damaged: {damaged[0]!r} is not as it was written, or missing. Load another one."
            )
        return cast("object", rest["tree"])

    def verify_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Read all of it, and throw it away. Raises as ``load_checkpoint``."""
        self.load_checkpoint(path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete. Removing what is not there is allowed."""
        self._file.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the other IO finish."""
        self._file.teardown()


def _planner() -> Any:
    """torch-xla's, which would leave out a shard of which two devices have a copy: both would count as the second."""
    planner: Any = library("experimental.distributed_checkpoint").SPMDSavePlanner()
    plan_all = planner.create_local_plan

    def plan_each_once() -> SavePlan:
        plan: SavePlan = plan_all()
        first = {item.index: item for item in reversed(plan.items)}
        return dataclasses.replace(plan, items=[item for item in plan.items if first[item.index] is item])

    planner.create_local_plan = plan_each_once
    return planner


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of torch's, in hexadecimal."""
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if file.name != _REST:
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _load(tensors: dict[str, Any], reader: SafeReader, planner: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(tensors, storage_reader=reader, planner=planner, no_dist=True)


def _local(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if "://" in text and not text.startswith("file://"):
        raise CheckpointError(
            f"the checkpoint {text!r} is a URL, and XLAShardedCheckpointIO knows local paths. Leave it out: the "
            "default format for folders knows URLs."
        )
    return Path(text.removeprefix("file://"))


def _replace(folder: Path, stage: Path) -> None:
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}")
        folder.rename(old)
    stage.rename(folder)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def _put_back(tree: object, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(tree, dict):
        entries = cast("dict[object, object]", tree)
        if set(entries) == {_TENSOR}:
            return tensors[cast("str", entries[_TENSOR])]
        changed = {key: _put_back(value, tensors) for key, value in entries.items()}
        return changed if type(entries) is dict else OrderedDict(changed)  # pickles of plain data hold no other mapping
    if isinstance(tree, (list, tuple)):
        items = [_put_back(value, tensors) for value in cast("list[object]", tree)]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def _pair(tree: object, into: object, found: dict[str, Tensor], where: str) -> None:
    """The name of each tensor of ``into``, by its place in the tree."""
    if isinstance(into, Tensor):
        entry = cast("dict[object, object]", tree) if isinstance(tree, dict) else {}
        if set(entry) != {_TENSOR}:
            raise CheckpointError(f"{where} holds no tensor. Load it into the model that was saved.")
        found[cast("str", entry[_TENSOR])] = into
    elif isinstance(into, dict):
        entries = cast("dict[object, object]", tree) if isinstance(tree, dict) else {}
        for key, value in cast("dict[object, object]", into).items():
            _pair(entries.get(key), value, found, f"{where} at {key!r}")
    elif isinstance(into, (list, tuple)):
        items = cast("list[object]", tree) if isinstance(tree, (list, tuple)) else []
        for number, value in enumerate(cast("list[object]", into)):
            _pair(items[number] if number < len(items) else None, value, found, f"{where} at {number}")


def _damaged(folder: Path, error: Exception) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"{str(folder)!r} is damaged: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. Load "
        "another checkpoint."
    )
