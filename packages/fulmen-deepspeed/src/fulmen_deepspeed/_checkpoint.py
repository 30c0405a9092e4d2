"""Checkpoints of a run whose engine writes them: a folder to which every rank adds its part."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from argparse import Namespace
from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_deepspeed import _folder, _states
from fulmen_deepspeed._library import submodule
from fulmen_deepspeed.consolidation import consolidated
from fulmen_protocols.errors import CheckpointError, CheckpointUnsafe, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fulmen_deepspeed._entry import EngineEntry
    from fulmen_deepspeed._process_group import ProcessGroup

__all__ = ["EngineCheckpoints"]


class EngineCheckpoints:
    """Saving and loading through an engine.

    Args:
        group: the ranks that save and load together.
        exclude_frozen: leave parameters out that need no gradient.
        load_full_weights: whether a checkpoint may be one file with the whole model.
    """

    def __init__(self, group: ProcessGroup, *, exclude_frozen: bool, load_full_weights: bool) -> None:
        self._group = group
        self._exclude_frozen = exclude_frozen
        self._load_full_weights = load_full_weights

    def owns(self, path: str) -> bool:
        """See ``DeepSpeedStrategy.owns_checkpoint``."""
        if "://" in path:
            if self._load_full_weights:
                return False
            raise _remote(path)
        if _folder.is_folder_of_engine(path):
            return True
        _folder.refuse_part(path)
        if os.path.exists(path) and not self._load_full_weights:
            raise MisconfigurationException(
                f"{path!r} is no folder of DeepSpeed's. If it holds the weights of the whole model, load it with "
                "DeepSpeedStrategy(load_full_weights=True); no optimizer state is loaded then."
            )
        return False

    def verify(self, path: str) -> None:
        """See ``DeepSpeedStrategy.verify_checkpoint``."""
        _folder.check_whole(path)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, engine: Any, rest: Mapping[str, object], path: str) -> None:
        """Every rank writes into a folder beside ``path``, which takes its name when it is whole."""
        if "://" in path:
            raise _remote(path)
        path = self._group.collectives.broadcast_object(os.path.abspath(path))
        staging = f"{path}.staging"
        client = _folder.client_state(dict(rest))
        self._on_first(lambda: shutil.rmtree(staging, ignore_errors=True))
        engine.save_checkpoint(
            staging, tag=_folder.TAG, client_state=client, exclude_frozen_parameters=self._exclude_frozen
        )
        self._on_first(lambda: _commit(staging, path))

    def _on_first(self, action: Callable[[], None]) -> None:
        """Run ``action`` on rank 0; every rank waits for it, and hears of its error."""
        ranks = self._group.collectives
        problem: Exception | None = None
        if ranks.rank == 0:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - raised below, when the others know
                problem = error
        told = ranks.broadcast_object(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        if told is not None:
            raise CheckpointError(f"on rank 0: {told}")

    # -- loading ------------------------------------------------------------------------------------------------------

    def read_rest(self, path: str, weights_only: bool | None) -> dict[str, object]:
        """See ``DeepSpeedStrategy.read_rest``."""
        _folder.require(path)
        _folder.check_whole(path)
        return _folder.rest_of(_folder.tag_of(path), weights_only)

    def load(self, entry: EngineEntry, path: str, *, optimizers: bool, strict: bool, weights_only: bool | None) -> None:
        """Module and optimizer, through the engine; the module alone, from the whole weights."""
        path = os.path.abspath(path)
        ranks = self._group.collectives
        if not (optimizers and entry.trains):
            whole: dict[str, Any] = {}
            if ranks.rank == 0:
                whole = consolidated(path, weights_only=weights_only)["state_dict"]
            _states.load_module_state(entry, whole, ranks, strict=strict and not self._exclude_frozen)
            return
        folder = _folder.tag_of(path)
        self._require_same_kind(entry, folder, path)
        saved_ranks = _folder.data_parallel_size(folder)
        strict = strict and not self._exclude_frozen
        try:
            with _folder.reading(weights_only):
                if entry.engine.zero_optimization() and saved_ranks != ranks.world_size:
                    self._load_resized(entry, folder, strict=strict)
                else:
                    entry.engine.load_checkpoint(
                        path, tag=os.path.basename(folder), load_module_strict=strict, load_lr_scheduler_states=False
                    )
        except pickle.UnpicklingError as error:
            raise _folder.unsafe(path, error) from error

    def _require_same_kind(self, entry: EngineEntry, folder: str, path: str) -> None:
        stage = int(entry.engine.zero_optimization_stage())
        saved = "3" if _folder.is_of_stage_3(folder) else "1 or 2" if _folder.optimizer_files(folder) else "0"
        own = "3" if stage == 3 else "1 or 2" if stage else "0"
        if saved != own:
            raise CheckpointError(
                f"{path!r} was saved with ZeRO stage {saved}, and this run has stage {stage}: the files do not fit. "
                f"Resume with stage {saved}, or make one file of it (fulmen checkpoint consolidate) and load the "
                "weights with DeepSpeedStrategy(load_full_weights=True)."
            )

    def _load_resized(self, entry: EngineEntry, folder: str, *, strict: bool) -> None:
        """What another number of ranks has saved, by way of DeepSpeed's universal checkpoint."""
        ranks = self._group.collectives
        universal = f"{os.path.dirname(folder)}.universal"
        self._on_first(lambda: _make_universal(folder, universal))
        engine = entry.engine
        settings: Any = engine._config
        before = settings.load_universal_checkpoint
        settings.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(
                universal, tag=_folder.TAG, load_module_strict=strict, load_lr_scheduler_states=False
            )
        finally:
            settings.load_universal_checkpoint = before
            ranks.barrier("universal checkpoint")
            if ranks.rank == 0:
                shutil.rmtree(universal, ignore_errors=True)
        _load_buffers(entry, folder)


