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
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from fulmen_fabric.abilities import supports
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

    Raises:
        MisconfigurationException: the loss has a wrong type, or an overridden optimizer step did not run its closure.
    """
    placed = gradients.module
    scaler = gradients.scaler
    forward_context = gradients.forward_context
    before_zero_grad, before_backward = hooks.on_before_zero_grad, hooks.on_before_backward
    after_backward, before_step = hooks.on_after_backward, hooks.on_before_optimizer_step
    clip = hooks.clip
    unscale = None if scaler is None or not (before_step or clip) else scaler.unscale
    backward: Callable[[Tensor], object] = hooks.backward or (
        cast("Callable[[Tensor], object]", Tensor.backward)
        if gradients.is_plain and not gradients.weighs
        else gradients.backward
    )
    zero_grad: Callable[[], object] = hooks.zero_grad or optimizer.zero_grad
    engine_accumulates = supports(strategy, OwnsAccumulation)
    divisor = 1 if engine_accumulates else accumulate
    clears_first = not before_zero_grad and hooks.zero_grad is None
    window_is_empty = not window_is_open  # no backward pass since the last optimizer step

    def forward_backward(batch: object, batch_idx: int) -> tuple[object, Tensor | None]:
        nonlocal window_is_empty
        if clears_first and window_is_empty:
            zero_grad()
        if forward_context is None:
            output = training_step(batch, batch_idx)
        else:
            with forward_context():
                output = training_step(batch, batch_idx)
        loss = output if isinstance(output, Tensor) else _loss_of(output)
        if loss is None:
            if world_size > 1:
                raise MisconfigurationException(
                    f"training_step returned None for batch {batch_idx} on one of {world_size} ranks. The others would "
                    "wait for its gradients: return a loss of zero weight instead, such as `0.0 * output.sum()`."
                )
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

    def before_the_step() -> None:
        if unscale is not None:
            unscale(optimizer)
        for hook in before_step:
            hook(optimizer)
        if clip is not None:
            clip()

    def step(batch: object, batch_idx: int, /) -> object:
        nonlocal window_is_empty
        output, loss = forward_backward(batch, batch_idx)
        if not window_is_empty:  # else every batch of this window was left out: there is nothing to step on
            before_the_step()
            optimizer_step()
            window_is_empty = True
        return _visible(output, loss) if keep_outputs else None

    def step_with_closure(batch: object, batch_idx: int, /) -> object:
        nonlocal window_is_empty
        starts_window = window_is_empty
        evaluations: list[tuple[object, Tensor | None]] = []

        def closure() -> Tensor | None:
            nonlocal window_is_empty
            window_is_empty = starts_window  # an optimizer may evaluate several times, each from zeroed gradients
            output, loss = forward_backward(batch, batch_idx)
            evaluations.append((output, loss))
            if not window_is_empty:
                before_the_step()
            return loss

        step_through(closure)
        if not evaluations:
            raise MisconfigurationException(
                "optimizer_step was overridden and did not run its closure, so nothing was trained. "
                "Call `optimizer.step(closure=optimizer_closure)`, or `optimizer_closure()` before stepping."
            )
        window_is_empty = True
        return _visible(*evaluations[-1]) if keep_outputs else None

    hold_sync: Callable[[nn.Module], AbstractContextManager[object]] | None = (
        strategy.no_sync if supports(strategy, SupportsNoSync) else None
    )

    def accumulate_only(batch: object, batch_idx: int, /) -> object:
        if hold_sync is None or placed is None:
            output, loss = forward_backward(batch, batch_idx)
        else:
            with hold_sync(placed):
                output, loss = forward_backward(batch, batch_idx)
        return _visible(output, loss) if keep_outputs else None

    mark_end = partial(strategy.set_window_end, placed) if supports(strategy, SupportsWindowEnds) else None

    def step_of_engine(batch: object, batch_idx: int, /) -> object:
        nonlocal window_is_empty
        if mark_end is not None:
            mark_end(True)
        output, loss = forward_backward(batch, batch_idx)
        _require_loss(loss, batch_idx)
        before_the_step()
        optimizer_step()
        window_is_empty = True
        return _visible(output, loss) if keep_outputs else None

    def count_by_engine(batch: object, batch_idx: int, /) -> object:
        if mark_end is not None:
            mark_end(False)
        output, loss = forward_backward(batch, batch_idx)
        _require_loss(loss, batch_idx)
        optimizer_step()  # the engine counts, and steps where it knows a window to end
        return _visible(output, loss) if keep_outputs else None

    optimizer_step: Callable[..., object] = optimizer.step if gradients.is_plain else partial(gradients.step, optimizer)
    step_with: Callable[..., object] = partial(gradients.step, optimizer)
    if hooks.around_step is not None:
        optimizer_step, step_with = hooks.around_step(optimizer_step), hooks.around_step(step_with)
    chosen: BatchStep = step_of_engine if engine_accumulates else step
    step_through: Callable[[Callable[[], object]], object] = hooks.optimizer_step or step_with
    if hooks.optimizer_step is not None:
        chosen = _marked(step_with_closure, mark_end) if engine_accumulates else step_with_closure
    elif needs_closure(optimizer):
        name = type(optimizer).__name__
        if scaler is not None:
            raise MisconfigurationException(
                f"{name} evaluates its closure several times a step, which a gradient scaler cannot follow. "
                "Use precision='bf16-mixed' or '32-true'."
            )
        if divisor != 1:
            raise MisconfigurationException(
                f"{name} evaluates its closure several times a step, and the gradients of earlier batches of a window "
                f"would be lost: accumulate_grad_batches={accumulate} cannot work with it. "
                "Use accumulate_grad_batches=1."
            )
        chosen = step_with_closure
    return chosen, (count_by_engine if engine_accumulates else accumulate_only)


def _marked(step: BatchStep, mark_end: Callable[[bool], object] | None) -> BatchStep:
    """``step`` of an engine that is told of the window's end before it."""
    if mark_end is None:
        return step

    def marked(batch: object, batch_idx: int, /) -> object:
        mark_end(True)
        return step(batch, batch_idx)

    return marked


