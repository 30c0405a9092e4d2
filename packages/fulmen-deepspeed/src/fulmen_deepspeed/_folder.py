"""A folder that DeepSpeed's engine has written: what is in it, whether it is whole, and reading it without its code."""

from __future__ import annotations

import glob
import json
import os
import pickle
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_deepspeed._library import submodule
from fulmen_protocols.errors import CheckpointCorrupt, CheckpointNotFound, CheckpointUnsafe

if TYPE_CHECKING:
    from collections.abc import Collection, Generator

__all__ = [
    "CLIENT_KEYS",
    "MANIFEST",
    "TAG",
    "check_whole",
    "client_state",
    "data_parallel_size",
    "is_folder_of_engine",
    "is_of_stage_3",
    "looks_like_folder_of_engine",
    "model_files",
    "optimizer_files",
    "read_file",
    "reading",
    "refuse_part",
    "require",
    "rest_of",
    "tag_of",
    "unsafe",
    "write_manifest",
]

TAG = "checkpoint"
"""The subfolder in which the engine's files are."""
MANIFEST = "fulmen.json"
"""Names and sizes of the files, written last."""
CLIENT_KEYS = "fulmen_client_keys"
"""Which entries of DeepSpeed's state are the run's own."""

_OF_THE_ENGINE = frozenset({
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps",
    "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version", "num_experts",
    "universal_checkpoint_info", "checkpoint_parallel_dims",
})  # fmt: skip
_SAFE_CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_reading = threading.RLock()


def looks_like_folder_of_engine(names: Collection[str]) -> bool:
    """Whether a folder with these entries is one of DeepSpeed's: tag folder, and the script or pointer beside it."""
    return TAG in names and not {"latest", "zero_to_fp32.py", MANIFEST}.isdisjoint(names)


def is_folder_of_engine(path: str) -> bool:
    """Whether ``path`` is a folder in which the engine has saved a checkpoint."""
    return os.path.isdir(path) and os.path.isdir(os.path.join(path, TAG))


def tag_of(path: str, tag: str | None = None) -> str:
    """The folder of the engine's files in ``path``: of ``tag``, or else of the last one saved.

    Raises:
        CheckpointNotFound: there is none.
    """
    if tag is None:
        latest = os.path.join(path, "latest")
        tag = TAG
        if not os.path.isdir(os.path.join(path, TAG)) and os.path.isfile(latest):
            with open(latest, encoding="utf-8") as file:
                tag = file.read().strip()
    folder = os.path.join(path, tag)
    if not os.path.isdir(folder):
        raise CheckpointNotFound(f"{path!r} holds no checkpoint of DeepSpeed: there is no folder {tag!r} in it.")
    return folder


def model_files(folder: str) -> list[str]:
    """The files with the module, of all ranks that wrote one, in the order of ranks."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*model_states.pt")), key=_natural)


def optimizer_files(folder: str) -> list[str]:
    """The files with the state that ZeRO has spread over ranks, in the order of ranks; none without ZeRO."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*optim_states.pt")), key=_natural)


def _natural(name: str) -> tuple[object, ...]:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", os.path.basename(name)))


def data_parallel_size(folder: str) -> int:
    """How many ranks shared the optimizer's state; 0 if it was not shared."""
    return len(optimizer_files(folder))


def is_of_stage_3(folder: str) -> bool:
    """Whether parameters were spread over ranks."""
    return any(os.path.basename(name).startswith("zero_pp_rank_") for name in model_files(folder))


# ---------------------------------------------------------------------- reading


@contextmanager
def reading(weights_only: bool | None) -> Generator[None]:
    """Within the block nothing that DeepSpeed loads runs code from the file; ``weights_only=False`` allows it."""
    if weights_only is False:
        yield
        return
    classes = [getattr(submodule(module), name) for module, name in _SAFE_CLASSES if _has(module, name)]
    # DeepSpeed passes weights_only=False to torch.load; this variable is torch's own way to overrule that.
    with _reading, torch.serialization.safe_globals(classes):
        before = os.environ.get(_FORCE)
        os.environ[_FORCE] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_FORCE]
            else:
                os.environ[_FORCE] = before


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(submodule(module), name)
    except ImportError:
        return False


