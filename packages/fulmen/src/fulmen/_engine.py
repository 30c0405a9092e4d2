"""What a strategy's engine takes over from a fit: it is told the settings once, before it is made, and some data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fulmen.optimizer import LRSchedulerConfig
from fulmen_fabric import rank_zero_info, rank_zero_warn
from fulmen_fabric.abilities import supports
from fulmen_protocols import (
    MisconfigurationException,
    OwnsAccumulation,
    OwnsBackward,
    OwnsGradClipping,
    OwnsOptimizers,
    OwnsSchedulers,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen._session import Session
    from fulmen.hooks import HookBinder
    from fulmen.module import LightningModule
    from fulmen.settings import Settings
    from fulmen_fabric import Assembly
    from fulmen_protocols import Strategy

__all__ = ["EngineSettings", "hand_over", "ignored_hooks", "made_optimizers", "made_schedulers", "makes_optimizers"]


class EngineSettings(NamedTuple):
    """What an engine was told of a fit."""

    accumulate_grad_batches: int | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None


def hand_over(module: LightningModule, assembly: Assembly, settings: Settings, told: EngineSettings | None) -> Any:
    """Tell the engine how to accumulate and clip, before it is made; later only see that nothing has changed.

    Args:
        module: with manual optimization it steps whenever it wants to, and clips itself.
        assembly: its strategy may have an engine.
        settings: of the Trainer.
        told: what the engine was told before; None: it is not made yet.

    Raises:
        MisconfigurationException: the engine cannot do that, or has been told something else.
    """
    strategy = assembly.strategy
    automatic = module.automatic_optimization
    accumulates, clips = supports(strategy, OwnsAccumulation), supports(strategy, OwnsGradClipping)
    wanted = EngineSettings(
        (settings.accumulate_grad_batches if automatic else 1) if accumulates else None,
        settings.gradient_clip_val if clips and automatic else None,
        settings.gradient_clip_algorithm if clips else None,
    )
    if told is None:
        if accumulates:
            cast("OwnsAccumulation", strategy).set_accumulation(wanted.accumulate_grad_batches or 1)
        if clips:
            algorithm = cast("Any", wanted.gradient_clip_algorithm)
            cast("OwnsGradClipping", strategy).set_clipping(wanted.gradient_clip_val, algorithm)
        return wanted
    for name, before, now in zip(EngineSettings._fields, told, wanted, strict=True):
        if before != now:
            raise MisconfigurationException(
                f"trainer.{name} was set to {now!r} in the middle of a fit, but the engine of strategy "
                f"{assembly.strategy_name!r} was made with {before!r}. Set it before the fit."
            )
    return told


def ignored_hooks(binder: HookBinder, strategy: Strategy) -> frozenset[str]:
    """Of the module's own hooks, those that a step of the engine goes past; says so."""
    ignored: list[str] = []
    if supports(strategy, OwnsBackward) and binder.overridden("backward") is not None:
        ignored.append("backward")
        rank_zero_warn(
            "the module overrides backward, which is not called: the strategy's engine runs the backward pass."
        )
    if supports(strategy, OwnsGradClipping) and binder.overridden("configure_gradient_clipping") is not None:
        rank_zero_warn(
            "the module overrides configure_gradient_clipping, which is called but can clip nothing: the strategy's "
            "engine clips in its step. Use Trainer(gradient_clip_val=...)."
        )
    return frozenset(ignored)


def makes_optimizers(strategy: Strategy) -> bool:
    """Whether the engine makes the optimizer, and ``configure_optimizers`` is not called."""
    return supports(strategy, OwnsOptimizers) and strategy.makes_optimizers


def made_optimizers(session: Session) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """The engine's own optimizers, and its schedulers, which are stepped after each optimizer step.

    Call it with the placed module; with a module's own optimizers the first are none.
    """
    strategy, placed = session.assembly.strategy, session.placed
    assert placed is not None
    optimizers = list(strategy.prepare_optimizers(placed, []))
    rank_zero_info("the optimizer is the one in the engine's configuration: configure_optimizers is not called.")
    return optimizers, made_schedulers(session)


def made_schedulers(session: Session) -> list[LRSchedulerConfig]:
    """The engine's own schedulers."""
    strategy, placed = session.assembly.strategy, session.placed
    if placed is None or not supports(strategy, OwnsSchedulers):
        return []
    return [LRSchedulerConfig(scheduler, interval="step") for scheduler in strategy.release_schedulers(placed)]
