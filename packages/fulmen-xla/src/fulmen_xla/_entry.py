"""The way into a module through a wrapper that only watches ``forward``."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Entry", "enter"]


class Entry(nn.Module):
    """Runs ``module`` when called, or another of its methods when called through ``enter``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.pending: list[str | None] = [None]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the pending method, or the module."""
        name, self.pending[0] = self.pending[0], None  # what the method itself calls is a plain forward
        return self.module(*args, **kwargs) if name is None else getattr(self.module, name)(*args, **kwargs)


def enter(wrapper: nn.Module, name: str) -> Callable[..., object]:
    """A callable that runs method ``name`` of the module inside ``wrapper``'s forward."""
    entry = next(one for one in wrapper.modules() if isinstance(one, Entry))

    def through_wrapper(*args: object, **kwargs: object) -> object:
        entry.pending[0] = None if name == "forward" else name
        try:
            return cast("object", wrapper(*args, **kwargs))
        finally:
            entry.pending[0] = None  # the wrapper may have failed before it came to the entry

    return through_wrapper
