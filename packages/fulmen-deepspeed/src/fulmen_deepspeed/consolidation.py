"""One plain state dict from the files that the ranks of a DeepSpeed run have written."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen_deepspeed import _folder
from fulmen_deepspeed._library import require_deepspeed, submodule
from fulmen_protocols.errors import CheckpointNotFound, MisconfigurationException

if TYPE_CHECKING:
    from os import PathLike

__all__ = ["consolidated", "convert_zero_checkpoint_to_fp32_state_dict"]

_LIGHTNINGS_PREFIX = "_forward_module."


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | PathLike[str],
    output_file: str | PathLike[str],
    tag: str | None = None,
    *,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Write one file with the whole model in float32, and what else the run saved, from a folder of DeepSpeed's.

    The file is read by plain ``torch.load``, ``load_from_checkpoint`` and ``ckpt_path``. It needs the memory of the
    model, twice, and no GPU. Optimizer state is not in it.

    Args:
        checkpoint_dir: the folder that was saved, by fulmen or Lightning.
        output_file: where the file goes; its folder is there.
        tag: the subfolder with the engine's files; None: that of fulmen and Lightning, or the last one saved.
        weights_only: False lets code from the files run; None and True do not.

    Returns:
        What was written.

    Raises:
        MissingPackage: DeepSpeed is not installed.
        CheckpointError: there is no whole checkpoint.
    """
    path, output = os.fspath(checkpoint_dir), os.fspath(output_file)
    if os.path.isdir(output):
        raise MisconfigurationException(f"output_file={output!r} is a folder. Give the path of a file in it.")
    checkpoint = consolidated(path, tag, weights_only=weights_only)
    staged = f"{output}.part"
    torch.save(checkpoint, staged)
    os.replace(staged, output)
    return checkpoint


def consolidated(path: str, tag: str | None = None, *, weights_only: bool | None = None) -> dict[str, Any]:
    """``state_dict``, whole and in float32, and everything that the run saved beside module and optimizer.

    Raises:
        MissingPackage: DeepSpeed is not installed.
        CheckpointError: there is no whole checkpoint, or it would have to run code.
    """
    require_deepspeed()
    if tag is None and not os.path.exists(path):
        raise CheckpointNotFound(f"there is no folder {path!r}.")
    folder = _folder.tag_of(path, tag)
    if tag is None:
        _folder.check_whole(path)
    rest = _folder.rest_of(folder, weights_only)
    return {"state_dict": _weights(folder, weights_only), **{k: v for k, v in rest.items() if k != "state_dict"}}


def _weights(folder: str, weights_only: bool | None) -> dict[str, Any]:
    first = _folder.read_file(_folder.model_files(folder)[0], weights_only)
    state: dict[str, Any] = first["module"] or {}
    if _folder.optimizer_files(folder):
        converter = submodule("deepspeed.utils.zero_to_fp32")
        parent, tag = os.path.split(folder)
        try:
            # It prints what it does, and shows bars.
            silent = io.StringIO()
            with (
                _folder.reading(weights_only),
                contextlib.redirect_stdout(silent),
                contextlib.redirect_stderr(silent),
            ):
                merged = converter.get_fp32_state_dict_from_zero_checkpoint(parent, tag)
        except pickle.UnpicklingError as error:
            raise _folder.unsafe(folder, error) from error
        order = [*state, *(name for name in merged if name not in state)]
        state = {name: merged.get(name, state.get(name)) for name in order}
    # Weights alone are stored in the engine's dtype; buffers and other tensors keep theirs.
    named: list[str] = list(first.get("buffer_names") or [])
    buffers = set(named)
    return {
        name.removeprefix(_LIGHTNINGS_PREFIX): _single(value) if name not in buffers else value
        for name, value in state.items()
    }


def _single(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value.clone() if isinstance(value, Tensor) else value
