"""The same global batch gives the same update, however it is split into micro-batches and over ranks.

A loss that is a mean over tokens, averaged again over micro-batches and ranks, is a mean of means: a token in a short
or padded batch weighs more than one in a full batch. Here each loss is a sum ``s_i`` and comes with its weight ``w_i``,
the number of things summed. One optimizer step has the gradient of ``sum(s_i) / sum(w_i)``, both sums over all
micro-batches of the window and all ranks.

Backward runs on ``s_i / u``, where ``u`` is a power of two about as large as the weight of one rank's window, the same
on every rank: what float16 has to hold is then as large as with means. The strategy averages gradients over the ``R``
ranks among which data are split, so before the step they are multiplied by ``u * R / sum(w_i)``. Ranks that share
their data (tensor parallel) report the same weight; over all ranks ``R`` and the sum grow by the same factor, which
cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fulmen_fabric.abilities import supports
from fulmen_fabric.world import LocalCollectives
from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationRuntimeError,
    MisconfigurationTypeError,
    SupportsBackgroundReduce,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen_fabric.uneven import UnevenRounds
    from fulmen_protocols import Collectives

__all__ = ["LossWeights", "WeighedStep"]

_EXAMPLE = (
    "    loss = F.cross_entropy(logits, targets, reduction='sum')\n"
    "    return {'loss': loss, 'weight': (targets != -100).sum()}"
)


class LossWeights:
    """Divides summed losses by what they were summed over, once per optimizer step and over all ranks.

    The Trainer does this with ``loss_weighting="weights"``. In a loop of one's own::

        weights = LossWeights(fabric.strategy.collectives, window=4)
        for is_last, batch in window:
            with fabric.no_backward_sync(model, enabled=not is_last):
                loss, tokens = model(batch)  # a sum, and over how many tokens
                fabric.backward(weights.add(loss, tokens, is_last=is_last))
        weights.scale_gradients(optimizer)  # before clipping
        optimizer.step()
        optimizer.zero_grad()

    Costs one collective of one number per optimizer step, and one more in the first step of a run. The host reads
    nothing. A window whose weights are all 0 gets the gradient 0.

    Args:
        collectives: of the ranks, over which gradients must be averaged; None for one process.
        rounds: where ranks have unequal data; a borrowed batch has the weight 0.
        window: batches of a window. A guess will do: it decides how large gradients are within the first one.
    """

    def __init__(
        self, collectives: Collectives | None = None, *, rounds: UnevenRounds | None = None, window: int = 1
    ) -> None:
        self._collectives: Collectives = LocalCollectives() if collectives is None else collectives
        self.rounds = rounds
        """Settable between two batches, as ``window`` is."""
        self.window = window
        self._total: Tensor | None = None  # weight of this rank's open window, shape ()
        self._unit: Tensor | None = None  # shape (), equal on every rank
        self._sum: Callable[[], Tensor] | None = None  # waits for the total of all ranks

    def add(self, loss: Tensor, weight: Tensor | float, *, is_last: bool = False) -> Tensor:
        """Count a batch in, and return the loss to run backward on.

        Args:
            loss: a sum, of shape ().
            weight: over how many things: a tensor of shape () on the loss's device, or a number, at least 0.
            is_last: whether the window ends with this batch. The ranks' weights are then summed while backward runs;
                otherwise after it.

        Raises:
            MisconfigurationException: the weight is no such number.
        """
        self.note(weight, loss.device, is_last=is_last)
        return self.weigh(loss)

    def note(self, weight: Tensor | float, device: torch.device, *, is_last: bool = False) -> None:
        """Count a batch's weight in, before its loss is given to ``weigh``; the arguments are those of ``add``."""
        value = _number(weight)
        self._prepare(device)
        assert self._total is not None
        if not self._is_borrowed:
            self._total.add_(value)
        if self._unit is None:
            largest = self._collectives.all_reduce(self._total, "max") * self.window
            self._unit = _power_of_two(largest, otherwise=torch.ones_like(largest))
        if is_last:
            self._sum = self._begin_sum()

    def weigh(self, loss: Tensor) -> Tensor:
        """The loss to run backward on, for a batch whose weight is noted."""
        assert self._unit is not None, "note() comes first"
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()
        loss = loss / self._unit.to(loss.dtype)
        return loss * 0.0 if self._is_borrowed else loss

    @torch.no_grad()
    def scale_gradients(self, optimizer: Optimizer) -> None:
        """Give the parameters of ``optimizer`` the window's gradient, after its last backward pass, and start another.

        Linear in the gradients: a gradient scaler may unscale them before or after, and finds those that are not
        finite all the same.

        Raises:
            MisconfigurationRuntimeError: no batch was counted in.
        """
        if self._total is None or self._unit is None:
            raise MisconfigurationRuntimeError(
                "LossWeights.scale_gradients() was called, and no loss went through add(): call "
                "backward on weights.add(loss, weight)."
            )
        total = (self._sum or self._begin_sum())()
        self._sum = None
        is_empty = total == 0
        ranks = self._collectives.world_size
        _multiply(optimizer, (self._unit * ranks / total).masked_fill(is_empty, 0.0))
        # In place, so that a captured step finds them where they were.
        self._unit.copy_(_power_of_two(total / ranks, otherwise=self._unit))
        self._total.zero_()

    def forget_window(self) -> None:
        """Start a window without the weights of one that was left open."""
        self._sum = None
        if self._total is not None:
            self._total.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The open window's weight on this rank and the unit, on the CPU; empty before the first batch. Host waits."""
        if self._total is None or self._unit is None:
            return {}
        return {"total": self._total.detach().cpu().clone(), "unit": self._unit.detach().cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave; on every rank or on none."""
        self._sum = None
        self._total = state["total"].clone() if state else None
        self._unit = state["unit"].clone() if state else None

    @property
    def _is_borrowed(self) -> bool:
        return self.rounds is not None and self.rounds.is_borrowed

    def _prepare(self, device: torch.device) -> None:
        if self._total is not None and self._total.device == device:
            return
        # Whole numbers are exact up to 2**53; MPS has no float64 and counts to 2**24.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        if self._total is None:
            self._total = torch.zeros((), dtype=dtype, device=device)
            return
        self._total = self._total.to(device, dtype)
        self._unit = None if self._unit is None else self._unit.to(device, dtype)

    def _begin_sum(self) -> Callable[[], Tensor]:
        assert self._total is not None
        if supports(self._collectives, SupportsBackgroundReduce):
            return self._collectives.begin_all_reduce(self._total, "sum")
        total = self._collectives.all_reduce(self._total, "sum")
        return lambda: total


class WeighedStep:
    """A ``training_step`` that returns ``{"loss": <a sum>, "weight": <over how many>}``; notes the weight.

    Args:
        step: the user's, as it is called.
        weights: where to note it.
    """

    def __init__(self, step: Callable[..., object], weights: LossWeights) -> None:
        self._step, self._weights = step, weights
        self._is_last = False

    def __call__(self, *args: object) -> object:
        """What the step returned.

        Raises:
            MisconfigurationException: there is no weight beside the loss, or it is no number.
        """
        output = self._step(*args)
        if output is not None:
            loss, weight = _loss_and_weight(output)
            self._weights.note(weight, loss.device, is_last=self._is_last)
        return output

    def ending(self, batch_step: Callable[[object, int], object]) -> Callable[[object, int], object]:
        """``batch_step``, which runs this one on the last batch of each window."""

        def last(batch: object, batch_idx: int, /) -> object:
            self._is_last = True
            try:
                return batch_step(batch, batch_idx)
            finally:
                self._is_last = False

        return last


def _loss_and_weight(output: object) -> tuple[Tensor, Tensor | float]:
    found = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        outputs = cast("Mapping[object, object]", output)
        found = f"a mapping with the keys {sorted(map(str, outputs))}"
        loss, weight = outputs.get("loss"), outputs.get("weight")
        if isinstance(loss, Tensor) and isinstance(weight, (Tensor, int, float)):
            return loss, weight
        if {"loss", "weight"} <= outputs.keys():
            name, value = ("weight", weight) if isinstance(loss, Tensor) else ("loss", loss)
            found = f"{name!r} of type {type(value).__name__}"
    raise MisconfigurationException(
        "loss_weighting='weights' takes each loss as a sum, with 'weight' beside it: over how many tokens (or samples) "
        f"it is summed, as a tensor of shape () or a number. training_step returned {found}. Return for example\n"
        f"{_EXAMPLE}\nor leave loss_weighting out, and return a mean."
    )


def _number(weight: Tensor | float) -> Tensor | float:
    """``weight`` as what a tensor of shape () can be added to. Values of tensors are not looked at."""
    if isinstance(weight, Tensor):
        if weight.ndim:
            raise MisconfigurationException(
                f"the weight of a loss has shape {tuple(weight.shape)}; it must be one number, of shape (). "
                "Sum it: weight.sum()."
            )
        weight = weight.detach()
        whole = cast("Callable[[], Tensor] | None", getattr(weight, "full_tensor", None))  # of a DTensor
        return weight if whole is None else whole()
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MisconfigurationTypeError(
            f"the weight of a loss is {weight!r}; give the number of things summed: a number, or a tensor of shape ()."
        )
    if not 0 <= weight < math.inf:
        raise MisconfigurationException(
            f"the weight of a loss is {weight!r}; it must be finite and at least 0: the number of things summed."
        )
    return weight


def _power_of_two(value: Tensor, *, otherwise: Tensor) -> Tensor:
    """The smallest power of two that is not below ``value``; ``otherwise`` where that is 0 or no number."""
    power = torch.exp2(torch.ceil(torch.log2(value)))
    return torch.where((power > 0) & power.isfinite(), power, otherwise)


def _multiply(optimizer: Optimizer, factor: Tensor) -> None:
    """Multiply the gradients of ``optimizer`` in place; of sharded ones this rank's part."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in (one for group in optimizer.param_groups for one in group["params"]):
        gradient = cast("Tensor | None", parameter.grad)
        if gradient is None:
            continue
        local = cast("Callable[[], Tensor] | None", getattr(gradient, "to_local", None))
        part = gradient if local is None else local()
        if part.is_sparse:
            part = part._values()  # pyright: ignore[reportPrivateUsage]  # as torch's own scaler does
        groups.setdefault((part.device, part.dtype), []).append(part)
    for (device, dtype), parts in groups.items():
        if dtype in (torch.float16, torch.bfloat16):
            # In half precision the factor itself would be rounded, by up to 0.4 %.
            single = factor.to(device, torch.float32)
            for part in parts:
                part.copy_(part.float().mul_(single))
        else:
            torch._foreach_mul_(parts, factor.to(device, dtype))  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
