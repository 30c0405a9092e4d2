"""TimeLedger: where the time of a run goes, every second of it once."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import torch

from fulmen.profilers._table import table
from fulmen.profilers.profiler import Profiler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from torch import nn

__all__ = ["TimeLedger"]

_OF_ACTIONS = {
    "train_dataloader_next": "data",
    "val_next": "data",
    "test_next": "data",
    "predict_next": "data",
    "batch_to_device": "transfer",
    "on_before_batch_transfer": "transfer",
    "transfer_batch_to_device": "transfer",
    "on_after_batch_transfer": "transfer",
    "training_step": "forward",
    "validation_step": "forward",
    "test_step": "forward",
    "predict_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "configure_gradient_clipping": "optimizer",
    "lr_scheduler_step": "optimizer",
    "save_checkpoint": "saving",
    "on_save_checkpoint": "saving",
}
"""By the last part of an action's name."""

_FIRST_STEP = "run_training_batch"
_OF_PARTS = {"training": "other", "validation": "validation", "sanity check": "validation", "logging": "logging"}
_STEP = frozenset({"forward", "backward", "optimizer"})
_OF_MODEL = frozenset({"forward", "transfer", "hooks"})

_MEANINGS = {
    "data": "waiting for training batches",
    "transfer": "moving batches to the device",
    "forward": "training_step",
    "backward": "backward passes, with what ranks reduce meanwhile",
    "optimizer": "optimizer and schedulers, clipping, zeroing",
    "first_step": "forward, backward and optimizer of the first batch: compiling, warming up",
    "validation": "validation, the sanity check included",
    "validation_data": "waiting for validation batches",
    "logging": "metrics: reducing, reading, giving them to loggers",
    "saving": "checkpoints",
    "callbacks": "hooks of callbacks, but for checkpoints",
    "hooks": "hooks of the module and the datamodule, but before training",
    "setup": "all that comes before training",
    "teardown": "all that comes after training",
    "other": "the loop itself",
}
_OUTSIDE = ("setup", "teardown")

_OWNER = re.compile(r"\[(Callback|LightningModule|LightningDataModule)\]")