def _remote(path: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"{path!r} is a URL, and DeepSpeed reads and writes its folders on local paths. Give a path that every node "
        "sees, and copy the folder to or from there."
    )


def _commit(staging: str, path: str) -> None:
    """Check what was written, list it, and give it its name."""
    for file in _folder.model_files(os.path.join(staging, _folder.TAG)):
        with _folder.reading(None):
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _allowed()
        if unsafe:
            shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointUnsafe(
                f"the checkpoint {path!r} was not written: it holds {', '.join(sorted(unsafe))}, which could be loaded "
                "only by running code from the file. Store plain data instead (tensors, numbers, strings, lists, "
                "dicts), or register the class with torch.serialization.add_safe_globals([...])."
            )
        break  # the others hold the same
    _folder.write_manifest(staging)
    old = f"{path}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(path) and not os.path.islink(path):
        os.rename(path, old)
    elif os.path.lexists(path):
        os.remove(path)
    os.rename(staging, path)
    shutil.rmtree(old, ignore_errors=True)


def _allowed() -> set[str]:
    allowed = cast("list[object]", torch.serialization.get_safe_globals())
    kinds = [cast("type[object]", one) for one in allowed if isinstance(one, type)]
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds}


def _make_universal(folder: str, universal: str) -> None:
    shutil.rmtree(universal, ignore_errors=True)
    os.makedirs(universal)
    asked = Namespace(
        input_folder=folder,
        output_folder=os.path.join(universal, _folder.TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # It prints what it does, and shows bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        submodule("deepspeed.checkpoint.ds_to_universal").main(asked)


def _load_buffers(entry: EngineEntry, folder: str) -> None:
    """A universal checkpoint holds parameters and their optimizer state, and no buffers."""
    saved = _folder.read_file(_folder.model_files(folder)[0], None)
    buffers = dict(entry.module.named_buffers())
    for name in saved.get("buffer_names") or ():
        if name in buffers:
            with torch.no_grad():
                buffers[name].copy_(saved["module"][name])
