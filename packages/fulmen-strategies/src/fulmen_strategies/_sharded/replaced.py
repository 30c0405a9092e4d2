"""Parameters that placing a module has replaced, for optimizers that were made from the old ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from fulmen_strategies._sharded.layout import laid_out_like, map_tensors
from fulmen_strategies._sharded.states import canonical

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Replaced"]


class Replaced:
    """Remembers which parameter has taken the place of which, and keeps none of them alive."""

    def __init__(self) -> None:
        self._now = WeakIdKeyDictionary()

    def note(self, before: Mapping[str, nn.Parameter], placed: nn.Module) -> None:
        """Compare the named parameters that there were ``before`` with those of ``placed``."""
        after = {canonical(name): parameter for name, parameter in placed.named_parameters()}
        for name, parameter in before.items():
            now = after.get(canonical(name))
            if now is not None and now is not parameter:
                self._now[parameter] = TensorWeakRef(now)

    def forget(self) -> None:
        """All of them."""
        self._now.clear()

    def hand_over(self, optimizer: Optimizer) -> None:
        """Let ``optimizer`` step the parameters that there are now; its state is laid out, and cast, as they are."""
        for group in optimizer.param_groups:
            for index, parameter in enumerate(cast("list[Tensor]", group["params"])):
                found = cast("TensorWeakRef | None", self._now.get(parameter))  # type: ignore[no-untyped-call]  # torch's own
                now = None if found is None else cast("nn.Parameter | None", found())
                if now is not None:
                    group["params"][index] = now
                    if parameter in optimizer.state:
                        optimizer.state[now] = _laid_out_like(now, optimizer.state.pop(parameter))


def _laid_out_like(parameter: nn.Parameter, state: object) -> object:
    def fitted(value: Tensor) -> Tensor:
        return laid_out_like(value, parameter) if value.shape == parameter.shape and value.dim() else value

    return cast("object", map_tensors(fitted, state))