def _require_loss(loss: Tensor | None, batch_idx: int) -> None:
    """An engine counts on a backward pass for every batch."""
    if loss is None:
        raise MisconfigurationException(
            f"training_step returned None for batch {batch_idx}, and the strategy's engine needs a backward pass for "
            "every batch. Return a loss of zero weight instead, such as `0.0 * output.sum()`."
        )


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
        loss = output if isinstance(output, Tensor) else _loss_of(output)
        return _visible(output, loss) if keep_outputs else None

    return step


def _visible(output: object, loss: Tensor | None) -> object:
    """What ``on_train_batch_end`` is given for the ``output`` of a training step."""
    if loss is None:
        return {}
    loss = loss.detach()
    if not isinstance(output, Mapping):
        return {"loss": loss}
    return {**cast("Mapping[object, object]", output), "loss": loss}


def _loss_of(output: object) -> Tensor | None:
    if output is None:
        return None
    if isinstance(output, Mapping):
        outputs = cast("Mapping[object, object]", output)
        loss = outputs.get("loss")
        if isinstance(loss, Tensor):
            return loss
        if "loss" not in outputs:
            raise MisconfigurationException(
                f"training_step returned a mapping with the keys {sorted(map(str, outputs))}, none of which is 'loss'. "
                "Add the loss under 'loss', or return it alone."
            )
        raise MisconfigurationException(
            f"training_step returned 'loss' of type {type(loss).__name__}; it must be a tensor of shape ()."
        )
    raise MisconfigurationException(
        f"training_step returned {type(output).__name__}; return a loss tensor, a mapping with 'loss', or None to skip "
        "the batch."
    )
