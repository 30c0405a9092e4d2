"""Hyperparameters that only code from a file could bring back are left out of checkpoints.

The model's weights, and so a resume, do not need them; ``load_from_checkpoint`` is given them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fulmen.hparams import checkpoint_entries, drop_unpicklable
from fulmen.states import TrainerFn
from fulmen_fabric import rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsContentCheck, WrapsCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fulmen._session import Session
    from fulmen.hparams import HyperparametersMixin
    from fulmen_protocols import CheckpointIO

__all__ = ["leave_out_unstorable", "names_left_out", "storable_entries"]

_KEY = "hyper_parameters"


def storable_entries(owner: HyperparametersMixin, checkpoint_io: CheckpointIO, prefix: str = "") -> dict[str, Any]:
    """``checkpoint_entries`` without the values that ``checkpoint_io`` would refuse, and with the names of these."""
    entries = checkpoint_entries(owner, prefix)
    key = f"{prefix}{_KEY}"
    names = _refused(entries.get(key, {}), checkpoint_io)
    if names:
        entries[key] = {name: value for name, value in entries[key].items() if name not in names}
        entries[_noted(prefix)] = names
    return entries


def leave_out_unstorable(session: Session, checkpoint_io: CheckpointIO) -> None:
    """When a call begins, drop the hyperparameters that cannot be pickled; of a fit say what checkpoints leave out.

    Of hyperparameters that are modules nothing is said: that was done when they were recorded.
    """
    for owner in (session.module, session.datamodule):
        if owner is not None and owner.hparams:
            drop_unpicklable(owner)
            if session.fn is TrainerFn.FITTING:
                _warn_of_left_out(owner, checkpoint_io)


def _warn_of_left_out(owner: HyperparametersMixin, checkpoint_io: CheckpointIO) -> None:
    hparams: dict[str, Any] = checkpoint_entries(owner).get(_KEY, {})
    names = [name for name in _refused(hparams, checkpoint_io) if not isinstance(hparams[name], nn.Module)]
    if names:
        found = ", ".join(f"{name!r} ({type(hparams[name]).__name__})" for name in names)
        cls = type(owner).__name__
        rank_zero_warn(
            f"checkpoints leave out the hyperparameters {found} of {cls}: only code from the file could bring them "
            f"back. Give them to {cls}.load_from_checkpoint(path, {names[0]}=...), store plain data (str(path), "
            "asdict(config)), or use plugins=TorchCheckpointIO(allow_unsafe=True); where a library makes the Trainer, "
            "set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1.",
        )


def names_left_out(checkpoint: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the hyperparameters that ``checkpoint`` was saved without."""
    return list(checkpoint.get(_noted(prefix), ()))


def _noted(prefix: str) -> str:
    return f"fulmen_{prefix}hparams_left_out"


def _refused(hparams: Mapping[str, Any], checkpoint_io: CheckpointIO) -> list[str]:
    while supports(checkpoint_io, WrapsCheckpointIO) and checkpoint_io.checkpoint_io is not None:
        checkpoint_io = checkpoint_io.checkpoint_io
    if not supports(checkpoint_io, SupportsContentCheck):
        return []
    return [name for name, value in hparams.items() if checkpoint_io.cannot_hold({name: value})]
