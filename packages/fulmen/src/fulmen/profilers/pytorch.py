"""PyTorchProfiler: what torch does in a few steps of a run, operator by operator, on the host and on the device."""

from __future__ import annotations

import inspect
import math
import os
import tempfile
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerAction, ProfilerActivity

from fulmen import _files
from fulmen.profilers._window import Window
from fulmen.profilers.profiler import Profiler
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_protocols import BackendUnavailable, MisconfigurationException, MisconfigurationTypeError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from torch import nn

__all__ = ["PyTorchProfiler"]

# The default schedule, in steps; an epoch with fewer than their sum is recorded from its first step on.
_WAIT, _WARMUP, _ACTIVE = 1, 1, 3
_OWN_OPTIONS = ("export_to_flame_graph", "metric")


class PyTorchProfiler(Profiler):
    """Records some steps with ``torch.profiler``: a table of operators, and a trace for Chrome or TensorBoard.

    Each step function (``training_step``, ``validation_step``, ``test_step``, ``predict_step``) has its own count of
    steps and is recorded once per call of the Trainer. A recorded step reaches to the beginning of the next one, so it
    holds backward pass and optimizer step. A recording ends early where another step function begins. Validation is
    counted from the first training step on: the sanity check is not recorded.

    Args:
        dirpath: folder of the report and the traces; None: the Trainer's ``log_dir``.
        filename: part of the files' names; None: local rank 0 logs the report.
        group_by_input_shapes: one row of the table for each shape of an operator's inputs.
        emit_nvtx: mark operators and actions for ``nsys`` or ``nvprof`` instead of recording; needs a CUDA device.
        export_to_chrome: write the trace of each recording.
        row_limit: rows of the table; -1: all.
        sort_by_key: column that the table is sorted by, one of ``AVAILABLE_SORT_KEYS``. None: time on the device where
            one is recorded, else on the CPU.
        record_module_names: label the forward pass of every submodule in the trace.
        table_kwargs: further arguments of ``torch.autograd.profiler_util.EventList.table``.
        profiler_kwargs: arguments of ``torch.profiler.profile``. ``schedule`` maps a step's index to a
            ``ProfilerAction``; by default one step is left out, one warms up, three are recorded. ``on_trace_ready``
            takes the place of writing traces. Also ``export_to_flame_graph`` (write stacks, needs no other argument)
            and ``metric`` (what they count: ``self_cpu_time_total`` or ``self_cuda_time_total``).

    Raises:
        MisconfigurationException: an argument that is unknown, contradicts another or cannot work here.
    """

    STEP_FUNCTIONS = frozenset({"training_step", "validation_step", "test_step", "predict_step"})
    AVAILABLE_SORT_KEYS = frozenset(
        {
            "cpu_time",
            "cuda_time",
            "cpu_time_total",
            "cuda_time_total",
            "cpu_memory_usage",
            "cuda_memory_usage",
            "self_cpu_memory_usage",
            "self_cuda_memory_usage",
            "count",
        }
    )

    def __init__(
        self,
        dirpath: str | PathLike[str] | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        if emit_nvtx and not torch.cuda.is_available():
            raise BackendUnavailable(
                "PyTorchProfiler(emit_nvtx=True) marks a trace of CUDA's profiler, and no CUDA device was found. "
                "Leave emit_nvtx at False."
            )
        if not emit_nvtx and not torch.profiler.kineto_available():
            raise BackendUnavailable(
                "PyTorchProfiler needs Kineto, which this build of torch lacks. Use a torch built with it, or "
                "SimpleProfiler."
            )
        options = _checked_options(profiler_kwargs)
        schedule = options.pop("schedule", None)
        self._schedule = None if schedule is None else _checked_schedule(schedule)
        self._on_trace_ready: Callable[[torch.profiler.profile], object] | None = options.pop("on_trace_ready", None)
        self._flame_graph = bool(options.pop("export_to_flame_graph", False))
        self._metric = str(options.pop("metric", "self_cpu_time_total"))
        if self._flame_graph:
            options["with_stack"] = True
        if group_by_input_shapes and not options.setdefault("record_shapes", True):
            raise MisconfigurationException(
                "PyTorchProfiler got group_by_input_shapes=True and record_shapes=False: without shapes nothing can be "
                "grouped by them. Drop one of the two."
            )
        activities = options.get("activities")
        options["activities"] = _default_activities() if activities is None else list(activities)
        on_device = any(activity is not ProfilerActivity.CPU for activity in options["activities"])
        self._options = options
        self._sort_by_key = sort_by_key or ("cuda_time_total" if on_device else "cpu_time_total")
        if self._sort_by_key not in self.AVAILABLE_SORT_KEYS:
            hint = did_you_mean(self._sort_by_key, self.AVAILABLE_SORT_KEYS)
            raise MisconfigurationException(
                f"PyTorchProfiler got sort_by_key={sort_by_key!r}.{hint} "
                f"Allowed: {', '.join(sorted(self.AVAILABLE_SORT_KEYS))}."
            )
        self._table_kwargs = _checked_table_arguments(table_kwargs or {})
        self._group_by_input_shapes, self._emit_nvtx = group_by_input_shapes, emit_nvtx
        self._export_to_chrome, self._row_limit = export_to_chrome, row_limit
        self._record_module_names = record_module_names

        self.function_events: EventList | None = None
        """Everything that the last recording saw."""
        self._module: nn.Module | None = None
        self._expected_calls: Callable[[str], float] | None = None
        self._window: Window | None = None
        self._nvtx: list[Any] = []
        self._labels: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._calls: dict[str, int] = defaultdict(int)
        self._recorded: dict[str, Any] = {}
        self._finished: set[str] = set()
        self._default_schedules: dict[str, Callable[[int], ProfilerAction]] = {}

    # ------------------------------------------------------------------ what the Trainer calls

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Start counting steps anew."""
        super().setup(stage, local_rank, log_dir)
        self._forget()

    def record_module(self, module: nn.Module, expected_calls: Callable[[str], float]) -> None:
        """Learn whose submodules to label, and ask how often a step function will be called in a row."""
        self._module, self._expected_calls = module, expected_calls

    def start(self, action_name: str) -> None:
        """Begin an action; one whose name ends in a step function is a step."""
        if self._emit_nvtx:
            if not self._nvtx:
                self._begin_nvtx()
        else:
            step = action_name.rpartition(".")[2]
            if step in self.STEP_FUNCTIONS:
                self._begin_step(step, action_name)
            if self._window is None or not self._window.is_recording:
                return
        if action_name not in self._labels:
            label: Any = record_function(f"[pl][profile]{action_name}")
            label.__enter__()
            self._labels[action_name] = label

    def stop(self, action_name: str) -> None:
        """End an action. One that began before the recording is not in it."""
        label = self._labels.pop(action_name, None)
        if label is not None:
            label.__exit__(None, None, None)

    def summary(self) -> str:
        """A table of operators for each step function that was recorded; ends a recording that runs."""
        self._end_window()
        tables: dict[str, str] = {
            action: averages.table(sort_by=self._sort_by_key, row_limit=self._row_limit, **self._table_kwargs)
            for action, averages in self._recorded.items()
        }
        return self._stats_to_str(tables) if tables else ""

    def teardown(self, stage: str | None) -> None:
        """End what is being recorded, also after a failure, and let the module go."""
        for action in reversed(list(self._labels)):
            self.stop(action)
        self._end_window()
        while self._nvtx:
            self._nvtx.pop().__exit__(None, None, None)
        self._module = self._expected_calls = None

    # ------------------------------------------------------------------ recording

    def _begin_step(self, step: str, action: str) -> None:
        window = self._window
        if window is not None and (window.step != step or window.is_last):
            self._end_window()
        in_sanity_check = self._stage == "fit" and step == "validation_step" and not self._calls["training_step"]
        if in_sanity_check or step in self._finished:
            return
        index = self._calls[step]
        self._calls[step] += 1
        wanted = (self._schedule or self._default_schedule(step))(index)
        if wanted is ProfilerAction.NONE:
            self._end_window()
            return
        if self._window is None:
            module = self._module if self._record_module_names else None
            self._window = Window(step, action, lambda: torch.profiler.profile(**self._options), module)
        self._window.begin_step(index, record=wanted is not ProfilerAction.WARMUP)
        self._window.is_last = wanted is ProfilerAction.RECORD_AND_SAVE

    def _default_schedule(self, step: str) -> Callable[[int], ProfilerAction]:
        known = self._default_schedules.get(step)
        if known is not None:
            return known
        expected = math.inf if self._expected_calls is None else self._expected_calls(step)
        if expected >= _WAIT + _WARMUP + _ACTIVE:
            chosen = _schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1)
        else:
            count = max(1, int(expected))
            rank_zero_info(
                f"PyTorchProfiler records {step} from its first call on: only {count} in a row are expected, and "
                f"the default schedule needs {_WAIT + _WARMUP + _ACTIVE}."
            )
            chosen = partial(_record_first, count)
        self._default_schedules[step] = chosen
        return chosen

    def _end_window(self) -> None:
        window, self._window = self._window, None
        if window is None:
            return
        for action in reversed(list(self._labels)):
            self.stop(action)
        if not window.end():
            return
        self._finished.add(window.step)
        profile = window.profile
        untyped = cast("Any", profile)
        self.function_events = untyped.events()
        self._recorded[window.action] = untyped.key_averages(group_by_input_shape=self._group_by_input_shapes)
        if self._on_trace_ready is not None:
            self._on_trace_ready(profile)
        else:
            self._export(profile, window.action)

    def _export(self, profile: torch.profiler.profile, action: str) -> None:
        if not self._export_to_chrome and not self._flame_graph:
            return
        if self.dirpath is None:
            rank_zero_warn(
                "PyTorchProfiler has no folder to write its trace to. Give dirpath=, or export_to_chrome=False."
            )
            return
        folder = str(self.dirpath)
        _files.make_folder(folder)
        if self._export_to_chrome:
            # The ending is what TensorBoard's plugin looks for; the time keeps an earlier run's trace.
            name = self._prepare_filename(action, f".{time.time_ns()}.pt.trace.json")
            _write(profile.export_chrome_trace, _files.join(folder, name))
        if self._flame_graph:
            path = _files.join(folder, self._prepare_filename(action, ".stack"))
            _write(lambda local: profile.export_stacks(local, self._metric), path)

    def _begin_nvtx(self) -> None:
        shapes = bool(self._options.get("record_shapes", False))
        marks: Any = torch.autograd.profiler.emit_nvtx
        for context in (torch.cuda.profiler.profile(), marks(record_shapes=shapes)):
            context.__enter__()
            self._nvtx.append(context)


# Untyped in torch's stubs.
_schedule = cast("Callable[..., Callable[[int], ProfilerAction]]", torch.profiler.schedule)


def _record_first(count: int, index: int) -> ProfilerAction:
    return ProfilerAction.RECORD if index < count - 1 else ProfilerAction.RECORD_AND_SAVE


def _write(export: Callable[[str], object], path: str) -> None:
    """Let torch write a local file, and copy it where ``path`` is a URL."""
    if _files.is_local(path):
        export(_files.absolute(path))
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "trace")
        export(local)
        with open(local, "rb") as file:
            _files.write_bytes(path, file.read())


def _default_activities() -> list[ProfilerActivity]:
    supported = cast("Any", torch.profiler).supported_activities()
    return [a for a in (ProfilerActivity.CPU, ProfilerActivity.CUDA) if a in supported]


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    known = [*list(inspect.signature(torch.profiler.profile.__init__).parameters)[1:], *_OWN_OPTIONS]
    for name in options:
        if name not in known:
            raise MisconfigurationException(
                f"PyTorchProfiler got the unknown argument {name!r}.{did_you_mean(name, known)} Beside its own it "
                f"takes those of torch.profiler.profile: {', '.join(sorted(known))}."
            )
    return dict(options)


def _checked_schedule(schedule: object) -> Callable[[int], ProfilerAction]:
    if not callable(schedule):
        raise MisconfigurationTypeError(
            f"PyTorchProfiler got schedule={schedule!r}, which cannot be called. Give torch.profiler.schedule(...), or "
            "a function from a step's index to a torch.profiler.ProfilerAction."
        )
    action: object = schedule(0)
    if not isinstance(action, ProfilerAction):
        raise MisconfigurationTypeError(
            f"PyTorchProfiler's schedule returned {action!r} for step 0. Return a torch.profiler.ProfilerAction."
        )
    return cast("Callable[[int], ProfilerAction]", schedule)


def _checked_table_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    own = {"sort_by": "sort_by_key", "row_limit": "row_limit"}
    known = [name for name in inspect.signature(cast("Any", EventList).table).parameters if name not in ("self", *own)]
    for name in arguments:
        if name in own:
            raise MisconfigurationException(
                f"PyTorchProfiler got {name!r} in table_kwargs. Give it as the profiler's own argument {own[name]}."
            )
        if name not in known:
            raise MisconfigurationException(
                f"PyTorchProfiler got the unknown key {name!r} in table_kwargs.{did_you_mean(name, known)} "
                f"Allowed: {', '.join(sorted(known))}."
            )
    return dict(arguments)
