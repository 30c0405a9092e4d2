"""How a strategy is driven, by the kit in one process and by every rank of a world alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F

from fulmen_conformance._kit import offers
from fulmen_protocols import OwnsBackward, OwnsOptimizerStep, Strategy, SupportsShardedState, engine
from fulmen_protocols import strategy as seam

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fulmen_conformance._reference import Batch

__all__ = [
    "ABILITIES",
    "backward",
    "differences",
    "forward_backward",
    "full_state",
    "gradients",
    "prepare",
    "step",
    "train",
]

_NO_ABILITIES = ("Strategy", "StrategyParts")
ABILITIES: tuple[type, ...] = tuple(
    vars(module)[name] for module in (seam, engine) for name in module.__all__ if name not in _NO_ABILITIES
)
"""Everything that a strategy may offer beside the protocol itself."""


def prepare(
    strategy: Strategy,
    module: nn.Module,
    make_optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
) -> tuple[nn.Module, Optimizer]:
    """Place ``module``, make its optimizer from what was placed, and hand both to the strategy."""
    placed = strategy.place(module)
    optimizers = strategy.prepare_optimizers(placed, [make_optimizer(placed.parameters())])
    assert len(optimizers) == 1, f"one optimizer was given and {len(optimizers)} came back"
    return placed, optimizers[0]


def backward(strategy: Strategy, loss: Tensor, placed: nn.Module) -> None:
    """The backward pass, by the strategy's engine where it owns it."""
    if offers(strategy, OwnsBackward):
        cast("OwnsBackward", strategy).backward(loss, placed)
    else:
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]


def forward_backward(strategy: Strategy, placed: nn.Module, batch: Batch) -> Tensor:
    """One batch up to its gradients; returns the loss."""
    x, y = (value.to(strategy.root_device) for value in batch)
    loss = F.mse_loss(placed(x), y)
    backward(strategy, loss, placed)
    return loss


def step(strategy: Strategy, optimizer: Optimizer, placed: nn.Module) -> None:
    """The optimizer step, by the strategy's engine where it owns it."""
    if offers(strategy, OwnsOptimizerStep):
        cast("OwnsOptimizerStep", strategy).optimizer_step(optimizer, placed)
    else:
        optimizer.step()


def train(strategy: Strategy, placed: nn.Module, optimizer: Optimizer, data: Iterable[Batch]) -> None:
    """The loop of a user, one optimizer step a batch."""
    for batch in data:
        optimizer.zero_grad()
        forward_backward(strategy, placed, batch)
        step(strategy, optimizer, placed)


def full_state(strategy: Strategy, module: nn.Module, placed: nn.Module) -> dict[str, Tensor]:
    """Weights by canonical name, whole, on the CPU; on a sharding strategy's ranks other than 0 it may be empty."""
    if offers(strategy, SupportsShardedState):
        state = cast("SupportsShardedState", strategy).module_state(placed, full=True)
    else:
        state = module.state_dict()
    # Cloned: on the CPU a state_dict shares memory with the module, which goes on training.
    return {name: cast("torch.Tensor", value).detach().cpu().clone() for name, value in state.items()}


def gradients(module: nn.Module) -> list[Tensor]:
    """A whole copy of every gradient, in the order of the parameters; an error names a parameter without one."""
    found: list[Tensor] = []
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient: Any = parameter.grad.detach()
        gather = getattr(gradient, "full_tensor", None)  # a DTensor's; a collective, which every rank comes to
        found.append((gradient if gather is None else gather()).clone().cpu())
    return found


def differences(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 0.0) -> list[str]:
    """One phrase for each entry that differs by more than ``tolerance`` (absolute; relative above 1)."""
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is not expected" for name in got if name not in expected]
    for name in expected.keys() & got.keys():
        ours, theirs = got[name].cpu(), expected[name].cpu()
        if tolerance == 0.0:
            equal = torch.equal(ours, theirs)
        else:
            equal = torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        if not equal:
            problems.append(f"{name} differs by {(ours - theirs).abs().max().item():.3g}")
    return problems
