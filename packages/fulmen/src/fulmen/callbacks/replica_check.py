"""ReplicaCheck: finds out that the ranks of a fit no longer train the same model, and names what has parted."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from fulmen.callbacks.callback import Callback
from fulmen_fabric import rank_zero_warn, supports
from fulmen_fabric.compiled import canonical
from fulmen_protocols import FulmenError, SupportsReplicaCheck
from fulmen_protocols.errors import MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen_protocols import Collectives

__all__ = ["ReplicaCheck", "ReplicasDriftedError"]

_ACTIONS = ("raise", "warn")
_NAMED = 5


class ReplicasDriftedError(FulmenError, RuntimeError):
    """Ranks that should hold the same weights do not."""


class ReplicaCheck(Callback):
    """Compares the weights of all ranks, bit for bit, when training begins and ends and every so many optimizer steps.

    Under DDP each rank has a model of its own, and all stay equal only as long as every gradient is averaged. A weight
    changed outside of the optimizer, a gradient that was not reduced, a random draw in a step's bookkeeping: from then
    on each rank trains another model, the loss looks much as before, and the checkpoint holds that of rank 0.

    A comparison is one pass over the weights, one collective of two numbers per parameter, and one wait for the device.
    Between comparisons the callback does nothing but look at the step. Parameters that DDP was told to leave alone
    (``_ddp_params_and_buffers_to_ignore``) are left out. In a run of one process there is nothing to compare.

    Args:
        every_n_steps: optimizer steps from one comparison to the next.
        action: ``"raise"`` ends the fit with ``ReplicasDriftedError`` on every rank; ``"warn"`` says the same once for
            each set of parameters and goes on.

    Raises:
        MisconfigurationException: an argument has a value that cannot be.
    """

    def __init__(self, every_n_steps: int = 1000, action: Literal["raise", "warn"] = "raise") -> None:
        if every_n_steps < 1:
            raise MisconfigurationException(f"ReplicaCheck(every_n_steps={every_n_steps!r}) must be at least 1.")
        if action not in _ACTIONS:
            raise MisconfigurationException(
                f"ReplicaCheck(action={action!r}) is neither 'raise' nor 'warn'.{did_you_mean(str(action), _ACTIONS)}"
            )
        self.every_n_steps = every_n_steps
        self.action = action
        self.drifted: list[str] = []
        """The parameters that the last comparison found to differ, in the model's order."""
        self._checked_at = 0
        self._said: set[tuple[str, ...]] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that the strategy can compare.

        Raises:
            MisconfigurationException: it cannot.
        """
        strategy = trainer.assembly.strategy
        if stage == "fit" and trainer.world_size > 1 and not supports(strategy, SupportsReplicaCheck):
            raise MisconfigurationException(
                f"ReplicaCheck compares the copies that ranks have of a model, and "
                f"strategy={trainer.assembly.strategy_name!r} keeps no whole copy on each, or cannot compare them. "
                "Drop the callback, or use 'ddp'."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks begin with the same weights."""
        self._said.clear()
        self._checked_at = trainer.global_step
        self._check(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare if it is time."""
        if trainer.global_step - self._checked_at >= self.every_n_steps:
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was trained since the last comparison counts, too."""
        if trainer.global_step != self._checked_at:
            self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before, self._checked_at = self._checked_at, trainer.global_step
        strategy = trainer.assembly.strategy
        if trainer.world_size == 1 or not supports(strategy, SupportsReplicaCheck):
            return
        ignored = frozenset(cast("Iterable[str]", getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())))
        drifted = [name for name in strategy.drifted_parameters(pl_module) if name not in ignored]
        self.drifted = list(canonical(dict.fromkeys(drifted)))
        if not drifted:
            return
        who = _who_differs(trainer.world.collectives, pl_module, drifted)
        since = "before training began" if before == trainer.global_step else f"after step {before}"
        text = (
            f"the ranks no longer train the same model. At optimizer step {trainer.global_step}, "
            f"{_count(self.drifted)} of {sum(1 for _ in pl_module.parameters())} parameters differ: "
            f"{_listed(self.drifted)}. {who} It happened {since}. Look for what changes weights outside of the "
            "optimizer or on some ranks only, for a backward pass that DDP does not see (a part of the model that is "
            "called past the step), and for random draws that decide what is computed."
        )
        if self.action == "raise":
            raise ReplicasDriftedError(text)
        if (found := tuple(self.drifted)) not in self._said:
            self._said.add(found)
            rank_zero_warn(text)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)}" if len(names) > 1 else "one"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(map(repr, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _who_differs(collectives: Collectives, module: nn.Module, drifted: Sequence[str]) -> str:
    """A sentence on which ranks have other values than most, and how far apart they are. A collective."""
    name = drifted[0]
    mine = module.get_parameter(name).detach().contiguous()
    digest = hashlib.sha256(mine.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
    digests = collectives.all_gather_object(digest)
    # Of equally many the values of the lower rank count, so that all ranks say the same.
    usual = max(Counter(digests).items(), key=lambda item: (item[1], -digests.index(item[0])))[0]
    reference = digests.index(usual)
    others = [rank for rank, each in enumerate(digests) if each != usual]
    away = (mine - collectives.broadcast(mine.clone(), source=reference)).abs().max()
    apart = float(collectives.all_reduce(away.to(torch.float64) if away.device.type != "mps" else away, "max"))
    ranks = f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(map(str, others))} have"
    plain = next(iter(canonical({name: None})))
    return f"In {plain!r} {ranks} other values than rank {reference}, by up to {apart:.3g}."
