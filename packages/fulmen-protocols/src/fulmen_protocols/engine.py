"""What an engine may take over from a run, beyond backward, step and accumulation: abilities of a ``Strategy``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

__all__ = [
    "OwnsCheckpoints",
    "OwnsGradClipping",
    "OwnsOptimizers",
    "OwnsSchedulers",
    "SupportsBatchSize",
    "SupportsWindowEnds",
]


@runtime_checkable
class OwnsGradClipping(Protocol):
    """A strategy whose engine clips gradients inside its step; nothing else in the run then clips."""

    def set_clipping(self, value: float | None, algorithm: Literal["norm", "value"] = "norm") -> None:
        """Clip to ``value`` before every step; None: as the engine's own settings say. Called before ``place``.

        Raises:
            ValueError: the engine cannot clip so; the message names both values.
        """
        ...


@runtime_checkable
class SupportsWindowEnds(Protocol):
    """An engine with ``OwnsAccumulation`` that lets the run say where a window ends.

    At the end of an epoch a window may be shorter than ``set_accumulation`` said, and its step is taken all the same.
    """

    def set_window_end(self, module: nn.Module | None, is_end: bool) -> None:
        """Whether the next backward pass is the last before a step; called before each, with the placed module."""
        ...


@runtime_checkable
class OwnsOptimizers(Protocol):
    """A strategy whose engine may make the optimizer, from settings of its own."""

    @property
    def makes_optimizers(self) -> bool:
        """Whether it does: then ``prepare_optimizers`` is given none, and returns those that it has made."""
        ...


@runtime_checkable
class OwnsSchedulers(Protocol):
    """A strategy whose engine steps learning rate schedulers, each after its optimizer's step."""

    def take_scheduler(self, module: nn.Module, scheduler: object) -> None:
        """Step ``scheduler`` from now on. ``module`` is the placed one, after ``prepare_optimizers``."""
        ...

    def release_schedulers(self, module: nn.Module) -> Sequence[object]:
        """The schedulers that the engine has, which it steps no longer: the run will, after each optimizer step."""
        ...


@runtime_checkable
class SupportsBatchSize(Protocol):
    """A strategy that wants to know how many samples a batch has (for its own counts of samples)."""

    @property
    def wants_batch_size(self) -> bool:
        """Whether it does in this run; the training loader is then asked for before optimizers are made."""
        ...

    def set_batch_size(self, samples: int) -> None:
        """Number of samples in a batch of one rank. Called before ``prepare_optimizers``, if the number is known."""
        ...


@runtime_checkable
class OwnsCheckpoints(Protocol):
    """A strategy whose engine writes modules and optimizers itself, as a folder in a format of its own.

    The run's checkpoint IO still serves what holds weights only. Every rank calls every method but the first.
    """

    def owns_checkpoint(self, path: str) -> bool:
        """Whether ``path`` is read by this strategy; otherwise the checkpoint IO reads it.

        Raises:
            ValueError: neither can be what was meant; the message says what to give.
            FileNotFoundError: ``path`` is a part of a checkpoint.
        """
        ...

    def save_checkpoint(self, module: nn.Module, rest: Mapping[str, object], path: str) -> None:
        """Write the placed ``module``, its optimizers, and ``rest``, plain data and tensors, equal on every rank.

        Either all of it is at ``path`` when this returns, or what was there before.
        """
        ...

    def read_rest(self, path: str, weights_only: bool | None) -> dict[str, object]:
        """The ``rest`` of ``save_checkpoint``; may be called before ``place``. No code is run unless False is given."""
        ...

    def load_checkpoint(
        self, module: nn.Module, path: str, *, optimizers: bool, strict: bool, weights_only: bool | None = None
    ) -> None:
        """Load the placed ``module``, and with ``optimizers`` theirs: then after ``prepare_optimizers``.

        Any number of ranks may have saved it. ``strict``: every weight must be there.
        """
        ...
