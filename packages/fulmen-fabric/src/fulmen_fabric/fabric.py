"""Fabric: your own loop, with devices, precision, distribution and checkpoints taken care of."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, overload

from fulmen_fabric import _arguments
from fulmen_fabric._objects import Objects
from fulmen_fabric.abilities import supports
from fulmen_fabric.assembly import assemble
from fulmen_fabric.capture import CapturedStep, why_not_captured
from fulmen_fabric.compiled import uncompiled
from fulmen_fabric.rank_zero import rank_zero_deprecation, rank_zero_info
from fulmen_fabric.seed import seed_everything
from fulmen_fabric.transfer import convert_tensors_to_scalars
from fulmen_fabric.wrappers import FabricModule, unwrap
from fulmen_protocols import (
    LOGGERS,
    MisconfigurationException,
    MisconfigurationTypeError,
    SupportsForwardContext,
    check,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fulmen_protocols import Accelerator, Logger, Strategy

__all__ = ["Fabric"]

P = ParamSpec("P")
R = TypeVar("R")


class Fabric(Objects):
    """Runs a loop of your own on any device, in any precision, in one process or many.

    Arguments are Lightning's; the variables ``LT_ACCELERATOR``, ``LT_STRATEGY``, ``LT_DEVICES``, ``LT_NUM_NODES`` and
    ``LT_PRECISION`` override them, so a launcher can choose without a change to the script. Where a command line set
    them (``LT_CLI_USED=1``), an argument in the code that says something else is an error.

    Args:
        accelerator: a name, ``"gpu"``, ``"auto"`` or an instance.
        strategy: a name, ``"auto"`` or an instance.
        devices: devices per node: a count, ids, a string, or ``"auto"``.
        num_nodes: number of machines.
        precision: for example ``"bf16-mixed"``; None is ``"32-true"``.
        plugins: a ``Precision``, a ``CheckpointIO``, a ``ClusterEnvironment``: at most one of each.
        callbacks: any objects; ``call`` finds their methods by name.
        loggers: where ``log`` writes.

    Raises:
        MisconfigurationException: arguments contradict each other; the message lists every conflict.
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: str | int | None = None,
        plugins: object | Sequence[object] | None = None,
        callbacks: object | Sequence[object] | None = None,
        loggers: Logger | Sequence[Logger] | None = None,
    ) -> None:
        super().__init__(
            assemble(
                accelerator=_arguments.overridden("accelerator", accelerator, "auto"),
                strategy=_arguments.overridden("strategy", strategy, "auto"),
                devices=_arguments.overridden("devices", devices, "auto"),
                num_nodes=_arguments.overridden("num_nodes", num_nodes, 1),
                precision=_arguments.overridden("precision", precision, None),
                plugins=plugins,
                state_kind="sharded",  # a raw loop saves often, and what it saves is its own business
            ),
            callbacks,
        )
        self._loggers: list[Logger] = [check(LOGGERS, one) for one in _arguments.as_list(loggers)]
        self._backward = self._composer.backward()
        # A subclass that overrides run gets it started in every process.
        if type(self).run is not Fabric.run:
            self.__dict__["run"] = partial(self._launch_run, self.run)
        for line in self._assembly.chosen:
            rank_zero_info(line)
        if self.world_size > 1 and _arguments.is_under_cli():
            self._world.start()  # all processes are there, and a script may do without launch()

    def __getstate__(self) -> dict[str, Any]:
        # What is composed here is made of closures, which cannot be taken to another process.
        return {name: value for name, value in self.__dict__.items() if name not in ("_backward", "_move", "run")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backward = self._composer.backward()
        self._move = None
        if type(self).run is not Fabric.run:
            self.__dict__["run"] = partial(self._launch_run, self.run)

    @property
    def loggers(self) -> list[Logger]:
        """All loggers."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger; an ``IndexError`` where there is none."""
        if not self._loggers:
            raise IndexError("this Fabric has no logger. Pass loggers= when you make it.")
        return self._loggers[0]

    def backward(self, tensor: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """``tensor.backward(*args, **kwargs)``, scaled or run by an engine where precision or strategy ask for it.

        ``model`` says which module the loss came from, for engines that hold several.
        """
        self._backward(tensor, model, *args, **kwargs)

    @overload
    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float,
        max_norm: None = None,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> None: ...
    @overload
    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: None = None,
        *,
        max_norm: float,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor: ...
    @overload
    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None: ...
    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of the optimizer's parameters in place, unscaled first where they are scaled.

        Args:
            module: what ``setup`` returned.
            optimizer: what ``setup`` returned.
            clip_val: clamp each element to ``[-clip_val, clip_val]``.
            max_norm: scale all gradients so that their joint norm is at most this.
            norm_type: which norm.
            error_if_nonfinite: fail where the norm is not finite; the host then waits for the device.

        Returns:
            For ``max_norm`` the norm before clipping, shape ``()``; for ``clip_val`` None.

        Raises:
            MisconfigurationException: not exactly one of ``clip_val`` and ``max_norm`` was given.
        """
        if (clip_val is None) == (max_norm is None):
            raise MisconfigurationException(
                f"clip_gradients got clip_val={clip_val!r} and max_norm={max_norm!r}. Give exactly one of the two."
            )
        return self._composer.clip(module, unwrap(optimizer), clip_val, max_norm, norm_type, error_if_nonfinite)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a forward pass of this precision runs, for computation outside a wrapped module."""
        precision = self.precision
        return precision.forward_context() if supports(precision, SupportsForwardContext) else nullcontext()

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[object]:
        """Within the block gradients stay local: for all but the last batch of an accumulation.

        Raises:
            MisconfigurationTypeError: ``module`` was not returned by ``setup``.
        """
        if not isinstance(uncompiled(module), FabricModule):
            kind = type(module).__name__
            raise MisconfigurationTypeError(f"no_backward_sync got a {kind}. Pass the module that setup() returned.")
        return self._composer.no_sync(module) if enabled else nullcontext()

    def capture(self, step: Callable[P, R], *, warmup: int = 3, max_graphs: int = 16) -> CapturedStep[P, R]:
        """``step``, a function that does one whole update, replayed as a CUDA graph once its shapes are known.

        Where that cannot be (no CUDA device, several processes, a gradient scaler, an engine of its own) the same
        object just calls ``step``, says so in one line, and has the reason as ``reason``.

        Args:
            step: forward, ``zero_grad``, backward and optimizer step on tensors of this process's device.
            warmup: calls of each shape that run as they are before the recording, at least 1.
            max_graphs: recordings to keep.

        Raises:
            MisconfigurationException: ``warmup`` or ``max_graphs`` is less than 1.
        """
        self._started("capture")
        _arguments.require_at_least_one("capture", warmup=warmup, max_graphs=max_graphs)
        reason = why_not_captured(self._assembly, self.device)
        if reason is not None:
            rank_zero_info(f"fabric.capture() calls the step as it is: {reason}.")
        return CapturedStep(
            step,
            device=self.device,
            optimizers=self._composer.optimizers_in_use,
            modules=self._composer.modules_in_use,
            reason=reason,
            warmup=warmup,
            max_graphs=max_graphs,
        )

    @contextmanager
    def init_tensor(self) -> Generator[None, None, None]:
        """Within the block new tensors are on this process's device, in the precision's dtype."""
        self._started("init_tensor")
        with self.device, self._assembly.precision.init_context():
            yield

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Within the block new modules are created where the strategy wants them, in the precision's dtype.

        With ``empty_init`` their values are left undefined, for a checkpoint to fill.
        """
        self._started("init_module")
        with self.strategy.module_context(empty=bool(empty_init)), self.precision.init_context():
            yield

    def sharded_model(self) -> AbstractContextManager[None]:
        """Deprecated: ``init_module``, which this is."""
        rank_zero_deprecation("fabric.sharded_model() is deprecated. Use fabric.init_module().")
        return self.init_module()

    def log(self, name: str, value: object, step: int | None = None) -> None:
        """``log_dict`` of one value."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """Send numbers and one-element tensors to every logger, on rank 0. Waits for the device if a value is there.

        Raises:
            ValueError: a tensor has more or less than one element.
        """
        if self._loggers and self.is_global_zero:
            numbers = {name: _number(name, value) for name, value in metrics.items()}
            for logger in self._loggers:
                logger.log_metrics(numbers, step)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed Python, NumPy and torch, and by default loader workers. Returns the seed."""
        return seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)


def _number(name: str, value: object) -> float:
    try:
        return cast("float", convert_tensors_to_scalars(value))
    except ValueError as error:
        raise ValueError(f"fabric.log got {name!r}: {error}") from None
