"""What a process does that the process launcher has started: take its place, run the function, report."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fulmen_strategies._inherited_group import forget_inherited_group
from fulmen_strategies._marks import LAUNCHED, STARTER_IS_NO_RANK
from fulmen_strategies.launchers._failure import record_exception
from fulmen_strategies.launchers._rank import become_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.synchronize import Event

    from fulmen_strategies.launchers._by_value import ByValue

__all__ = ["Home", "Switches", "run_rank"]


@dataclass(frozen=True)
class Home:
    """The folder through which the processes and their starter talk."""

    folder: str

    def error(self, local_rank: int) -> str:
        """Where a rank describes its failure."""
        return os.path.join(self.folder, f"error-{local_rank}.json")

    def exception(self, local_rank: int) -> str:
        """Where it leaves the exception itself, if that can be pickled."""
        return os.path.join(self.folder, f"exception-{local_rank}")

    def done(self, local_rank: int) -> str:
        """Present when the function has come to its end there."""
        return os.path.join(self.folder, f"done-{local_rank}")

    @property
    def value(self) -> str:
        """What the function returned on this node's first rank."""
        return os.path.join(self.folder, "value")


@dataclass(frozen=True)
class Switches:
    """What a new interpreter does not inherit: torch's global switches and the random states."""

    deterministic: bool
    warn_only: bool
    cudnn_benchmark: bool
    cudnn_deterministic: bool
    random_states: tuple[Any, ...]

    @classmethod
    def of_this_process(cls) -> Switches:
        """As they are now. Does not start CUDA."""
        numpy = sys.modules.get("numpy")
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            (random.getstate(), torch.get_rng_state(), None if numpy is None else numpy.random.get_state()),
        )

    def set(self) -> None:
        """Make this process like the one they come from."""
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        python, of_torch, of_numpy = self.random_states
        random.setstate(python)
        torch.set_rng_state(of_torch)
        if of_numpy is not None:
            import numpy as np

            np.random.set_state(of_numpy)


def run_rank(
    carried: ByValue[tuple[Callable[[], object], Switches | None]],
    variables: Mapping[str, str],
    local_rank: int,
    threads: int,
    home: Home,
    may_leave: Event,
) -> None:
    """The life of one rank. It stays until all have come to their end: others may still need what it holds."""
    # What a fork has inherited must never be collected here: the destructor of a process group waits for threads that
    # only the parent has.
    gc.freeze()
    gc.enable()
    os.environ.update(variables)
    # Not the launching process: in a process that a fork server has made, that server is the parent.
    os.environ[LAUNCHED] = str(os.getppid())
    os.environ[STARTER_IS_NO_RANK] = "1"
    os.environ["TORCHELASTIC_ERROR_FILE"] = home.error(local_rank)
    torch.set_num_threads(threads)
    forget_inherited_group()
    become_rank()
    function, switches = carried.content
    if switches is not None:
        switches.set()
    try:
        value = function()
        if local_rank == 0:
            _leave_value(home.value, value)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the starter tells it
        with contextlib.suppress(Exception):  # many exceptions cannot be pickled; their text goes another way
            Path(home.exception(local_rank)).write_bytes(pickle.dumps(error))
        record_exception(home.error(local_rank), error)
        code = error.code if isinstance(error, SystemExit) else 1
        sys.exit(code if isinstance(code, int) and code else 1)
    Path(home.done(local_rank)).touch()
    may_leave.wait()


def _leave_value(path: str, value: object) -> None:
    try:
        content = pickle.dumps(value)
    except Exception as error:
        error.add_note(
            f"fulmen: the value that the function returned on rank 0, a {type(value).__name__}, cannot be brought back "
            "to the process that launched it. Return numbers, tensors, or nothing."
        )
        raise
    Path(path).write_bytes(content)
