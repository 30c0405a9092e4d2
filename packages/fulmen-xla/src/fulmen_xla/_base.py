"""What the strategies for XLA devices have in common; each holds one of these."""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError
from fulmen_protocols.strategy import StrategyParts
from fulmen_xla._library import library
from fulmen_xla._placing import sync
from fulmen_xla.precision import XLAPrecision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import nn
    from torch.optim import Optimizer

    from fulmen_protocols.accelerator import Accelerator
    from fulmen_protocols.checkpoint_io import CheckpointIO
    from fulmen_protocols.cluster_environment import ClusterEnvironment
    from fulmen_protocols.precision import Precision, PrecisionPlan

__all__ = [
    "Debugging",
    "check_devices",
    "check_plan",
    "current_device",
    "own_precision",
    "parts",
    "step",
    "wrap_policy",
]

_DEBUG = "PT_XLA_DEBUG"
_ALLOWED = ("32-true", "16-true", "bf16-true")


class Debugging:
    """torch-xla's own reports on what it compiles and why, between ``start`` and ``stop``."""

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._set = wanted, False

    def start(self) -> None:
        """Set its variable, unless the user has."""
        if self._wanted and _DEBUG not in os.environ:
            os.environ[_DEBUG] = "1"
            self._set = True

    def stop(self) -> None:
        """Leave the variable as it was."""
        if self._set:
            os.environ.pop(_DEBUG, None)
            self._set = False


def current_device() -> torch.device:
    """The device of this replica, as torch-xla calls it."""
    return cast("torch.device", library().device())


def step(optimizer: Optimizer, closure: Callable[[], object] | None) -> object:
    """Step, and cut the graph: a batch and its update are one program, the next one is another."""
    result: Any = optimizer.step() if closure is None else optimizer.step(closure)  # type: ignore[arg-type]
    sync()
    return cast("object", result)


def own_precision(strategy: str, name: str) -> Precision:
    """``XLAPrecision`` of that name.

    Raises:
        MisconfigurationException: there is none.
    """
    if name not in _ALLOWED:
        raise MisconfigurationException(
            f"precision={name!r} with strategy {strategy}: XLA devices train in {', '.join(map(repr, _ALLOWED))}. "
            "'bf16-true' is what TPUs are made for."
        )
    allowed: Any = name
    return XLAPrecision(allowed)


def check_plan(strategy: str, plan: PrecisionPlan) -> None:
    """Refuse a precision that scales losses, or whose dtypes an XLA device has not.

    Raises:
        MisconfigurationException: it is one.
    """
    if plan["scaler"] != "none" or torch.float64 in (plan["parameter"], plan["compute"]):
        what = "scales losses" if plan["scaler"] != "none" else "computes in float64"
        raise MisconfigurationException(
            f"strategy {strategy} got a precision that {what}, which XLA devices cannot. "
            f"Use precision={' or '.join(map(repr, _ALLOWED))}."
        )


def check_devices(strategy: str, devices: Sequence[torch.device], accelerator: str = "xla") -> None:
    """Refuse devices of another kind.

    Raises:
        MisconfigurationException: there is one.
    """
    strange = [str(device) for device in devices if device.type != "xla"]
    if strange:
        raise MisconfigurationException(
            f"strategy {strategy} drives XLA devices, but the run has {', '.join(strange)}. "
            f"Pass accelerator='tpu' (or {accelerator!r}: whatever PJRT_DEVICE names), or another strategy."
        )


def parts(
    strategy: str,
    accelerator: Accelerator | None,
    parallel_devices: Sequence[torch.device] | None,
    checkpoint_io: CheckpointIO | None,
    precision: Precision | None,
    precision_plugin: Precision | None,
    environment: ClusterEnvironment | None = None,
) -> StrategyParts:
    """What the user has given to a strategy, under the names that Fabric's and the Trainer's users know.

    Raises:
        MisconfigurationTypeError: ``precision`` is a name, not an object.
        MisconfigurationException: two precisions were given.
    """
    if isinstance(precision, str):
        raise MisconfigurationTypeError(
            f"{strategy}(precision={precision!r}) is a name. Pass XLAPrecision({precision!r}), or give "
            f"precision={precision!r} to the Trainer or Fabric."
        )
    if precision is not None and precision_plugin is not None:
        raise MisconfigurationException(
            f"{strategy} got precision= and precision_plugin=, which are two names of one thing. Give one of the two."
        )
    return StrategyParts(
        accelerator=accelerator,
        parallel_devices=parallel_devices,
        cluster_environment=environment,
        checkpoint_io=checkpoint_io,
        precision=precision if precision_plugin is None else precision_plugin,
    )


def wrap_policy(
    strategy: str, asked: Collection[type[nn.Module]] | Callable[..., bool] | None
) -> Callable[[], Callable[..., bool]] | None:
    """torch-xla's policy for which layers are wrapped: made from classes of layers, or the user's own.

    Called when it is needed, since it imports torch-xla.

    Raises:
        MisconfigurationTypeError: neither classes nor a function.
    """
    if asked is None:
        return None
    if callable(asked):
        return lambda: asked
    found: list[Any] = list(asked) if isinstance(asked, (AbstractSet, list, tuple)) else [asked]
    if not all(isinstance(one, type) for one in found):
        raise MisconfigurationTypeError(
            f"{strategy}(auto_wrap_policy={asked!r}) is neither a set of layer classes, such as {{nn.Linear}}, nor a "
            "policy function of torch_xla.distributed.fsdp.wrap."
        )
    classes = set(found)
    return lambda: partial(library("distributed.fsdp.wrap").transformer_auto_wrap_policy, transformer_layer_cls=classes)
