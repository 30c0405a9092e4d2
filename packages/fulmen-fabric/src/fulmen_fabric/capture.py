"""A whole optimizer step as a CUDA graph: recorded once for each shape of its inputs, then replayed.

A replay costs the host one call, however many kernels the step has, which is what small models on fast devices wait
for. Source: PyTorch, "CUDA semantics", section "CUDA Graphs" (whole-network capture).
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_fabric.transfer import map_leaves
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationRuntimeError,
    OwnsBackward,
    OwnsOptimizerStep,
    SupportsGradScaling,
    missing_members,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer

    from fulmen_fabric.assembly import Assembly

__all__ = ["CapturedStep", "why_not_captured"]

P = ParamSpec("P")
R = TypeVar("R")


def why_not_captured(assembly: Assembly, device: torch.device) -> str | None:
    """Why steps of this run are not captured, or None if they are."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, and this run is on {device.type!r}"
    if assembly.world_size > 1:
        return f"a step of {assembly.world_size} processes communicates, and only steps of one process are captured"
    if not missing_members(SupportsGradScaling, assembly.precision):
        return f"precision {assembly.precision_name!r} asks the device after each step whether gradients are finite"
    if not (missing_members(OwnsBackward, assembly.strategy) and missing_members(OwnsOptimizerStep, assembly.strategy)):
        return f"the engine of strategy {assembly.strategy_name!r} runs the step itself"
    return None


