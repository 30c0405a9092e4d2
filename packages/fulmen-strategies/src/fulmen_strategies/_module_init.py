"""Where and how new modules get their first values."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["created_on"]


class _SkipInitialisation(TorchFunctionMode):
    """Turns the functions of ``torch.nn.init`` into identities: a checkpoint will overwrite what they would do."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def created_on(device: torch.device, *, empty: bool) -> Generator[None]:
    """Within the block, new tensors live on ``device``; with ``empty`` the initialisers of ``torch.nn`` do nothing."""
    with contextlib.ExitStack() as stack:
        # torch.device as a context intercepts every call into torch, so it is left out where it would change nothing.
        if device != torch.get_default_device():
            stack.enter_context(device)
        if empty:
            stack.enter_context(_SkipInitialisation())
        yield
