"""One optimizer step, composed once from what the run needs and nothing else.

``compose`` asks strategy and precision for their abilities and returns plain callables. What is not needed is not in
them: full precision enters no context, one batch per step divides nothing, a hook nobody defines is an empty tuple.

Order within a step, which people rely on: forward → zero gradients (first batch of a window) → backward → unscale →
``on_before_optimizer_step`` → clip → optimizer step → scaler update. Where nobody has a hook on the zeroing, it comes
before the forward pass: the gradients of the last step would lie beside the activations of this one, which is the
moment when memory is shortest. The same callables serve the Trainer and Fabric.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from fulmen_fabric._step_outputs import loss_of, missing_loss, visible
from fulmen_fabric.abilities import supports
from fulmen_fabric.loss_weights import LossWeights, WeighedStep
from fulmen_protocols import (
    MisconfigurationException,
    OwnsAccumulation,
    OwnsBackward,
    OwnsOptimizerStep,
    Precision,
    Strategy,
    SupportsForwardContext,
    SupportsGradClipping,
    SupportsGradScaling,
    SupportsNoSync,
    SupportsPrecisionPlan,
    SupportsWindowEnds,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

__all__ = ["BatchStep", "Gradients", "StepHooks", "automatic_step", "forward_only_step", "needs_closure"]

Hook = tuple[Callable[..., object], ...]


@dataclass(frozen=True, slots=True)
class StepHooks:
    """What the user wants to run inside a step. Empty tuples and None cost nothing."""

    on_before_zero_grad: Hook = ()
    """Called with ``(optimizer)``."""
    on_before_backward: Hook = ()
    """Called with ``(loss)``, scaled if the precision scales."""
    on_after_backward: Hook = ()
    """Called without arguments."""
    on_before_optimizer_step: Hook = ()
    """Called with ``(optimizer)``; gradients are unscaled and not yet clipped."""
    backward: Callable[..., object] | None = None
    """Replaces ``loss.backward()``; called with ``(loss)``."""
    zero_grad: Callable[[], object] | None = None
    """Replaces ``optimizer.zero_grad()``."""
    clip: Callable[[], object] | None = None
    """Clips the gradients before the step."""
    optimizer_step: Callable[[Callable[[], object]], object] | None = None
    """Replaces ``optimizer.step``; called with the closure, which it must run."""
    around_step: Callable[[Callable[..., object]], Callable[..., object]] | None = None
    """Wraps the optimizer's own step, once, while the step is composed."""


class BatchStep(Protocol):
    """Trains on one batch."""

    def __call__(self, batch: object, batch_idx: int, /) -> object:
        """Return what ``training_step`` returned with its loss detached, or None when nobody will look at it."""
        ...