class CapturedStep(Generic[P, R]):
    """Calls ``step``; on CUDA, from the second call with the same shapes on, by replaying a graph of it.

    The results are those of calling ``step`` itself, random numbers included. ``step`` must be a whole update: forward,
    ``zero_grad``, backward, optimizer step; what it returns are tensors, or nothing. While it is replayed its Python
    does not run: counters and logging belong outside.

    - The first ``warmup`` calls of each shape run as they are, on a stream of their own, as recording demands.
    - A recording holds for the shapes, dtypes and plain values of the arguments, for training or evaluation mode, and
      for the optimizers' settings. A learning rate that is a CUDA tensor may change freely; each new value of one that
      is a number is a new recording. Beyond ``max_graphs`` of them steps run as they are, with one warning.
    """

    def __init__(
        self,
        step: Callable[P, R],
        *,
        device: torch.device,
        optimizers: Callable[[], Iterable[Optimizer]],
        reason: str | None,
        modules: Callable[[], Iterable[torch.nn.Module]] = tuple,
        warmup: int = 3,
        max_graphs: int = 16,
    ) -> None:
        """Record nothing yet.

        Args:
            step: the user's function.
            device: of this process.
            optimizers: those that a step may use, asked at each call.
            reason: why nothing is to be recorded, or None.
            modules: those whose mode counts.
            warmup: calls before the recording, at least 1: an optimizer makes its state in its first step.
            max_graphs: recordings to keep; each holds the memory of a step.
        """
        self._step, self._device = step, device
        self._optimizers, self._modules = optimizers, modules
        self.reason = reason
        """Why steps are not captured but called; None where they are captured."""
        self._warmup, self._max_graphs = warmup, max_graphs
        self._used: set[int] = set()  # optimizers that the step steps
        self._calls: dict[object, int] = {}
        self._recordings: dict[object, _Recording] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # Any: torch's name for the handle of a memory pool is private
        self._has_warned = False

    @property
    def graphs(self) -> int:
        """How many recordings there are."""
        return len(self._recordings)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """``step(*args, **kwargs)``.

        Raises:
            MisconfigurationException: an argument is on another device, or an optimizer was not made for capturing.
            MisconfigurationRuntimeError: the step does what cannot be captured, such as waiting for the device.
        """
        if self.reason is not None:
            return self._step(*args, **kwargs)
        shape = _signature((args, kwargs), self._device)
        key = (shape, torch.is_grad_enabled(), self._settings())
        recording = self._recordings.get(key)
        if recording is None:
            done = self._calls.get(shape, 0)
            if done < self._warmup:
                self._calls[shape] = done + 1
                return self._run_aside(args, kwargs)
            if len(self._recordings) >= self._max_graphs:
                self._warn_of_too_many()
                # Not on the stream around: gradients are accumulated where the first backward pass ran.
                return self._run_aside(args, kwargs)
            recording = self._recordings[key] = self._record(args, kwargs)
        return cast("R", recording.replay(args, kwargs))

    def _settings(self) -> tuple[object, ...]:
        found: list[object] = [module.training for module in self._modules()]
        for optimizer in self._optimizers():
            if id(optimizer) in self._used:
                for group in optimizer.param_groups:
                    found.extend(_setting(value) for name, value in group.items() if name != "params")
        return tuple(found)

    def _run_aside(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> R:
        if self._stream is None:
            # Any: torch does not annotate how a stream is made.
            self._stream = cast("torch.cuda.Stream", cast("Any", torch.cuda).Stream(self._device))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        step = cast("Callable[..., R]", self._step)
        hooks = [one.register_step_pre_hook(self._see_step) for one in self._optimizers()]
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                # The optimizer is right that this step is not captured; others are.
                warnings.filterwarnings("ignore", message=".*capturable=True.*without CUDA graph capture")
                result = step(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return result

    def _see_step(self, optimizer: Optimizer, *_: object) -> None:
        self._used.add(id(optimizer))
        if any(group.get("capturable") is False for group in optimizer.param_groups):
            kind = type(optimizer).__name__
            raise MisconfigurationException(
                f"{kind}(capturable=False) counts its steps on the host, which a replay would not do. Make it with "
                f"{kind}(..., capturable=True) to use fabric.capture()."
            )

    def _record(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        inputs = map_leaves(_own, [args, dict(kwargs)])
        own_args, own_kwargs = cast("tuple[tuple[object, ...], dict[str, object]]", inputs)
        step = cast("Callable[..., object]", self._step)
        # A recording that fails leaves the generator registered with it; a copy of its state takes its place.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = step(*own_args, **own_kwargs)
        except RuntimeError as error:
            generator.graphsafe_set_state(before)
            _end_recording(self._pool)
            raise MisconfigurationRuntimeError(
                f"{_name(self._step)} cannot be captured: {str(error).splitlines()[0]} Within a captured step nothing "
                "may wait for the device (.item(), print of a tensor, `if` on one, a copy to the CPU). Move that out, "
                "or call the step without fabric.capture()."
            ) from error
        return _Recording(graph, inputs, outputs)

    def _warn_of_too_many(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{_name(self._step)} was captured {self._max_graphs} times (max_graphs), and the next step differs "
                "from all of them in shapes, values or optimizer settings: it runs without capture. Make learning "
                "rates that change CUDA tensors, pad batches to few shapes, or raise max_graphs."
            )


class _Recording:
    """A graph with the memory that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: object, outputs: object) -> None:
        self._graph, self._outputs = graph, outputs
        self._inputs = [one.detach() for one in _tensors(inputs)]

    def replay(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        for own, given in zip(self._inputs, _tensors([args, dict(kwargs)]), strict=True):
            own.copy_(given.detach(), non_blocking=True)
        self._graph.replay()
        # The next replay writes over its outputs: what the caller gets stays as it is.
        return map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, self._outputs)


def _end_recording(pool: object) -> None:
    """Tell the allocator that a recording which failed is over.

    Before 2.12 torch does not (https://github.com/pytorch/pytorch/pull/180395), and for as long as a recording goes on
    the allocator gives no cached memory back to the device, not even where the program would run out of it.
    """
    # Any: torch does not annotate its private functions.
    end: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)  # pyright: ignore[reportPrivateUsage]
    if end is not None:
        with contextlib.suppress(RuntimeError):  # it is over already
            end(torch.cuda.current_device(), pool)


def _own(leaf: object) -> object:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _tensors(data: object) -> list[Tensor]:
    found: list[Tensor] = []

    def note(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    map_leaves(note, data)
    return found


def _signature(data: object, device: torch.device) -> object:
    """What must be equal for a recording to serve, as something that can be a key."""
    if isinstance(data, Tensor):
        if data.device != device:
            raise MisconfigurationException(
                f"a captured step got a tensor of shape {tuple(data.shape)} on {data.device}, and this process "
                f"computes on {device}. Move it there first: fabric.to_device(), or a loader of setup_dataloaders()."
            )
        return (data.shape, data.dtype, data.requires_grad)
    if isinstance(data, Mapping):
        entries = cast("Mapping[object, object]", data)
        return (type(entries), *((key, _signature(value, device)) for key, value in entries.items()))
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        items = cast("Sequence[object]", data)
        return (type(items), *(_signature(item, device) for item in items))
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        names = [one.name for one in dataclasses.fields(data)]
        return (type(data), *(_signature(getattr(data, name, None), device) for name in names))
    try:
        hash(data)
    except TypeError:
        raise MisconfigurationException(
            f"a captured step got a {type(data).__name__}, of which nobody can tell whether it has changed. Pass "
            "tensors, numbers, strings, and lists, mappings or dataclasses of them."
        ) from None
    return (type(data), data)


def _setting(value: object) -> object:
    """A tensor may change its value: the graph reads it where it is."""
    if isinstance(value, Tensor):
        return ("tensor", value.data_ptr())
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


def _name(step: object) -> str:
    return f"{getattr(step, '__qualname__', type(step).__name__)}()"
