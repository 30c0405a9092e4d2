"""RecompileCheck: tells when ``torch.compile`` compiles again in the middle of training, and why."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from fulmen.callbacks.callback import Callback
from fulmen_fabric import map_leaves, rank_zero_warn
from fulmen_protocols.errors import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

__all__ = ["RecompileCheck"]

_ACTIONS = ("warn", "raise")
_ADVICE = (
    "Pad batches to a few sizes that all come up in the first batches, compile with dynamic=True, or mark the "
    "dimension that changes by torch._dynamo.mark_dynamic."
)


class RecompileCheck(Callback):
    """After the first batches of a fit nothing shall be compiled any more: a training batch that is, is named.

    A compiled model is compiled again for a batch of another shape, or when a number that it has baked in has another
    value. Each time takes seconds or minutes, on all ranks, and nothing says so; after some times torch gives up and
    runs that function uncompiled, just as silently. Only training batches are looked at: evaluations may compile.

    Args:
        warmup: batches from the start of a fit (of a resumed one, too) in which everything may be compiled.
        action: ``"warn"``: the warning says which batch it was, its shapes, the guard that failed and how long it took.
            ``"raise"``: the batch fails before it is compiled, with torch's error, which names the guard; its shapes
            are in a note.

    Raises:
        MisconfigurationException: an argument has a value that cannot be.
    """

    def __init__(self, warmup: int = 100, action: Literal["warn", "raise"] = "warn") -> None:
        if warmup < 1:
            raise MisconfigurationException(
                f"RecompileCheck(warmup={warmup!r}) must be at least 1: the first batch is always compiled."
            )
        if action not in _ACTIONS:
            raise MisconfigurationException(
                f"RecompileCheck(action={action!r}) is neither 'warn' nor 'raise'.{did_you_mean(str(action), _ACTIONS)}"
            )
        self.warmup = warmup
        self.action = action
        self._batches = 0
        self._graphs = 0
        self._forbidden: AbstractContextManager[object] | None = None
        self._shapes = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything may be compiled again."""
        self._batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on nothing is to be compiled."""
        if self._batches < self.warmup or "torch._dynamo" not in sys.modules:  # nobody has ever compiled anything
            return
        self._graphs = _graphs()
        if self.action == "raise":
            self._shapes = _shapes(batch)
            self._forbidden = torch.compiler.set_stance("fail_on_recompile")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See whether something was."""
        self._allow()
        self._batches += 1
        if self._batches <= self.warmup or "torch._dynamo" not in sys.modules:
            return
        new = _graphs() - self._graphs
        if new > 0:
            rank_zero_warn(
                f"torch.compile compiled {new} graph{'s' * (new > 1)} in batch {batch_idx} of epoch "
                f"{trainer.current_epoch}, {self._batches} batches into this fit: {_shapes(batch)}."
                f"{_why(new)} {_ADVICE}"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Allow compiling again; tell of the batch if that is what has failed."""
        forbade = self._forbidden is not None
        self._allow()
        if forbade and "fail_on_recompile" in str(exception):
            exception.add_note(
                f"fulmen: RecompileCheck lets nothing be compiled after {self.warmup} batches of a fit; this batch has "
                f"{self._shapes}. {_ADVICE}"
            )

    def _allow(self) -> None:
        if self._forbidden is not None:
            self._forbidden.__exit__(None, None, None)
            self._forbidden = None


def _graphs() -> int:
    """How many graphs this process has compiled."""
    dynamo = cast("Any", sys.modules["torch._dynamo"])
    return int(dynamo.utils.counters["stats"]["unique_graphs"])


def _why(new: int) -> str:
    """What torch noted of the last ``new`` compilations: guards that failed, and time taken."""
    dynamo = cast("Any", sys.modules["torch._dynamo"])
    # Not part of torch's public interface: without it the warning is shorter.
    read = cast("Callable[[], list[Any]]", getattr(dynamo.utils, "get_compilation_metrics", list))
    noted = read()[-new:]
    reasons = list(dict.fromkeys(str(each.recompile_reason) for each in noted if getattr(each, "recompile_reason", "")))
    seconds = [each for each in (getattr(one, "entire_frame_compile_time_s", None) for one in noted) if each]
    text = f" Why: {'; '.join(reasons)}." if reasons else ""
    return text + (f" It took {sum(seconds):.1f} s." if seconds else "")


def _shapes(batch: object) -> str:
    """The tensors of ``batch``, such as ``float32[8, 3], int64[8]``."""
    found: list[str] = []

    def note(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            found.append(f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}")
        return leaf

    map_leaves(note, batch)
    return ", ".join(found) or "no tensors"
