"""SpikeDetection: ends a training whose loss jumps, and writes down which batches to leave out next time."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from fulmen_fabric.fabric import Fabric

__all__ = ["SpikeDetection", "TrainingSpikeException"]

_FINE, _LEFT_OUT, _SPIKE = 0, 1, 2
"""What a rank makes of its loss; the largest over the ranks holds for all."""


class TrainingSpikeException(RuntimeError):
    """The loss jumped.

    Args:
        batch_idx: the batch at which it did.
        args: of ``RuntimeError``.
    """

    def __init__(self, batch_idx: int, *args: object) -> None:
        super().__init__(f"Training spike detected in batch {batch_idx}", *args)
        self.batch_idx = batch_idx

    def __reduce__(self) -> tuple[type[TrainingSpikeException], tuple[object, ...]]:
        return type(self), (self.batch_idx, *self.args[1:])


class SpikeDetection:
    """Raises ``TrainingSpikeException`` on every rank when the loss of any rank jumps, before the next batch.

    A loss is a spike if it is worse than the one before, and further from the mean of the last ``window`` losses than
    both tolerances allow. The batch and the one before it, which may have spoilt the weights, are written to a JSON
    file as a list of indices, for your loader to leave out when training goes on from a checkpoint.

    To be in time it must know each loss: it reads one number from the device after **every** batch, for which the host
    waits, and with several ranks adds a collective of one number. Nothing else in a run does that.

    With Fabric pass it as a callback and call ``fabric.call("on_train_batch_end", fabric=fabric, loss=loss,
    batch=batch, batch_idx=batch_idx)`` in your loop, on every rank.

    Args:
        mode: whether a loss is better the smaller (``"min"``) or the larger (``"max"``) it is.
        window: losses of which the mean is taken.
        warmup: batches at the start of an epoch that are not judged.
        atol: distance from the mean from which on a worse loss is a spike. None: only ``rtol`` counts.
        rtol: the same as a multiple of the mean. None: only ``atol`` counts.
        exclude_batches_path: the file, or a folder for ``skip_batches.json``. None: in the working directory.
        finite_only: whether a loss that is not finite is a spike by itself. Otherwise it is only left out of the mean,
            unless it is infinite in the direction that is worse.

    Raises:
        MisconfigurationException: ``mode`` is neither, ``window`` or ``warmup`` is too small.
    """

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise MisconfigurationException(f"SpikeDetection(mode={mode!r}): use 'min' or 'max'.")
        if window < 1:
            raise MisconfigurationException(f"SpikeDetection(window={window!r}): use the mean of 1 loss or more.")
        if warmup < 0:
            raise MisconfigurationException(f"SpikeDetection(warmup={warmup!r}): use 0 batches or more.")
        self.mode: str = mode
        self.warmup = warmup
        self.atol = atol
        self.rtol = rtol
        self.finite_only = finite_only
        self.exclude_batches_path = None if exclude_batches_path is None else os.fspath(exclude_batches_path)
        self.bad_batches: list[int] = []
        """Batches to leave out, as they are written to the file."""
        self.last_val = 0.0
        """The last loss that went into the mean."""
        self._losses: deque[float] = deque(maxlen=window)

    @property
    def window(self) -> int:
        """Losses of which the mean is taken."""
        return self._losses.maxlen or 1

    def on_train_batch_end(self, fabric: Fabric, loss: Tensor | float, batch: object, batch_idx: int) -> None:
        """Judge the loss of a batch; every rank calls it after every batch.

        Raises:
            TrainingSpikeException: it is a spike here or on another rank.
        """

        def largest(verdict: int) -> int:
            reduced: Tensor = fabric.all_reduce(torch.tensor(verdict, device=fabric.device), reduce_op="max")
            return int(reduced.item())  # once per batch, see the class

        self.judge(
            loss,
            batch_idx,
            largest=largest if fabric.world_size > 1 else None,
            folder=os.getcwd(),
            writes=fabric.is_global_zero,
        )

    def judge(
        self,
        loss: Tensor | float | None,
        batch_idx: int,
        *,
        largest: Callable[[int], int] | None,
        folder: str,
        writes: bool,
    ) -> None:
        """Judge a loss; for loops other than Fabric's.

        Args:
            loss: one number; None on a rank that has none for this batch.
            batch_idx: index of the batch in its epoch.
            largest: the maximum of a number over all ranks; None with one rank.
            folder: where the file goes if no path was given.
            writes: whether this rank writes the file.

        Raises:
            TrainingSpikeException: it is a spike here or on another rank.
        """
        value = None if loss is None else float(loss)  # once per batch, see the class
        if value is None:
            verdict = _LEFT_OUT
        elif batch_idx >= self.warmup and self._is_spike(value):
            verdict = _SPIKE
        else:
            verdict = _FINE if math.isfinite(value) else _LEFT_OUT
        if largest is not None:
            verdict = largest(verdict)
        if verdict == _SPIKE:
            self._handle_spike(batch_idx, folder, writes)
        elif verdict == _FINE and value is not None:
            self._losses.append(value)
            self.last_val = value

    def _is_spike(self, value: float) -> bool:
        if self.finite_only and not math.isfinite(value):
            return True
        change = value - self.last_val
        if not self._losses or (change <= 0 if self.mode == "min" else change >= 0):
            return False
        mean = sum(self._losses) / len(self._losses)
        distance = abs(value - mean)
        return (self.atol is None or distance >= abs(self.atol)) and (
            self.rtol is None or distance >= abs(self.rtol * mean)
        )

    def _handle_spike(self, batch_idx: int, folder: str, writes: bool) -> None:
        self.bad_batches.extend(index for index in (batch_idx - 1, batch_idx) if index >= 0)
        path = Path(folder if self.exclude_batches_path is None else self.exclude_batches_path)
        if path.suffix != ".json":
            path = path / "skip_batches.json"
        self.exclude_batches_path = str(path)
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_name(f".{path.name}.{os.getpid()}")
            staged.write_text(json.dumps(self.bad_batches, indent=4))
            staged.replace(path)
        raise TrainingSpikeException(batch_idx=batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """The settings, the bad batches and the losses of the mean, as plain data."""
        return {
            "last_val": self.last_val,
            "mode": self.mode,
            "warmup": self.warmup,
            "atol": self.atol,
            "rtol": self.rtol,
            "bad_batches": list(self.bad_batches),
            "bad_batches_path": self.exclude_batches_path,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave. Of a state written by Lightning the losses of the mean are lost."""
        path: str | os.PathLike[str] | None = state_dict["bad_batches_path"]
        self.last_val = float(state_dict["last_val"])
        self.mode = str(state_dict["mode"])
        self.warmup = int(state_dict["warmup"])
        self.atol = state_dict["atol"]
        self.rtol = state_dict["rtol"]
        self.bad_batches = [int(index) for index in state_dict["bad_batches"]]
        self.exclude_batches_path = None if path is None else os.fspath(path)
        self._losses = deque((float(loss) for loss in state_dict.get("losses", ())), maxlen=self.window)
