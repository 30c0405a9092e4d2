"""Restored gradients of a pipeline's stage, which torch clears once before it begins to add to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

__all__ = ["keep_gradients"]


def keep_gradients(module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Give the units of ``fully_shard`` in ``module`` the gradients that they have now back, if these get lost.

    In its first step ``torch.distributed.pipelining.PipelineStage`` runs its module forward and backward to learn the
    shapes of what it will send, and clears all gradients of such units afterwards (torch 2.13). After a resume inside
    an accumulation window those are the window's so far. They are given back when the unit runs again; a step of an
    optimizer ends the watch, as gradients are cleared on purpose then.
    """
    kept = {
        parameter: parameter.grad.detach().clone()
        for unit in module.modules()
        if isinstance(unit, FSDPModule)
        for parameter in unit.parameters()
        if parameter.grad is not None
    }
    if kept:
        _Watch(kept, module, optimizers)


class _Watch:
    def __init__(self, kept: dict[nn.Parameter, Tensor], module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._kept = kept
        self._hooks: list[RemovableHandle] = [
            unit.register_forward_pre_hook(self._give_back) for unit in module.modules() if isinstance(unit, FSDPModule)
        ]
        self._hooks.extend(optimizer.register_step_post_hook(self._end) for optimizer in optimizers)

    def _give_back(self, *_: object) -> None:
        lost = [parameter for parameter in self._kept if parameter.grad is None]
        for parameter in lost:
            parameter.grad = self._kept.pop(parameter)
        if not self._kept:
            self._end()

    def _end(self, *_: object) -> None:
        self._kept.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
