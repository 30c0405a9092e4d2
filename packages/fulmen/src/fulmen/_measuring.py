"""Measuring: a run's callables, measured by the user's profiler under Lightning's names of actions.

Everything is wrapped while a run is composed. Without a profiler each callable comes back as it is, so nobody pays for
what nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from fulmen._module_hooks import CheckpointHooks, DataHooks, ModuleHooks
from fulmen.callbacks.callback import Callback
from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule
from fulmen.profilers.base import PassThroughProfiler
from fulmen_fabric.abilities import supports
from fulmen_protocols import SupportsModuleRecording, SupportsRunParts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fulmen.trainer import Trainer
    from fulmen_protocols import Profiler

__all__ = ["Measuring", "prepare"]

# Hooks that are called whether or not somebody overrides them, and do nothing unless.
_IDLE = frozenset(
    getattr(kind, name)
    for kind, names in (
        (Callback, ("on_load_checkpoint", "on_save_checkpoint")),
        (CheckpointHooks, ("on_load_checkpoint", "on_save_checkpoint")),
        (DataHooks, ("prepare_data", "setup", "teardown")),
        (LightningDataModule, ("load_state_dict", "state_dict")),
        (LightningModule, ("configure_callbacks",)),
        (ModuleHooks, ("configure_model",)),
    )
    for name in names
)

F = TypeVar("F", bound="Callable[..., Any]")


class Measuring:
    """Names and wraps what is measured.

    Args:
        profiler: the user's; None, or one that measures nothing: every callable is returned as it is.
        strategy: named in the actions that it is asked to do.
    """

    def __init__(self, profiler: Profiler | None = None, strategy: object = None) -> None:
        self._profiler = None if type(profiler) is PassThroughProfiler else profiler
        self._parts: SupportsRunParts | None = None
        if profiler is not None and supports(profiler, SupportsRunParts):
            self._parts = profiler
        self._strategy = type(strategy).__name__
        self._open: list[str] = []

    @property
    def is_on(self) -> bool:
        """Whether anything is measured."""
        return self._profiler is not None

    def action(self, name: str, function: F) -> F:
        """``function``, measured as ``name``."""
        profiler = self._profiler
        if profiler is None:
            return function
        start, stop = profiler.start, profiler.stop

        def measured(*args: Any, **kwargs: Any) -> Any:
            start(name)
            try:
                return function(*args, **kwargs)
            finally:
                stop(name)

        return measured  # type: ignore[return-value]  # it takes and returns what function does

    def hook(self, owner: object, name: str, function: F) -> F:
        """A hook of the module, the datamodule or a callback. One that does nothing, by nature, is not measured."""
        if self._profiler is None or getattr(function, "__func__", function) in _IDLE:
            return function
        return self.action(f"{_label(owner)}.{name}", function)

    def strategy(self, name: str, function: F) -> F:
        """What the strategy does: steps, the backward pass, moving a batch."""
        return function if self._profiler is None else self.action(f"[Strategy]{self._strategy}.{name}", function)

    # ------------------------------------------------------------------ parts of the run, for who divides its time

    def part(self, name: str, function: F) -> F:
        """``function``, which is the part ``name`` of the run."""
        parts = self._parts
        if parts is None:
            return function

        def told(*args: Any, **kwargs: Any) -> Any:
            parts.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                parts.leave(name)

        return told  # type: ignore[return-value]  # it takes and returns what function does

    def enter(self, part: str) -> None:
        """A part begins that ends elsewhere."""
        if self._parts is not None:
            self._parts.enter(part)

    def leave(self, part: str) -> None:
        """It ends."""
        if self._parts is not None:
            self._parts.leave(part)

    @property
    def row(self) -> Callable[[], Mapping[str, float]] | None:
        """Gives what the profiler wants loggers to have beside each row of training; None: nothing."""
        return None if self._parts is None else self._parts.row

    # ------------------------------------------------------------------ what is no call

    def begin(self, name: str) -> None:
        """An action begins that ends elsewhere. Once it runs, nothing more happens."""
        if self._profiler is not None and name not in self._open:
            self._profiler.start(name)
            self._open.append(name)

    def end(self, name: str) -> None:
        """It ends, if it runs."""
        if self._profiler is not None and name in self._open:
            self._open.remove(name)
            self._profiler.stop(name)

    def close(self) -> None:
        """End what runs, after a failure."""
        for name in reversed(self._open[:]):
            self.end(name)

    def batches(self, name: str, batches: Iterable[tuple[object, bool]]) -> Iterable[tuple[object, bool]]:
        """Pairs of a batch and whether it is the last; getting each is measured."""
        if self._profiler is None:
            return batches
        return _until_last(iter(batches), self.action(name, _next))

    def loaders(
        self, name: str, loaders: Sequence[Iterable[object]], limits: Sequence[float]
    ) -> Sequence[Iterable[object]]:
        """Loaders of which so many batches are taken; getting each is measured. Both may change until they are used."""
        return loaders if self._profiler is None else _MeasuredLoaders(loaders, self.action(name, _next), limits)


def prepare(profiler: Profiler, trainer: Trainer) -> None:
    """Tell a profiler what is about to run."""
    profiler.setup(trainer.state.fn or "fit", trainer.local_rank, trainer.log_dir)
    if supports(profiler, SupportsModuleRecording):
        profiler.record_module(trainer.lightning_module, lambda step: _expected_calls(trainer, step))


def _expected_calls(trainer: Trainer, step: str) -> float:
    """How often a step function is called without another one in between."""
    if step == "training_step":
        return min(trainer.num_training_batches, trainer.val_check_batch or float("inf"))
    loaders = {
        "validation_step": trainer.num_val_batches,
        "test_step": trainer.num_test_batches,
        "predict_step": trainer.num_predict_batches,
    }
    return sum(loaders[step])


def _label(owner: object) -> str:
    if isinstance(owner, LightningModule):
        return f"[LightningModule]{type(owner).__name__}"
    if isinstance(owner, LightningDataModule):
        return f"[LightningDataModule]{type(owner).__name__}"
    return f"[Callback]{getattr(owner, 'state_key', type(owner).__qualname__)}"


_END: Any = object()


def _next(iterator: Iterator[Any]) -> Any:
    return next(iterator, _END)


def _until_last(
    iterator: Iterator[tuple[object, bool]], get: Callable[[Iterator[Any]], Any]
) -> Iterator[tuple[object, bool]]:
    while (item := get(iterator)) is not _END:
        yield item
        if item[1]:  # asking once more would count a batch that is none
            return


class _MeasuredLoaders(Sequence[Iterable[object]]):
    """Loaders whose batches are measured."""

    def __init__(
        self, loaders: Sequence[Iterable[object]], get: Callable[[Iterator[Any]], Any], limits: Sequence[float]
    ) -> None:
        self._loaders, self._get, self._limits = loaders, get, limits

    def __len__(self) -> int:
        return len(self._loaders)

    @overload
    def __getitem__(self, index: int) -> Iterable[object]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Iterable[object]]: ...
    def __getitem__(self, index: int | slice) -> Iterable[object] | Sequence[Iterable[object]]:
        if isinstance(index, slice):
            return _MeasuredLoaders(self._loaders[index], self._get, self._limits[index])
        return self._batches(self._loaders[index], self._limits[index])

    def _batches(self, loader: Iterable[object], limit: float) -> Iterator[object]:
        iterator, taken = iter(loader), 0
        while taken < limit and (batch := self._get(iterator)) is not _END:
            taken += 1
            yield batch
