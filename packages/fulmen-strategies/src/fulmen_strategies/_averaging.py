"""Post-local SGD: after some steps ranks train on their own, and their parameters are averaged every few steps.

Source: Lin et al. 2020, "Don't use large mini-batches, use local SGD", by torch's ``post_localSGD_hook`` and
``PeriodicModelAverager``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

__all__ = ["average_after_steps", "check_averaging"]

# By name: importing torch.distributed.optim compiles TorchScript, with a deprecation warning for each function.
_COMMUNICATING = frozenset({"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer"})


def check_averaging(state: object, period: object) -> None:
    """Compare the hook's ``state`` with ``period``, of which one without the other makes no sense.

    Raises:
        MisconfigurationException: one is missing, or the period is no whole number of at least 1.
    """
    if isinstance(state, PostLocalSGDState):
        if period is None:
            raise MisconfigurationException(
                "DDPStrategy got a PostLocalSGDState and model_averaging_period=None: ranks would drift apart. Give "
                "the number of steps after which parameters are averaged, such as model_averaging_period=4."
            )
    elif period is not None:
        raise MisconfigurationException(
            f"DDPStrategy got model_averaging_period={period!r} and ddp_comm_state={state!r}: parameters are averaged "
            "with ddp_comm_hook=post_localSGD_hook and its ddp_comm_state=PostLocalSGDState(...) only. Give both, or "
            "leave the period out."
        )
    if period is not None and (type(period) is not int or period < 1):
        raise MisconfigurationException(
            f"DDPStrategy got model_averaging_period={period!r}: it counts optimizer steps, a whole number of at least "
            "1."
        )


def average_after_steps(optimizers: Sequence[Optimizer], period: int, state: PostLocalSGDState) -> None:
    """From now on average the parameters that had a gradient after every ``period``-th step of each optimizer.

    Averaging starts with step ``start_localSGD_iter`` of ``state``, when the hook stops reducing over all ranks.

    Raises:
        MisconfigurationTypeError: an optimizer keeps its parameters equal itself.
    """
    for optimizer in optimizers:
        if _COMMUNICATING & {kind.__name__ for kind in type(optimizer).__mro__}:
            raise MisconfigurationTypeError(
                f"model_averaging_period={period} cannot work with {type(optimizer).__name__}, which communicates "
                "parameters itself: use a plain optimizer, or leave the period out."
            )
        averager = PeriodicModelAverager(period, warmup_steps=cast("int", state.start_localSGD_iter))  # pyright: ignore[reportUnknownMemberType]
        optimizer.register_step_post_hook(_After(averager))


class _After:
    def __init__(self, averager: PeriodicModelAverager) -> None:
        self._averager = averager

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        parameters = (one for group in optimizer.param_groups for one in group["params"] if one.grad is not None)
        self._averager.average_parameters(parameters)
