"""The way into a module through a wrapper that only watches ``forward``.

DDP prepares its gradient reduction in its own ``forward``. What a run calls is rather ``training_step``; so DDP wraps a
small entry module, whose ``forward`` runs whichever method of the user's module the caller has bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Entry", "enter"]


class Entry(nn.Module):
    """Runs ``module`` when called, or another of its methods when called through ``enter``.

    Attributes:
        module: the user's module.
        pending: the method that the next call runs instead; ``None``: ``module`` itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        # nn.Module.__setattr__ searches parameters, buffers and submodules; a list item is set in 20 ns.
        self.pending: list[Callable[..., object] | None] = [None]
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        if ignored is not None:  # DDP's own convention; it asks the module that it wraps, which is this one
            self._ddp_params_and_buffers_to_ignore = [f"module.{name}" for name in ignored]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the pending method, or the module."""
        pending = self.pending
        method, pending[0] = pending[0], None  # whatever the method itself calls through the wrapper is a plain forward
        return self.module(*args, **kwargs) if method is None else method(*args, **kwargs)


def enter(wrapper: nn.Module, entry: Entry, method: Callable[..., object]) -> Callable[..., object]:
    """A callable that runs ``method`` inside ``wrapper``'s forward. ``entry`` is what ``wrapper`` wraps."""
    pending = entry.pending

    def through_wrapper(*args: object, **kwargs: object) -> object:
        pending[0] = method
        try:
            return wrapper(*args, **kwargs)
        except RuntimeError as error:
            _explain(error)
            raise
        finally:
            pending[0] = None  # the wrapper may have failed before it came to the entry

    return through_wrapper


def _explain(error: RuntimeError) -> None:
    if "Expected to have finished reduction" in str(error):
        error.add_note(
            "Some parameters got no gradient in the last backward pass. If that is meant (a branch that is not always "
            "taken, several optimizers, frozen parts), use strategy='ddp_find_unused_parameters_true' or "
            "DDPStrategy(find_unused_parameters=True); otherwise make every output take part in the loss."
        )
