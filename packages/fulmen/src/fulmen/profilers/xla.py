"""XLAProfiler: marks a run's steps for the profiler of Cloud TPUs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fulmen.profilers.profiler import Profiler
from fulmen_protocols import MisconfigurationException, MissingPackage

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["XLAProfiler"]

_STEPS = ("validation_step", "test_step", "predict_step")
_MARKED = ("training_step", "backward", *_STEPS)


class XLAProfiler(Profiler):
    """Marks steps and backward passes in the traces of torch-xla's profiler, which a client collects from a server.

    The server starts with the first marked action, in the process whose device it is; connect to it with TensorBoard's
    profile plugin, or ``torch_xla.debug.profiler.trace``. Steps of an evaluation are marked with their number. There is
    no report of its own.

    Args:
        port: of the server, 1 to 65535.

    Raises:
        MisconfigurationException: ``port`` is none.
        MissingPackage: torch-xla is not installed.
    """

    def __init__(self, port: int = 9012) -> None:
        if type(port) is not int or not 1 <= port <= 65535:
            raise MisconfigurationException(f"XLAProfiler(port={port!r}) is no port. Use a number between 1 and 65535.")
        if find_spec("torch_xla") is None:
            raise MissingPackage(
                f"XLAProfiler(port={port}) needs torch_xla, which is not installed. Run: pip install 'fulmen[xla]'. "
                "Without an XLA device use profiler='pytorch' or 'simple'."
            )
        super().__init__(dirpath=None, filename=None)
        self.port = port
        self._server: Any = None
        self._open: dict[str, AbstractContextManager[object]] = {}
        self._steps: dict[str, int] = {}

    def start(self, action_name: str) -> None:
        """Begin a mark, if it is a step or a backward pass."""
        kind = action_name.rpartition(".")[2]
        if kind not in _MARKED:
            return
        profiler: Any = import_module("torch_xla.debug.profiler")
        if self._server is None:
            self._server = profiler.start_server(self.port)
        if kind in _STEPS:
            self._steps[action_name] = self._steps.get(action_name, 0) + 1
            mark = profiler.StepTrace(action_name, step_num=self._steps[action_name])
        else:
            mark = profiler.Trace(action_name)
        mark.__enter__()
        self._open[action_name] = mark

    def stop(self, action_name: str) -> None:
        """End the mark, if there is one."""
        mark = self._open.pop(action_name, None)
        if mark is not None:
            mark.__exit__(None, None, None)