class TimeLedger(Profiler):
    """Divides the wall time of a call among categories, so that they add up to it.

    Every moment belongs to the innermost action that runs; one that has no category of its own, as the user's own
    ``profiler.profile("...")``, belongs to the category around it. A row of the loggers gets the share of each category
    in the time since the row before, 0 to 1, and the end of the run a table in seconds.

    Times are the host's. A GPU works behind the host, so that its time appears where the host next waits for it:
    ``synchronize=True`` lets the host wait wherever the category changes, which tells forward, backward and optimizer
    apart and makes the run slower. What DDP and FSDP send during the backward pass runs beside it and is no category of
    its own.

    Args:
        dirpath: folder of the report; None: the Trainer's ``log_dir``.
        filename: part of the report's name; None: local rank 0 logs the report.
        synchronize: wait for the device wherever the category changes.
        prefix: of the names that loggers get: ``time/data``, ``time/forward``, ...
    """

    def __init__(
        self,
        dirpath: str | PathLike[str] | None = None,
        filename: str | None = None,
        *,
        synchronize: bool = False,
        prefix: str = "time/",
    ) -> None:
        super().__init__(dirpath, filename)
        self.synchronize = synchronize
        self.prefix = prefix
        self.seconds: dict[str, float] = dict.fromkeys(_MEANINGS, 0.0)
        """Of each category, in the last call up to the last change of category."""
        self._categories: dict[str, str | None] = {}
        self._stack: list[tuple[str, str]] = [("", "other")]
        self._since: float | None = None
        self._row_before: dict[str, float] = {}
        self._first_batch: bool = True
        self._module: nn.Module | None = None
        self._device: torch.device | None = None
        self._wait: Callable[[], None] | None = None

    @property
    def wall_s(self) -> float:
        """Seconds of the last call: from where it knows its processes to its report. The sum of ``seconds``."""
        return sum(self.seconds.values())

    # ------------------------------------------------------------------ told by the Trainer

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Begin a new ledger."""
        super().setup(stage, local_rank, log_dir)
        self.seconds = dict.fromkeys(_MEANINGS, 0.0)
        self._stack = [("", "setup" if stage == "fit" else "other")]
        self._row_before = {}
        self._first_batch = True
        self._device = self._wait = None
        self._since = time.perf_counter()

    def record_module(self, module: nn.Module, expected_calls: Callable[[str], float]) -> None:
        """Learn whose device works."""
        self._module = module

    def enter(self, part: str) -> None:
        """A part of the run begins."""
        if part == "training":
            self._turn()
            self._row_before = dict(self.seconds)
        self._push(part, _OF_PARTS.get(part, "other"))

    def leave(self, part: str) -> None:
        """It ends."""
        self.stop(part)
        if part == "training":
            self._stack[0] = ("", "teardown")

    def start(self, action_name: str) -> None:
        """Begin an action."""
        if action_name not in self._categories:
            self._categories[action_name] = _category(action_name)
        if action_name == _FIRST_STEP and self._first_batch:
            category: str | None = "first_step"
        else:
            category = self._categories[action_name]
        if self._device is None and category in _OF_MODEL:
            self._find_device()
        around = self._stack[-1][1]
        if category is None:
            category = around
        elif category in _STEP and self._is_in("first_step"):
            category = "first_step"
        elif self._is_in("validation"):
            category = "validation_data" if category == "data" else "validation" if category in _OF_MODEL else category
        elif category == "hooks" and around == "setup":
            category = "setup"
        self._push(action_name, category)

    def stop(self, action_name: str) -> None:
        """End the innermost running action of that name.

        Raises:
            ValueError: the action was not started.
        """
        self._turn()
        for index in range(len(self._stack) - 1, 0, -1):
            if self._stack[index][0] == action_name:
                del self._stack[index]
                break
        else:
            running = ", ".join(repr(name) for name, _ in self._stack[1:]) or "none"
            raise ValueError(
                f"profiler.stop({action_name!r}): that action was not started. Running: {running}. "
                "Start it first, or use `with profiler.profile(...)`."
            )
        if action_name == _FIRST_STEP:
            self._first_batch = False

    def _is_in(self, category: str) -> bool:
        return any(each == category for _, each in self._stack)

    def _push(self, name: str, category: str) -> None:
        self._turn()
        self._stack.append((name, category))

    def _turn(self) -> None:
        """Book the time since the last change."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        if self._since is not None:  # else it is used without a Trainer: there is nothing to divide yet
            self.seconds[self._stack[-1][1]] += now - self._since
        self._since = now

    def _find_device(self) -> None:
        parameter = None if self._module is None else next(iter(self._module.parameters()), None)
        self._device = None if parameter is None else parameter.device
        if self.synchronize and self._device is not None and self._device.type != "cpu":
            device = self._device
            self._wait = lambda: torch.accelerator.synchronize(device)

    # ------------------------------------------------------------------ what comes of it

    def row(self) -> Mapping[str, float]:
        """The share of each category in the time since the last call of this, under the prefix."""
        self._turn()
        spent = {name: s - self._row_before.get(name, 0.0) for name, s in self.seconds.items() if name not in _OUTSIDE}
        self._row_before = dict(self.seconds)
        total = sum(spent.values())
        return {f"{self.prefix}{name}": s / total if total > 0 else 0.0 for name, s in spent.items()}

    def summary(self) -> str:
        """A table of the categories, the longest first."""
        self._turn()
        wall_s = self.wall_s
        rows = sorted(((name, s) for name, s in self.seconds.items() if s > 0), key=lambda row: row[1], reverse=True)
        cells = [("total", f"{wall_s:.3f}", "100.0", "wall time")]
        cells += [(name, f"{s:.3f}", f"{100 * s / wall_s:.1f}", _MEANINGS[name]) for name, s in rows]
        text = table(("Category", "Seconds", "Percent", "What it is"), cells, rule_after_first=True)
        return f"{self._title()}Time Ledger\n\n{text}\n{self._remark()}"

    def _remark(self) -> str:
        device = self._device
        if device is None or device.type == "cpu":
            return ""
        if self.synchronize:
            return f"The host waited for {device} at each change of category, which made the run slower.\n"
        return (
            f"Times are the host's: {device} works behind it, and its time appears where the host waits for it. "
            "TimeLedger(synchronize=True) tells more.\n"
        )

    def teardown(self, stage: str | None) -> None:
        """Let go of the module. ``seconds`` stays, until the next call."""
        self._module = self._wait = None


def _category(action: str) -> str | None:
    """That of an action by its name; None: that of what is around it."""
    owner, last = _OWNER.match(action), action.rpartition(".")[2]
    if owner is not None and owner[1] == "Callback":
        return "callbacks" if last != "on_save_checkpoint" else "saving"
    known = _OF_ACTIONS.get(last)
    if known is not None:
        return known
    return "hooks" if owner is not None else None
