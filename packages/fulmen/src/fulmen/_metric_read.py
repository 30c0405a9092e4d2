"""Reading device values on the host: in one read where one is due, or without waiting at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Arrival", "HostSnapshot", "read_scalars"]


def read_scalars(values: Sequence[Tensor | float]) -> list[float]:
    """Every value as a float, in order. One host read for all tensors of a device; waits for the device."""
    result = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(index)
    for indices in by_device.values():
        tensors = [value for value in map(values.__getitem__, indices) if isinstance(value, Tensor)]
        for index, number in zip(indices, _floats(_stacked(tensors)), strict=True):
            result[index] = number
    return result


def _stacked(tensors: list[Tensor]) -> Tensor:
    first = tensors[0].dtype
    if all(tensor.dtype is first for tensor in tensors):
        return torch.stack([tensor.detach().reshape(()) for tensor in tensors])
    wide = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    return torch.stack([tensor.detach().reshape(()).to(wide) for tensor in tensors])


def _floats(vector: Tensor) -> list[float]:
    return cast("list[float]", vector.tolist())


class Arrival:
    """Floats of ``values`` that come to the host while it goes on: all are taken as they are at this moment.

    What lies on CUDA devices is copied into pinned memory after the work queued there so far; what is elsewhere is read
    at once.
    """

    __slots__ = ("_copies", "_read")

    def __init__(self, values: Sequence[Tensor | float]) -> None:
        coming: dict[torch.device, list[int]] = {}
        for index, value in enumerate(values):
            if isinstance(value, Tensor) and value.device.type == "cuda":
                coming.setdefault(value.device, []).append(index)
        absent = {index for indices in coming.values() for index in indices}
        self._read = read_scalars([0.0 if index in absent else value for index, value in enumerate(values)])
        self._copies: list[tuple[list[int], Tensor, torch.Event]] = []
        for device, indices in coming.items():
            stacked = _stacked([value for value in map(values.__getitem__, indices) if isinstance(value, Tensor)])
            pinned = torch.empty(len(indices), dtype=stacked.dtype, pin_memory=True)
            pinned.copy_(stacked, non_blocking=True)
            event = torch.Event("cuda")
            event.record(torch.cuda.current_stream(device))
            self._copies.append((indices, pinned, event))

    @property
    def is_there(self) -> bool:
        """Whether ``read`` would answer at once."""
        return all(event.query() for _, _, event in self._copies)

    def read(self) -> list[float]:
        """The floats, in order; waits until they are there."""
        for indices, pinned, event in self._copies:
            event.synchronize()
            for index, number in zip(indices, _floats(pinned), strict=True):
                self._read[index] = number
        self._copies = []
        return self._read


class HostSnapshot:
    """The latest values that have reached the host by themselves.

    ``update`` never waits: it starts an asynchronous copy into pinned memory, and a later call picks it up once it
    has arrived, so what it answers is one call old. On the CPU, where reading waits for nothing, values are exact.
    Made for progress bars: on an accelerator every call costs a stack and a copy, so call it a few times a second.
    """

    __slots__ = ("_event", "_names", "_pinned", "_values")

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._names: tuple[str, ...] = ()
        self._pinned: Tensor | None = None
        self._event: torch.Event | None = None

    def update(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Host floats of ``metrics``, as fresh as they can be had without waiting; a name may still be missing."""
        tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        if all(value.device.type == "cpu" for value in tensors.values()):
            self._values = dict(zip(metrics, read_scalars(list(metrics.values())), strict=True))
            return self._values
        if self._event is not None and self._event.query() and self._pinned is not None:
            self._values.update(zip(self._names, _floats(self._pinned), strict=True))
            self._event = None
        on_device = {name: value for name, value in tensors.items() if value.device.type == "cuda"}
        if self._event is None and on_device:
            stacked = _stacked(list(on_device.values()))
            if self._pinned is None or self._pinned.shape != stacked.shape or self._pinned.dtype != stacked.dtype:
                self._pinned = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._names = tuple(on_device)
            self._pinned.copy_(stacked, non_blocking=True)
            self._event = torch.Event("cuda")
            self._event.record()
        on_host = {name: value for name, value in metrics.items() if name not in on_device}
        readable = {name: value for name, value in on_host.items() if not _waits(value)}
        self._values.update(zip(readable, read_scalars(list(readable.values())), strict=True))
        return {name: self._values[name] for name in metrics if name in self._values}

    def set(self, values: Mapping[str, float]) -> None:
        """Take values that were read anyway, at a declared point."""
        self._values.update(values)


def _waits(value: Tensor | float) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
