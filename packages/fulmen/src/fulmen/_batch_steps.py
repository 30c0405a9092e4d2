"""How a training batch is run: the module's steps, the hooks and the strategy, composed for each way of optimizing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fulmen._engine import ignored_hooks
from fulmen.manual import ManualOptimization
from fulmen.optimizer import LightningOptimizer
from fulmen_fabric.abilities import supports
from fulmen_fabric.steps import Gradients, StepHooks, automatic_step, forward_only_step
from fulmen_protocols import OwnsGradClipping, SupportsManualBackward, SupportsNoSync

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer

    from fulmen._session import Session
    from fulmen.hooks import HookBinder
    from fulmen.progress import Progress

__all__ = ["BatchSteps", "compose_batch_steps"]


class BatchSteps(NamedTuple):
    """What ``FitParts`` wants to know of a batch."""

    step: Callable[[object, int], object]
    accumulate: Callable[[object, int], object]
    updates: Callable[[], int] | None = None


def compose_batch_steps(
    session: Session,
    binder: HookBinder,
    progress: Progress,
    *,
    accumulate: int,
    clip_val: float | None,
    clip_algorithm: Any,
    keep_outputs: bool,
) -> BatchSteps:
    """Compose forward passes alone, automatic or manual optimization, whichever the run is for.

    Sets what the session has of it: ``gradients``, and where there are optimizer steps ``manual`` and ``wrapped``.

    Args:
        session: the running fit, with a placed module and its optimizers.
        binder: knows the callbacks of this moment.
        progress: read by the user's hooks when they are called.
        accumulate: batches of a window; not for manual optimization, which has none.
        clip_val: as the Trainer was given it.
        clip_algorithm: the same.
        keep_outputs: whether anybody will look at a step's outputs.
    """
    module, strategy = session.module, session.assembly.strategy
    rounds = None if session.train_loader is None else session.train_loader.rounds
    weights = session.loss_weights
    weigh = None if rounds is None else rounds.weigh
    if weights is not None:
        weights.rounds, weights.window, weigh = rounds, accumulate, weights.weigh
    session.gradients = gradients = Gradients(strategy, session.assembly.precision, session.placed, weigh=weigh)
    backward_context: Callable[[Tensor], AbstractContextManager[object]] | None = None
    wrapper = None if session.placed is module else session.placed
    if not module.automatic_optimization and wrapper is not None and supports(strategy, SupportsManualBackward):
        backward_context = partial(strategy.manual_backward, wrapper)
    training_step = session.step_method("training_step", manually=backward_context is not None)
    if session.forward_only:
        step = forward_only_step(training_step, gradients, keep_outputs=keep_outputs)
        step = session.measuring.action("run_training_batch", step)
        return BatchSteps(step, step)

    own_backward = None if "backward" in ignored_hooks(binder, strategy) else binder.overridden("backward")
    hooks = StepHooks(
        on_before_backward=binder.both("on_before_backward"),
        on_after_backward=binder.both("on_after_backward"),
        on_before_optimizer_step=binder.both("on_before_optimizer_step"),
        backward=None if own_backward is None else _weighed(session.within("backward", own_backward), weigh),
    )
    if not module.automatic_optimization:
        manual = ManualOptimization(
            training_step, gradients, hooks, progress, keep_outputs=keep_outputs, backward_context=backward_context
        )
        return _manual(session, manual)
    optimizer = session.optimizers[0]
    wrapped = LightningOptimizer(optimizer, partial(gradients.step, optimizer))
    session.manual, session.wrapped = None, [wrapped]
    hooks = replace(
        hooks,
        on_before_zero_grad=binder.both("on_before_zero_grad"),
        zero_grad=_zero_grad(session, binder, progress, optimizer),
        clip=_clip(session, binder, gradients, optimizer, clip_val, clip_algorithm),
        optimizer_step=_own_step(session, binder, progress, wrapped),
    )
    if session.measuring.is_on:
        hooks = replace(
            hooks,
            backward=session.measuring.strategy("backward", hooks.backward or gradients.backward),
            around_step=partial(session.measuring.hook, module, "optimizer_step"),
        )
    steps = automatic_step(
        training_step=training_step,
        optimizer=optimizer,
        gradients=gradients,
        strategy=strategy,
        hooks=hooks,
        accumulate=accumulate,
        keep_outputs=keep_outputs,
        world_size=session.world.world_size,
        window_is_open=progress.window_is_open and session.has_gradients(),
        weights=weights,
    )
    step, accumulate_only = (session.measuring.action("run_training_batch", each) for each in steps)
    return BatchSteps(step, accumulate_only)


def _manual(session: Session, manual: ManualOptimization) -> BatchSteps:
    strategy, before = session.assembly.strategy, session.manual
    hold_sync: Callable[[], AbstractContextManager[object]] | None = None
    if supports(strategy, SupportsNoSync) and session.placed is not None:
        hold_sync = partial(strategy.no_sync, session.placed)
    session.wrapped = manual.optimizers = [
        LightningOptimizer(
            optimizer,
            session.measuring.action("optimizer_step", partial(manual.step, optimizer)),
            toggle=session.module.toggled_optimizer,
            no_sync=hold_sync,
        )
        for optimizer in session.optimizers
    ]
    if session.has_open_gradients or (before is not None and before.gradients_are_open):
        manual.reopen()
        session.has_open_gradients = False
    session.manual = manual
    step = session.measuring.action("run_training_batch", manual.batch_step)
    return BatchSteps(step, step, manual.updates)


def _weighed(backward: Callable[..., object], weigh: Callable[[Tensor], Tensor] | None) -> Callable[..., object]:
    """The user's ``backward``, for a loss with its weight among those of other ranks."""
    if weigh is None:
        return backward

    def weighed(loss: Tensor, **kwargs: object) -> object:
        return backward(weigh(loss), **kwargs)

    return weighed


def _zero_grad(
    session: Session, binder: HookBinder, progress: Progress, optimizer: Optimizer
) -> Callable[[], object] | None:
    """The user's ``optimizer_zero_grad``; the optimizer's own where it is measured; else None."""
    own = binder.overridden("optimizer_zero_grad")
    if own is None:
        measuring = session.measuring
        return measuring.hook(session.module, "optimizer_zero_grad", optimizer.zero_grad) if measuring.is_on else None
    scoped = session.scoped("optimizer_zero_grad", own)
    return lambda: scoped(progress.epoch, progress.batch, optimizer)


def _clip(
    session: Session,
    binder: HookBinder,
    gradients: Gradients,
    optimizer: Optimizer,
    value: float | None,
    algorithm: Any,
) -> Callable[[], object] | None:
    """The user's ``configure_gradient_clipping``, or clipping as the Trainer was asked for it; None: nobody clips."""
    name = "configure_gradient_clipping"
    own = binder.overridden(name)
    if own is not None:
        return partial(session.scoped(name, own), optimizer, value, algorithm)
    if value is None or value <= 0 or supports(session.assembly.strategy, OwnsGradClipping):
        return None
    return session.measuring.hook(session.module, name, partial(gradients.clip, optimizer, value, algorithm))


def _own_step(
    session: Session, binder: HookBinder, progress: Progress, wrapped: LightningOptimizer
) -> Callable[[Callable[[], object]], object] | None:
    """The user's ``optimizer_step``."""
    own = binder.overridden("optimizer_step")
    if own is None:
        return None
    scoped = session.scoped("optimizer_step", own)
    return lambda closure: scoped(progress.epoch, progress.batch, wrapped, closure)
