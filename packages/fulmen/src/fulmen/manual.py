"""Manual optimization: the user's training_step runs backward passes and steps optimizers itself.

The loop is the same; only what happens to a batch differs. The framework supplies backward, the order of hooks and the
count of optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from torch import Tensor

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from fulmen.optimizer import LightningOptimizer
    from fulmen.progress import Progress
    from fulmen_fabric.steps import Gradients, StepHooks

__all__ = ["ManualOptimization"]


class ManualOptimization:
    """Backward and optimizer steps for a module with ``automatic_optimization = False``."""

    def __init__(
        self,
        training_step: Callable[..., object],
        gradients: Gradients,
        hooks: StepHooks,
        progress: Progress,
        *,
        keep_outputs: bool,
        backward_context: Callable[[Tensor], AbstractContextManager[object]] | None = None,
    ) -> None:
        self._training_step = training_step
        self._gradients = gradients
        self._hooks = hooks
        self._keep_outputs = keep_outputs
        self._backward_context = backward_context
        self._progress = progress
        self._optimizer_steps = progress.updates
        self._backwards = 0
        self._reopened = 0  # of those, backward passes of before a resume
        self._stepped: dict[int, tuple[int, int]] = {}  # by optimizer, after which backward pass and in which batch
        self.optimizers: list[LightningOptimizer] = []
        """What ``self.optimizers()`` gives."""

    def updates(self) -> int:
        """Optimizer steps taken so far, all optimizers together."""
        return self._optimizer_steps

    @property
    def gradients_are_open(self) -> bool:
        """Whether an optimizer has not stepped since the last backward pass: gradients may wait for a later batch.

        Where none goes through ``backward`` (a pipeline's schedule runs them itself) each batch counts as one.
        """
        last_batch = self._progress.total_batches - 1 if self._backwards == self._reopened else -1
        stepped = [self._stepped.get(id(wrapped.optimizer), (0, -1)) for wrapped in self.optimizers]
        return any(backwards < self._backwards or batch < last_batch for backwards, batch in stepped)

    def reopen(self) -> None:
        """Gradients of before a resume wait for a step."""
        self._backwards += 1
        self._reopened += 1

    def batch_step(self, batch: object, batch_idx: int, /) -> object:
        """Run the user's step on one batch."""
        context = self._gradients.forward_context
        if context is None:
            output = self._training_step(batch, batch_idx)
        else:
            with context():
                output = self._training_step(batch, batch_idx)
        if not self._keep_outputs:
            return None
        if isinstance(output, Tensor):
            return {"loss": output.detach()}
        if output is None:
            return {}
        if isinstance(output, Mapping):
            return cast("Mapping[object, object]", output)
        raise MisconfigurationException(
            f"training_step returned {type(output).__name__}; with automatic_optimization=False return a tensor, "
            "a mapping or None."
        )

    def backward(self, loss: Tensor, **kwargs: object) -> None:
        """``manual_backward``: scale the loss if the precision does, and run the backward pass."""
        self._backwards += 1
        scaler = self._gradients.scaler
        target = loss if scaler is None else scaler.scale(loss)
        for hook in self._hooks.on_before_backward:
            hook(target)
        if self._hooks.backward is not None:
            self._hooks.backward(target, **kwargs)
        elif self._backward_context is None:
            self._gradients.backward(target, **kwargs)
        else:
            with self._backward_context(target):
                self._gradients.backward(target, **kwargs)
        for hook in self._hooks.on_after_backward:
            hook()

    def step(self, optimizer: Optimizer, closure: Callable[[], object] | None = None) -> object:
        """``optimizer.step()``: run the closure, unscale, call the hooks, step, count."""
        hooks = self._hooks.on_before_optimizer_step
        scaler = self._gradients.scaler

        def before_step() -> object:
            loss = None if closure is None else closure()
            if scaler is not None and hooks:
                scaler.unscale(optimizer)
            for hook in hooks:
                hook(optimizer)
            return loss

        if closure is not None:
            result = self._gradients.step(optimizer, before_step)
        else:
            before_step()
            result = self._gradients.step(optimizer)
        self._optimizer_steps += 1
        self._stepped[id(optimizer)] = (self._backwards, self._progress.total_batches)
        return result
