"""Who has allocated what, and when: every storage that appears while the mode is on, until it is freed."""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["AllocationRecorder", "local_tensors", "storage_bytes"]

# An all-gather's and a reduce-scatter's buffers are arguments of these operators. Tensor parallel's collectives are in
# a namespace of their own: what they return is an activation like any other.
_COMMUNICATION = frozenset({"c10d", "fsdp"})


@dataclass(slots=True, eq=False)
class _Record:
    """One storage. Its purpose may become known only later: a buffer in the backward pass, then a gradient."""

    size: int
    purpose: str
    is_open: bool = True
    """Whether the purpose is only what the phase of the step suggests."""
    alive: weakref.ref[Any] | None = field(default=None, repr=False)


class AllocationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Records the size of every storage that operators return, as the device's allocator would count it.

    Args:
        granularity: bytes to which the device's allocator rounds up.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # its owner has left it untyped
        self._granularity = granularity
        self._records: dict[int, _Record] = {}
        self._events: list[tuple[_Record, int]] = []
        self._marks: list[tuple[int, str]] = [(0, "forward")]
        self._purpose = "activations"
        self._resize: Callable[..., Any] | None = None
        self._guess: Callable[..., Any] | None = None
        self._is_guessing = False

    # ------------------------------------------------------------------ what is recorded

    def __enter__(self) -> AllocationRecorder:
        # FSDP empties and refills the storages of gathered parameters; no operator says so.
        storages: Any = torch.UntypedStorage
        self._resize = resize = storages.resize_
        recorder = self

        def resize_and_record(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            recorder._resized(storage, size)
            return result

        storages.resize_ = resize_and_record  # put back in __exit__
        # To learn the shape of a result, DTensor runs each operator once on fake tensors of the whole shapes.
        propagator: Any = ShardingPropagator
        self._guess = guess = propagator._propagate_tensor_meta_non_cached

        def guess_unrecorded(*args: Any, **kwargs: Any) -> Any:
            before, recorder._is_guessing = recorder._is_guessing, True
            try:
                return guess(*args, **kwargs)
            finally:
                recorder._is_guessing = before

        propagator._propagate_tensor_meta_non_cached = guess_unrecorded
        super().__enter__()  # type: ignore[no-untyped-call]  # its owner has left it untyped
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # its owner has left it untyped
        storages: Any = torch.UntypedStorage
        storages.resize_ = self._resize
        propagator: Any = ShardingPropagator
        propagator._propagate_tensor_meta_non_cached = self._guess

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it will come again with the tensors of this rank
        result = func(*args, **(kwargs or {}))
        if self._is_guessing:
            return result
        for tensor in _tensors(result):
            self._see(tensor, self._purpose)
        if func.namespace in _COMMUNICATION:
            for tensor in _tensors((args, kwargs or {}, result)):
                self._assign(tensor, "communication", only_open=True)
        return result

    def assign(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Say what ``tensors`` are for, now and at every moment since they were made."""
        for tensor in tensors:
            for local in local_tensors(tensor):
                self._assign(local, purpose)

    def enter_phase(self, phase: str) -> None:
        """From here on the step is in ``phase``: ``"forward"``, ``"backward"`` or ``"optimizer step"``."""
        self._purpose = "activations" if phase == "forward" else "temporaries"
        self._marks.append((len(self._events), phase))

    def _see(self, tensor: Tensor, purpose: str) -> _Record | None:
        storage = _storage(tensor)
        if storage is None:
            return None
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]  # its address; wrappers of it come and go
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(0, purpose)
            record.alive = weakref.ref(storage, lambda _: self._freed(key))
            self._change(record, storage.nbytes())
        return record

    def _assign(self, tensor: Tensor, purpose: str, *, only_open: bool = False) -> None:
        record = self._see(tensor, purpose)
        if record is not None and (record.is_open or not only_open):
            record.purpose, record.is_open = purpose, False

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        record = self._records.get(storage._cdata)  # pyright: ignore[reportPrivateUsage]
        if record is not None:
            self._change(record, size)

    def _freed(self, key: int) -> None:
        self._change(self._records.pop(key), 0)

    def _change(self, record: _Record, size: int) -> None:
        rounded = -(-size // self._granularity) * self._granularity
        if rounded != record.size:
            self._events.append((record, rounded - record.size))
            record.size = rounded

    # ------------------------------------------------------------------ what it amounts to

    def alive(self) -> dict[str, int]:
        """Bytes by purpose, now."""
        found: defaultdict[str, int] = defaultdict(int)
        for record in self._records.values():
            found[record.purpose] += record.size
        return dict(found)

    def at_first(self, phase: str, *, since: int = 0) -> dict[str, int]:
        """Bytes by purpose when ``phase`` began first after ``since`` events."""
        ends = [place for place, name in self._marks if name == phase and place >= since]
        return dict(_totals(self._events[: ends[0]])) if ends else {}

    def position(self) -> int:
        """Number of events so far."""
        return len(self._events)

    def peak(self, *, since: int) -> tuple[int, str, dict[str, int], dict[str, int]]:
        """The largest total after ``since`` events, the phase it was in, what it consisted of, and each purpose's most.

        Of equal peaks the first counts.
        """
        totals = _totals(self._events[:since])
        most = dict(totals)
        total = highest = sum(totals.values())
        place, content = since, dict(totals)
        for index, (record, delta) in enumerate(self._events[since:], since + 1):
            totals[record.purpose] += delta
            most[record.purpose] = max(most.get(record.purpose, 0), totals[record.purpose])
            total += delta
            if total > highest:
                highest, place, content = total, index, dict(totals)
        phase = [name for mark, name in self._marks if mark < max(place, 1)][-1]
        return highest, phase, content, most


def _totals(events: Iterable[tuple[_Record, int]]) -> defaultdict[str, int]:
    totals: defaultdict[str, int] = defaultdict(int)
    for record, delta in events:
        totals[record.purpose] += delta
    return totals


def _tensors(tree: object) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors and the like have none
        return None


def local_tensors(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of which this rank's part of ``tensor`` consists."""
    if isinstance(tensor, DTensor):
        return local_tensors(tensor._local_tensor)  # pyright: ignore[reportPrivateUsage]  # to_local() makes a new one
    wrapper: object = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        return [tensor]
    return [inner for name in wrapper.__tensor_flatten__()[0] for inner in local_tensors(getattr(wrapper, name))]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts of ``tensors``, each counted once."""
    found: dict[int, int] = {}
    for tensor in tensors:
        for local in local_tensors(tensor):
            found[id(local)] = local.numel() * local.element_size()
    return sum(found.values())
