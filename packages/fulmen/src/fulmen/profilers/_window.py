"""A stretch of steps that torch's profiler records, and the names of the modules that run in it."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch.autograd.profiler import record_function

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn

__all__ = ["ModuleNames", "Window"]


class ModuleNames:
    """Within the block, each submodule's forward is labelled ``[pl][module]{class}: {name}`` in a trace."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._handles: list[Any] = []
        self._running: list[Any] = []

    def __enter__(self) -> ModuleNames:
        modules = cast("Iterator[tuple[str, nn.Module]]", self._module.named_modules())
        for name, module in modules:
            if not name:
                continue
            label = f"[pl][module]{type(module).__module__}.{type(module).__name__}: {name}"
            self._handles.append(module.register_forward_pre_hook(partial(self._begin, label)))
            # Also where forward raised: a label that stays open would be put on everything that follows.
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._running:
            self._running.pop().__exit__(None, None, None)

    def _begin(self, label: str, _module: nn.Module, _args: object) -> None:
        record: Any = record_function(label)
        record.__enter__()
        self._running.append(record)

    def _end(self, _module: nn.Module, _args: object, _output: object) -> None:
        if self._running:  # the block may have begun inside this forward
            self._running.pop().__exit__(None, None, None)


class Window:
    """One recording: warmed up, then recorded, then handed over.

    Args:
        step: the step function whose calls are recorded: ``training_step``, ...
        action: the action it was called as.
        make: makes a ``torch.profiler.profile`` that was not started.
        module: labels its submodules; None: no labels.
    """

    def __init__(
        self, step: str, action: str, make: Callable[[], torch.profiler.profile], module: nn.Module | None
    ) -> None:
        self.step, self.action = step, action
        self.profile = make()
        with warnings.catch_warnings():
            # Some versions of torch say so of a first cycle, which has none before it to lose; a window has one.
            warnings.filterwarnings("ignore", "Warning: Profiler clears events")
            self.profile.prepare_trace()
        self.is_recording = False
        self.is_last = False
        """Whether the step that runs is the last one to record."""
        self._names = None if module is None else ModuleNames(module)
        self._label: Any = None

    def begin_step(self, index: int, *, record: bool) -> None:
        """A step begins; ``record`` after warming up."""
        self._end_label()
        if record and not self.is_recording:
            self.profile.start_trace()
            self.is_recording = True
            if self._names is not None:
                self._names.__enter__()
        if self.is_recording:
            # TensorBoard's plugin and the trace viewers find the steps of a trace by this name.
            self._label = record_function(f"ProfilerStep#{index}")
            self._label.__enter__()

    def end(self) -> bool:
        """Stop. Returns whether anything was recorded."""
        self._end_label()
        if self._names is not None:
            self._names.__exit__()
        if not self.is_recording:
            self.profile.start_trace()  # what is prepared can be let go of only by way of starting it
        self.profile.stop_trace()
        return self.is_recording

    def _end_label(self) -> None:
        label, self._label = self._label, None
        if label is not None:
            label.__exit__(None, None, None)