class Gradients:
    """Backward, unscaling, clipping and stepping for one placed module: strategy and precision as callables."""

    __slots__ = (
        "_clip_norm",
        "_clip_value",
        "_owned_backward",
        "_owned_step",
        "_weigh",
        "forward_context",
        "module",
        "scaler",
    )

    def __init__(
        self,
        strategy: Strategy,
        precision: Precision,
        module: nn.Module | None,
        *,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``weigh`` gives a loss its weight among those of other ranks, right before its backward pass."""
        self.module = module
        self._weigh = weigh
        # An engine that runs backward scales by itself.
        scales = supports(precision, SupportsGradScaling) and not supports(strategy, OwnsBackward)
        self.scaler: SupportsGradScaling | None = cast("SupportsGradScaling", precision) if scales else None
        self.forward_context: Callable[[], AbstractContextManager[object]] | None = (
            precision.forward_context
            if supports(precision, SupportsForwardContext) and not supports(strategy, SupportsPrecisionPlan)
            else None
        )
        self._owned_backward = strategy.backward if supports(strategy, OwnsBackward) else None
        self._owned_step = strategy.optimizer_step if supports(strategy, OwnsOptimizerStep) else None
        clips = strategy if supports(strategy, SupportsGradClipping) else None
        self._clip_norm = clips.clip_grad_norm if clips is not None else None
        self._clip_value = clips.clip_grad_value if clips is not None else None

    @property
    def is_plain(self) -> bool:
        """Whether a step is ``optimizer.step()`` and, but for a weight, a backward pass ``loss.backward()``."""
        return self._owned_backward is None and self._owned_step is None and self.scaler is None

    @property
    def weighs(self) -> bool:
        """Whether losses get a weight."""
        return self._weigh is not None

    def backward(self, loss: Tensor, **kwargs: object) -> None:
        """Run the backward pass of a loss that is already scaled; ``kwargs`` are those of ``Tensor.backward``."""
        if self._weigh is not None:
            loss = self._weigh(loss)
        if self._owned_backward is not None:
            self._owned_backward(loss, self.module, **kwargs)
        else:
            loss.backward(**kwargs)  # type: ignore[no-untyped-call]  # torch checks its own keywords

    def step(self, optimizer: Optimizer, closure: Callable[[], object] | None = None) -> object:
        """Step ``optimizer`` after a backward pass, or with a closure that runs it."""
        if self._owned_step is not None:
            return self._owned_step(optimizer, self.module, closure)
        if self.scaler is None:
            return optimizer.step(closure)  # type: ignore[arg-type]  # torch's closure returns a float by annotation only
        if closure is not None:
            closure()
        result = self.scaler.step(optimizer)
        self.scaler.update()
        return result

    def clip(
        self,
        optimizer: Optimizer,
        value: float,
        algorithm: Literal["norm", "value"],
        *,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Clip the (unscaled) gradients of ``optimizer`` in place.

        Returns:
            The norm before clipping, shape ``()``, on the device; None for ``algorithm="value"``.

        Source: Pascanu et al. 2013, algorithm 1, by ``torch.nn.utils.clip_grad_norm_``.
        """
        if algorithm == "norm":
            if self._clip_norm is not None and self.module is not None:
                return self._clip_norm(
                    self.module, optimizer, value, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
                )
            parameters = _parameters(optimizer)
            return torch.nn.utils.clip_grad_norm_(
                parameters, value, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
            )
        if self._clip_value is not None and self.module is not None:
            self._clip_value(self.module, optimizer, value)
        else:
            torch.nn.utils.clip_grad_value_(_parameters(optimizer), value)
        return None


_ForwardBackward = Callable[[object, int], tuple[object, Tensor | None]]
"""Runs a batch forward and backward; returns what ``training_step`` did, and its loss."""


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` cannot be called without a closure (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def automatic_step(
    *,
    training_step: Callable[..., object],
    optimizer: Optimizer,
    gradients: Gradients,
    strategy: Strategy,
    hooks: StepHooks,
    accumulate: int = 1,
    keep_outputs: bool = True,
    world_size: int = 1,
    window_is_open: bool = False,
    weights: LossWeights | None = None,
) -> tuple[BatchStep, BatchStep]:
    """Compose the two things that can happen to a batch: ``(step, accumulate_only)``.

    ``step`` ends a window of ``accumulate`` batches with an optimizer step; ``accumulate_only`` leaves the gradients
    for a later batch. Losses are divided by ``accumulate``, also in the last, shorter window of an epoch: each sample
    weighs the same in every update of the run.

    Args:
        training_step: called with ``(batch, batch_idx)``; returns a loss of shape ``()``, a mapping with ``"loss"``, or
            None to leave this batch out.
        optimizer: the one returned by ``strategy.prepare_optimizers``.
        gradients: the run's backward and step.
        strategy: asked for ``no_sync`` and for ownership of accumulation.
        hooks: the user's code inside the step.
        accumulate: batches per optimizer step, at least 1.
        keep_outputs: whether anybody will look at a step's outputs.
        window_is_open: whether the first batch adds to gradients that are there already (a resumed window).
        world_size: with more than one rank a missing loss would leave the others waiting, so it is an error.
        weights: losses are sums with a weight beside them, by whose sum the window's gradient is divided instead of by
            ``accumulate``; ``gradients`` then weigh with ``weights.weigh``, and the strategy averages over ranks.

    Raises:
        MisconfigurationException: the loss has a wrong type, or an overridden optimizer step did not run its closure.
    """
    placed, scaler, forward_context = gradients.module, gradients.scaler, gradients.forward_context
    before_zero_grad = hooks.on_before_zero_grad
    before_backward, after_backward = hooks.on_before_backward, hooks.on_after_backward
    backward = _backward(gradients, hooks)
    before_the_step = _before_step(optimizer, scaler, hooks)
    noting = None
    if weights is not None:
        training_step = noting = WeighedStep(training_step, weights)
        before_the_step = _first(partial(weights.scale_gradients, optimizer), before_the_step)
        if not window_is_open:
            weights.forget_window()
    optimizer_step, step_with = _optimizer_steps(optimizer, gradients, hooks)
    zero_grad: Callable[[], object] = hooks.zero_grad or optimizer.zero_grad
    clears_first = not before_zero_grad and hooks.zero_grad is None
    engine_accumulates = supports(strategy, OwnsAccumulation)
    needs_loss = engine_accumulates or world_size > 1
    divisor = 1 if engine_accumulates or weights is not None else accumulate
    window_is_empty = not window_is_open  # no backward pass since the last optimizer step

    # What follows shares window_is_empty: as a variable of this function it costs a batch neither call nor attribute.

    def forward_backward(batch: object, batch_idx: int) -> tuple[object, Tensor | None]:
        nonlocal window_is_empty
        if clears_first and window_is_empty:
            zero_grad()
        if forward_context is None:
            output = training_step(batch, batch_idx)
        else:
            with forward_context():
                output = training_step(batch, batch_idx)
        loss = output if isinstance(output, Tensor) else loss_of(output)
        if loss is None:
            if needs_loss:
                raise missing_loss(batch_idx, world_size)
            return output, None
        if divisor != 1:
            loss = loss / divisor
        if window_is_empty and not clears_first:
            for hook in before_zero_grad:
                hook(optimizer)
            zero_grad()
        window_is_empty = False
        target = loss if scaler is None else scaler.scale(loss)
        for hook in before_backward:
            hook(target)
        backward(target)
        for hook in after_backward:
            hook()
        return output, loss

    def step(batch: object, batch_idx: int, /) -> object:
        nonlocal window_is_empty
        output, loss = forward_backward(batch, batch_idx)
        if not window_is_empty:  # else every batch of this window was left out: there is nothing to step on
            if before_the_step is not None:
                before_the_step()
            optimizer_step()
            window_is_empty = True
        return visible(output, loss) if keep_outputs else None

    def step_with_closure(batch: object, batch_idx: int, /) -> object:
        nonlocal window_is_empty
        starts_window = window_is_empty
        evaluations: list[tuple[object, Tensor | None]] = []

        def closure() -> Tensor | None:
            nonlocal window_is_empty
            window_is_empty = starts_window  # an optimizer may evaluate several times, each from zeroed gradients
            output, loss = forward_backward(batch, batch_idx)
            evaluations.append((output, loss))
            if before_the_step is not None and not window_is_empty:
                before_the_step()
            return loss

        step_with(closure)
        if not evaluations:
            raise MisconfigurationException(
                "optimizer_step was overridden and did not run its closure, so nothing was trained. "
                "Call `optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` before stepping."
            )
        window_is_empty = True
        return visible(*evaluations[-1]) if keep_outputs else None

    ends_window: BatchStep = step
    if hooks.optimizer_step is not None:
        ends_window = step_with_closure
    elif needs_closure(optimizer):
        _refuse_repeated_evaluation(optimizer, scaler, 1 if engine_accumulates else accumulate)
        ends_window = step_with_closure
    if noting is not None:
        ends_window = noting.ending(ends_window)
    if engine_accumulates:
        mark_end = partial(strategy.set_window_end, placed) if supports(strategy, SupportsWindowEnds) else None
        counted = _counted_by_engine(forward_backward, optimizer_step, mark_end, keep_outputs=keep_outputs)
        return _marked(ends_window, mark_end), counted
    return ends_window, _accumulating(forward_backward, strategy, placed, keep_outputs=keep_outputs)


def _backward(gradients: Gradients, hooks: StepHooks) -> Callable[[Tensor], object]:
    """The backward pass of a scaled loss: the user's, ``loss.backward()`` itself where that is all, or the run's."""
    if hooks.backward is not None:
        return hooks.backward
    if gradients.is_plain and not gradients.weighs:
        return cast("Callable[[Tensor], object]", Tensor.backward)
    return gradients.backward


def _before_step(
    optimizer: Optimizer, scaler: SupportsGradScaling | None, hooks: StepHooks
) -> Callable[[], None] | None:
    """What happens between the backward pass and the optimizer step; None where nothing does."""
    listeners, clip = hooks.on_before_optimizer_step, hooks.clip
    if not listeners and clip is None:
        return None
    unscale = None if scaler is None else scaler.unscale

    def before_the_step() -> None:
        if unscale is not None:
            unscale(optimizer)
        for hook in listeners:
            hook(optimizer)
        if clip is not None:
            clip()

    return before_the_step


def _first(rescale: Callable[[], None], then: Callable[[], None] | None) -> Callable[[], None]:
    """Hooks, clipping and norms see the gradients that ``rescale`` leaves."""
    if then is None:
        return rescale

    def both() -> None:
        rescale()
        then()

    return both


def _optimizer_steps(
    optimizer: Optimizer, gradients: Gradients, hooks: StepHooks
) -> tuple[Callable[[], object], Callable[[Callable[[], object]], object]]:
    """The optimizer step after a backward pass, and the one that is given a closure to run it."""
    alone: Callable[..., object] = optimizer.step if gradients.is_plain else partial(gradients.step, optimizer)
    with_closure: Callable[..., object] = partial(gradients.step, optimizer)
    if hooks.around_step is not None:
        alone, with_closure = hooks.around_step(alone), hooks.around_step(with_closure)
    return alone, hooks.optimizer_step or with_closure


def _refuse_repeated_evaluation(optimizer: Optimizer, scaler: SupportsGradScaling | None, divisor: int) -> None:
    """Refuse what an optimizer that runs its closure several times a step would spoil."""
    name = type(optimizer).__name__
    if scaler is not None:
        raise MisconfigurationException(
            f"{name} evaluates its closure several times a step, which a gradient scaler cannot follow. "
            "Use precision='bf16-mixed' or '32-true'."
        )
    if divisor != 1:
        raise MisconfigurationException(
            f"{name} evaluates its closure several times a step, and the gradients of earlier batches of a window "
            f"would be lost: accumulate_grad_batches={divisor} cannot work with it. "
            "Use accumulate_grad_batches=1."
        )


def _accumulating(
    forward_backward: _ForwardBackward, strategy: Strategy, placed: nn.Module | None, *, keep_outputs: bool
) -> BatchStep:
    """Leave a batch's gradients for a later one, on this rank alone where the strategy can."""
    if placed is None or not supports(strategy, SupportsNoSync):

        def accumulate(batch: object, batch_idx: int, /) -> object:
            output, loss = forward_backward(batch, batch_idx)
            return visible(output, loss) if keep_outputs else None

        return accumulate

    hold_sync = strategy.no_sync

    def accumulate_locally(batch: object, batch_idx: int, /) -> object:
        with hold_sync(placed):
            output, loss = forward_backward(batch, batch_idx)
        return visible(output, loss) if keep_outputs else None

    return accumulate_locally


def _counted_by_engine(
    forward_backward: _ForwardBackward,
    optimizer_step: Callable[[], object],
    mark_end: Callable[[bool], object] | None,
    *,
    keep_outputs: bool,
) -> BatchStep:
    """Call the step of an engine inside a window, too: it counts, and steps where it knows the window to end."""

    def count(batch: object, batch_idx: int, /) -> object:
        if mark_end is not None:
            mark_end(False)
        output, loss = forward_backward(batch, batch_idx)
        optimizer_step()
        return visible(output, loss) if keep_outputs else None

    return count


def _marked(step: BatchStep, mark_end: Callable[[bool], object] | None) -> BatchStep:
    """``step`` of an engine that is told of the window's end before it."""
    if mark_end is None:
        return step

    def marked(batch: object, batch_idx: int, /) -> object:
        mark_end(True)
        return step(batch, batch_idx)

    return marked


def forward_only_step(
    training_step: Callable[..., object], gradients: Gradients, *, keep_outputs: bool = True
) -> BatchStep:
    """Run batches forward in training mode and leave gradients and optimizer alone, as for running statistics.

    Args:
        training_step: called with ``(batch, batch_idx)``, as for ``automatic_step``.
        gradients: the run's, for its forward context.
        keep_outputs: whether anybody will look at a step's outputs.

    Raises:
        MisconfigurationException: the loss has a wrong type.
    """
    context = gradients.forward_context or nullcontext

    def step(batch: object, batch_idx: int, /) -> object:
        with context():
            output = training_step(batch, batch_idx)
        loss = output if isinstance(output, Tensor) else loss_of(output)
        return visible(output, loss) if keep_outputs else None

    return step