def read_file(path: str, weights_only: bool | None) -> dict[str, Any]:
    """One of the engine's files.

    Raises:
        CheckpointUnsafe: it holds objects that only code from it could rebuild.
        CheckpointCorrupt: it cannot be read.
    """
    try:
        with reading(weights_only):
            loaded: object = torch.load(path, map_location="cpu", weights_only=weights_only is not False)
    except pickle.UnpicklingError as error:
        raise unsafe(path, error) from error
    except (EOFError, RuntimeError, ValueError) as error:
        raise CheckpointCorrupt(
            f"{path!r} cannot be read: {error}. It is damaged, or was not written whole."
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointCorrupt(f"{path!r} holds a {type(loaded).__name__}, and not what DeepSpeed saves.")
    return cast("dict[str, Any]", loaded)


def unsafe(path: str, error: Exception) -> CheckpointUnsafe:
    """What is said of a file whose objects only its own code could rebuild."""
    return CheckpointUnsafe(
        f"{path!r} was asked to load without running code from it, but it holds an object that only code could "
        f"rebuild: {str(error).splitlines()[0]} If you trust where it comes from, pass weights_only=False."
    )


def rest_of(folder: str, weights_only: bool | None) -> dict[str, Any]:
    """What the run saved beside module and optimizer.

    Raises:
        CheckpointCorrupt: the file that holds it is missing or damaged.
        CheckpointUnsafe: see ``read_file``.
    """
    files = model_files(folder)
    if not files:
        raise CheckpointCorrupt(f"{folder!r} holds no file '*model_states.pt'. It was not written whole.")
    found = read_file(files[0], weights_only)
    names: object = found.get(CLIENT_KEYS)
    if isinstance(names, dict):
        return {str(name): found[key] for name, key in cast("dict[object, str]", names).items()}
    return {key: value for key, value in found.items() if key not in _OF_THE_ENGINE}


def client_state(rest: dict[str, Any]) -> dict[str, Any]:
    """``rest`` as the engine can keep it: names that it uses itself are replaced by others."""
    names = {name: f"fulmen_client_{name}" if name in _OF_THE_ENGINE else name for name in rest}
    return {CLIENT_KEYS: names, **{names[name]: value for name, value in rest.items()}}


# ---------------------------------------------------------------------- whole or not


def write_manifest(path: str) -> None:
    """List every file of the folder with its size, in a file that is complete when it is there."""
    sizes: dict[str, int] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.path.join(folder, name)
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            sizes[os.path.relpath(file, path).replace(os.sep, "/")] = os.path.getsize(file)
    staged = os.path.join(path, f"{MANIFEST}.part")
    with open(staged, "w", encoding="utf-8") as stream:
        json.dump({"version": 1, "files": sizes}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staged, os.path.join(path, MANIFEST))


def check_whole(path: str) -> None:
    """Return if all files are there with the sizes they were written with; folders that others wrote: if any are.

    Raises:
        CheckpointNotFound: there is no such folder.
        CheckpointCorrupt: a file is missing or has another size.
    """
    folder = tag_of(path)
    manifest = os.path.join(path, MANIFEST)
    if not os.path.isfile(manifest):
        if not model_files(folder):
            raise CheckpointCorrupt(f"{path!r} holds no file '*model_states.pt'. It was not written whole.")
        return
    try:
        with open(manifest, encoding="utf-8") as stream:
            sizes = cast("dict[str, int]", json.load(stream)["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"the list of files {manifest!r} cannot be read: {error}.") from error
    for name, size in sizes.items():
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            raise CheckpointCorrupt(f"{path!r} is damaged: its file {name!r} is missing. Use another checkpoint.")
        if os.path.getsize(file) != size:
            raise CheckpointCorrupt(
                f"{path!r} is damaged: its file {name!r} has {os.path.getsize(file)} bytes, and {size} were written. "
                "Use another checkpoint."
            )


def refuse_part(path: str) -> None:
    """Refuse a part of a checkpoint folder.

    Raises:
        CheckpointNotFound: it is one; the message names the folder that was probably meant.
    """
    parent = os.path.dirname(path)
    whole, kind = (parent, "folder") if os.path.isdir(path) else (os.path.dirname(parent), "file")
    if os.path.exists(path) and is_folder_of_engine(whole):
        raise CheckpointNotFound(f"{path!r} is a {kind} inside a checkpoint of DeepSpeed. Give {whole!r}.")


def require(path: str) -> None:
    """Refuse what is no checkpoint folder.

    Raises:
        CheckpointNotFound: it is none; the message names the folder that was probably meant.
    """
    if not is_folder_of_engine(path):
        refuse_part(path)
        raise CheckpointNotFound(f"{path!r} is no checkpoint of DeepSpeed: there is no folder {TAG!r} in it.")
