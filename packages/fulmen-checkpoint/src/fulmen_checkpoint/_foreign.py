"""Folders that ``torch.distributed.checkpoint`` wrote by itself, or Lightning with it: read, but never written.

Their index is a pickle. It is read by an unpickler that knows the classes of such an index and no other name.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_checkpoint._directory import TORCH_INDEX, Manifest, Piece, Sharded, assemble, join
from fulmen_checkpoint._fetch import corrupt, fetched
from fulmen_protocols.errors import CheckpointError, CheckpointUnsafe

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from typing import IO

    from fulmen_protocols.storage import Storage

__all__ = ["PLAIN_DATA", "load"]

PLAIN_DATA = "meta.pt"
"""Where Lightning keeps what is no tensor."""


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], known: Mapping[str, object]) -> None:
        super().__init__(stream)
        self._known = known

    def find_class(self, module: str, name: str, /) -> Any:
        found = self._known.get(f"{module}.{name}")
        if found is None and module == "torch":
            value = getattr(torch, name, None)
            found = value if isinstance(value, torch.dtype) else None
        if found is None:
            raise CheckpointUnsafe(f"{module}.{name}")
        return found


def _known() -> dict[str, object]:
    from torch.distributed.checkpoint import filesystem, metadata

    names = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
             "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip
    known: dict[str, object] = {f"{metadata.__name__}.{name}": getattr(metadata, name) for name in names}
    known[f"{filesystem.__name__}._StorageInfo"] = filesystem._StorageInfo  # pyright: ignore[reportPrivateUsage]
    known["torch.Size"] = torch.Size
    known["torch.serialization._get_layout"] = torch.serialization._get_layout  # pyright: ignore[reportPrivateUsage]
    known["collections.OrderedDict"] = OrderedDict
    for module in ("pathlib", "pathlib._local"):
        known[f"{module}.PosixPath"] = PurePosixPath
        known[f"{module}.WindowsPath"] = PureWindowsPath
    return known


def load(
    storage: Storage,
    folder: str,
    place: torch.device | str | None,
    read: Callable[[str | os.PathLike[str], torch.device | str | None], dict[str, object]],
) -> dict[str, object]:
    """The whole checkpoint; ``read`` reads the torch file that lies beside the tensors.

    What Lightning's Trainer saved has the keys of a single file (``state_dict``, ``optimizer_states``), its optimizers'
    parameters numbered as in one.

    Raises:
        CheckpointCorrupt: a file is missing or cannot be read.
        CheckpointUnsafe: it holds objects that only code from the file could rebuild.
    """
    index = _read_index(storage, folder)
    try:
        tensors, blobs = _tables(index)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise corrupt(folder, f"its index {TORCH_INDEX!r} ({type(error).__name__}: {error})") from error
    files = {piece.file for entry in tensors.values() for piece in entry.pieces} | {
        piece.file for piece in blobs.values()
    }
    for file in files:
        if not storage.exists(join(folder, file)):
            raise corrupt(folder, f"its file {file!r} is missing")
    manifest = Manifest(0, "", {file: (_size(storage, folder, file), "") for file in files}, tensors)
    flat: dict[str, object] = dict(assemble(storage, folder, manifest, tensors, digest=False, place=place))
    for name, piece in blobs.items():
        with fetched(storage, join(folder, piece.file)) as stream:
            flat[name] = _read_blob(stream, folder, piece)
    places: dict[str, tuple[object, ...]] = index.planner_data or {}
    checkpoint = _nested(flat, places)
    if storage.exists(join(folder, PLAIN_DATA)):
        checkpoint.update(read(join(folder, PLAIN_DATA), place))
    return _as_trainer_saves(checkpoint) if "pytorch-lightning_version" in checkpoint else checkpoint


def _size(storage: Storage, folder: str, file: str) -> int:
    with fetched(storage, join(folder, file)) as stream:
        return stream.seek(0, 2)


def _read_index(storage: Storage, folder: str) -> Any:
    with fetched(storage, join(folder, TORCH_INDEX)) as stream:
        try:
            return _IndexUnpickler(stream, _known()).load()
        except CheckpointUnsafe as error:
            raise CheckpointUnsafe(
                f"the index {TORCH_INDEX!r} of {folder!r} names {error}, which no index of "
                "torch.distributed.checkpoint holds. It was not read."
            ) from None
        except Exception as error:
            raise corrupt(folder, f"its index {TORCH_INDEX!r} ({type(error).__name__}: {error})") from error


def _tables(index: Any) -> tuple[dict[str, Sharded], dict[str, Piece]]:
    tensors: dict[str, Sharded] = {}
    blobs: dict[str, Piece] = {}
    stored: dict[Any, Any] = {(key.fqn, tuple(key.offset or ())): info for key, info in index.storage_data.items()}
    for name, entry in index.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            blobs[name] = _piece((), (), stored[name, ()])
            continue
        pieces = [_piece(tuple(c.offsets), tuple(c.sizes), stored[name, tuple(c.offsets)]) for c in entry.chunks]
        tensors[name] = Sharded(entry.properties.dtype, tuple(entry.size), tuple(pieces))
    return tensors, blobs


def _piece(offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> Piece:
    file = str(info.relative_path)
    if file.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", file) or ":" in file:
        raise ValueError(f"{file!r} is no file of this folder")
    if info.transform_descriptors:
        raise ValueError(f"it is compressed ({info.transform_descriptors!r})")
    return Piece(offsets, sizes, file, int(info.offset), int(info.length))


def _read_blob(stream: IO[bytes], folder: str, piece: Piece) -> object:
    import io

    stream.seek(piece.start)
    try:
        return torch.load(io.BytesIO(stream.read(piece.length)), "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointUnsafe(
            f"{folder!r} holds, in {piece.file!r}, an object that only code from the file could rebuild: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except Exception as error:
        raise corrupt(folder, f"its file {piece.file!r} at byte {piece.start} ({type(error).__name__})") from error


def _nested(flat: Mapping[str, object], places: Mapping[str, tuple[object, ...]]) -> dict[str, object]:
    """Values at their places: a text is a key of a dict, a number an index of a list."""
    root: dict[Any, Any] = {}
    for name, value in flat.items():
        place = places.get(name, (name,))
        here: dict[Any, Any] = root
        for part in place[:-1]:
            here = here.setdefault(part, {})
        here[place[-1]] = value
    return cast("dict[str, object]", _with_lists(root))


def _with_lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(item) for key, item in cast("dict[object, object]", value).items()}
    if made and set(made) == set(range(len(made))):
        return [made[index] for index in range(len(made))]
    return made


def _as_trainer_saves(checkpoint: dict[str, object]) -> dict[str, object]:
    if "model" in checkpoint and "state_dict" not in checkpoint:
        checkpoint["state_dict"] = checkpoint.pop("model")
    names = [name for name in checkpoint if re.fullmatch(r"optimizer_\d+", name)]
    if names and "optimizer_states" not in checkpoint:
        ordered = sorted(names, key=lambda name: int(name.rpartition("_")[2]))
        checkpoint["optimizer_states"] = [_numbered(checkpoint.pop(name)) for name in ordered]
    return checkpoint


def _numbered(state: Any) -> Any:
    """An optimizer's state with its parameters by number, as torch's optimizers keep it, instead of by name."""
    try:
        names = [name for group in state["param_groups"] for name in group["params"]]
        if not all(isinstance(name, str) for name in names):
            return state
        number = {name: index for index, name in enumerate(names)}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
        return {
            **state,
            "state": {number[name]: entry for name, entry in state["state"].items()},
            "param_groups": groups,
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the state of an optimizer has an unknown layout: {error!r}") from error
