"""Batches of a loader on an XLA device, uploaded in the background while the device computes."""

from __future__ import annotations

import queue
from collections import deque
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fulmen_protocols.nested import map_instances
from fulmen_xla._host import tensors_of
from fulmen_xla._library import library

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import torch

__all__ = ["XLADeviceLoader"]


class XLADeviceLoader:
    """Iterates over a loader through torch-xla's ``MpDeviceLoader``, which also cuts the graph after each batch.

    Batches are taken from the loader in the thread that iterates, one ahead of the batch in hand, so that random draws
    of samplers and data sets come in one order in every run; only the upload runs in threads of its own. Containers
    keep their type. An error of the loader is raised at the batch it belongs to. Whoever stops early leaves no thread
    behind.

    Args:
        loader: gives the batches: nested mappings, lists, tuples and dataclass instances with tensors.
        device: where they go.
        ahead: how many batches are on their way to the device while one is in hand, at least 1.
        input_sharding: how tensors are spread over devices, an object with ``minibatch`` and ``xla_spec`` as
            torch-xla's ``ShardingSpec`` has them; None: they are not.
    """

    def __init__(
        self, loader: Iterable[object], device: torch.device, *, ahead: int = 1, input_sharding: object = None
    ) -> None:
        self._loader = loader
        self._device = device
        self._ahead = max(1, ahead)
        self._sharding = input_sharding

    def __iter__(self) -> Generator[object]:
        source = iter(self._loader)
        # torch-xla sees flat lists of tensors: it would turn tuples into lists, and rewrite what else is in a batch.
        to_upload: queue.SimpleQueue[object] = queue.SimpleQueue()
        taken: deque[object] = deque()
        uploader = library("distributed.parallel_loader").MpDeviceLoader(
            iter(to_upload.get, _END),
            self._device,
            # Of 1: a larger one waits until as many batches are there before it uploads the first.
            device_prefetch_size=1,
            loader_prefetch_size=self._ahead + 1,
            input_sharding=self._sharding,
        )
        uploaded: Any = iter(uploader)
        failure: Exception | None = None
        is_over = False
        try:
            while True:
                while not is_over and len(taken) <= self._ahead:
                    try:
                        batch = next(source, _END)
                    except Exception as error:  # noqa: BLE001  # raised below, when the batches before it are used
                        failure, batch = error, _END
                    if batch is _END:
                        is_over = True
                    else:
                        taken.append(batch)
                        to_upload.put([one for one in tensors_of(batch) if one.device.type == "cpu"])
                if not taken:
                    break
                yield _with_uploaded(taken.popleft(), next(uploaded))
            library().sync()
            if failure is not None:
                raise failure
        finally:
            to_upload.put(_END)
            uploader._parallel_loader.close()

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the user's, or a TypeError


def _with_uploaded(batch: object, uploaded: list[Tensor]) -> object:
    """``batch`` with the tensors of the host replaced, in order."""
    copies = iter(uploaded)
    return map_instances(Tensor, lambda one: next(copies) if one.device.type == "cpu" else one, batch)


_END = object()
